"""Where a run keeps what, and which checkpoint it may continue from."""

import json
import time
from pathlib import Path

import ml_collections

from flow_grpo.parallel.choose import shards_state
from flow_grpo.training import digests

STATE = "trainer.json"  # written last: a folder without it is no checkpoint
REPLACED = ".replaced-"  # before the name of a checkpoint that counts until its successor is there


def run_name(config: ml_collections.ConfigDict, name: str) -> str:
    return config.run_name or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def checkpoints(run_folder: Path) -> list[Path]:
    """List a run's complete checkpoints, the oldest first."""
    folder, names = run_folder / "checkpoints", ("checkpoint-*", f"{REPLACED}checkpoint-*")
    complete = [state.parent for name in names for state in folder.glob(f"{name}/{STATE}")]
    return sorted(complete, key=lambda path: (int(path.name.rpartition("-")[2]), path.name))


def resume_point(config: ml_collections.ConfigDict, identity: dict) -> Path | None:
    """Find the checkpoint of config.resume_from, None: start anew; or raise ValueError."""
    wanted = config.resume_from
    if not wanted:
        return None
    if wanted in ("latest", "auto"):
        if not config.run_name:
            raise ValueError(
                f"config.resume_from={wanted}: config.run_name must name the run to continue."
            )
        found = checkpoints(Path(config.logdir) / config.run_name)
        if not found and wanted == "auto":
            return None
        if not found:
            raise ValueError(
                f"config.resume_from=latest: {Path(config.logdir) / config.run_name} has no "
                f"checkpoint. Give a checkpoint's path, or 'auto' to start anew where none is."
            )
        folder = found[-1]
    else:
        folder = Path(wanted)
    _check(folder, identity)
    return folder


def _check(folder: Path, identity: dict) -> None:
    if not (folder / STATE).is_file():
        raise ValueError(
            f"config.resume_from={str(folder)!r}: no complete checkpoint ({STATE} is missing). A "
            f"folder logs/<run_name>/checkpoints/checkpoint-<step> is needed, or latest, or auto."
        )
    state = read(folder)
    if state and digests.SEAL not in state:
        raise ValueError(
            f"config.resume_from={str(folder)!r} is of an older version, no longer read. Start a "
            f"new run; the LoRA in its lora/ can be carried over with config.train.lora_path."
        )
    if problem := digests.problem(folder, state):
        raise ValueError(
            f"config.resume_from={str(folder)!r}: {problem}. Resume from another checkpoint."
        )
    for key, value in identity.items():
        if key in state["identity"] and state["identity"][key] != value:
            raise ValueError(
                f"config.resume_from={str(folder)!r} was written with {key}="
                f"{state['identity'][key]!r}, this run has {value!r}. Make them equal, or start "
                f"a new run (a LoRA can be carried over with config.train.lora_path)."
            )


def read(folder: Path) -> dict:
    """Return what trainer.json says, {} where it is damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def identity(config: ml_collections.ConfigDict, pipeline: str, world_size: int) -> dict:
    """Return what a checkpoint and the run that resumes it must have in common."""
    train, lora, sample = config.train, config.use_lora, config.sample
    total = world_size * sample.train_batch_size * sample.num_batches_per_epoch
    return {
        "script's pipeline": pipeline,
        "config.pretrained.model": Path(config.pretrained.model).name,
        "config.objective": config.objective,
        "config.use_lora": lora,
        "config.train.lora_rank": train.lora_rank if lora else None,
        "config.train.lora_alpha": train.lora_alpha if lora else None,
        "config.train.lora_targets": list(train.lora_targets) if lora else None,
        "config.train.ema": train.ema,
        "config.train.use_8bit_adam": train.use_8bit_adam,
        "ranks with a state of their own (0: none)": world_size if shards_state() else 0,
        "config.seed": config.seed,
        "images an epoch": total,
    }
