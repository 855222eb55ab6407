"""Where a run keeps what, and which checkpoint it may continue from."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import ml_collections

from flow_grpo.plan import Plan
from flow_grpo.prompts import Prompt
from flow_grpo.training import digests

STATE = "trainer.json"  # written last: a folder without it is no checkpoint
REPLACED = ".replaced-"  # before the name of a checkpoint that counts until its successor is there
COUNTERS = ("epoch", "num_updates", "num_skipped", "num_skipped_in_a_row", "metrics_bytes")
IMAGES = "images an epoch"  # of all ranks
NAME = re.compile(rf"({re.escape(REPLACED)})?checkpoint-[0-9]+")  # others are a user's copies


def checkpoints(run_folder: Path) -> list[Path]:
    """List a run's complete checkpoints, the oldest first."""
    found = (run_folder / "checkpoints").glob(f"*checkpoint-*/{STATE}")
    complete = [state.parent for state in found if NAME.fullmatch(state.parent.name)]
    return sorted(complete, key=lambda path: (step(path), path.name))


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def holds(run_folder: Path, checkpoint: Path) -> bool:
    """Whether a run has a checkpoint, or a copy of one, in its folder; links lead there too."""
    own = [path.resolve() for path in checkpoints(run_folder)]
    return checkpoint.resolve() in own or run_folder.resolve() in checkpoint.resolve().parents


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
                f"checkpoint. Give a checkpoint's path, or 'auto' to start anew where none is; "
                f"runs are looked for in config.logdir={config.logdir!r}."
            )
        folder = found[-1]
    else:
        folder = Path(wanted)
        folder = folder if NAME.fullmatch(folder.name) else folder.resolve()  # it may be a link
    _check(folder, identity)
    return folder


def _check(folder: Path, identity: dict) -> None:
    if not (folder / STATE).is_file():
        raise ValueError(
            f"config.resume_from={str(folder)!r}: no complete checkpoint ({STATE} is missing). A "
            f"folder logs/<run_name>/checkpoints/checkpoint-<step> is needed, or latest, or auto."
        )
    state = read(folder)
    if problem := digests.problem(folder, state["files"]):
        raise ValueError(f"config.resume_from={str(folder)!r}: {problem}. {_another(folder)}")
    for key, value in identity.items():
        if key in state["identity"] and state["identity"][key] != value:
            how = " (ranks x sample.train_batch_size x sample.num_batches_per_epoch)"
            raise ValueError(
                f"config.resume_from={str(folder)!r} was written with {key}="
                f"{state['identity'][key]!r}, this run has {value!r}. Make them equal"
                f"{how if key == IMAGES else ''}, or start a new run (a LoRA can be carried over "
                f"with config.train.lora_path)."
            )


def _another(folder: Path) -> str:
    """Say which checkpoint to resume from instead."""
    older = [path for path in checkpoints(folder.parent.parent) if path.name != folder.name]
    if NAME.fullmatch(folder.name):
        older = [path for path in older if step(path) <= step(folder)]
    if not older:
        return "Resume from an older checkpoint, or start a new run."
    return f"Resume from an older checkpoint: {shlex.quote(f'--config.resume_from={older[-1]}')}"


def read(folder: Path) -> dict:
    """Return what a checkpoint's trainer.json says. Raises ValueError if no run wrote it so."""
    try:
        state = json.loads((folder / STATE).read_text())
        state["files"].items(), state["identity"].items()
        is_older = digests.SEAL not in state
        if not is_older:
            digests.check_seal(state)
            for key in COUNTERS:
                if type(state[key]) is not int or not 0 <= state[key] < 2**53:
                    raise ValueError(f"{key} is {state[key]!r:.60}")
    except (ValueError, AttributeError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"config.resume_from={str(folder)!r}: its {STATE} is damaged or was changed by hand "
            f"({type(error).__name__}: {error}). {_another(folder)}"
        ) from None
    if is_older:
        raise ValueError(
            f"config.resume_from={str(folder)!r} is of an older version, no longer read. Start a "
            f"new run; the LoRA in its lora/ can be carried over with config.train.lora_path."
        )
    return state


def digest(prompts: list[Prompt]) -> str:
    texts = json.dumps([[prompt.text, prompt.metadata] for prompt in prompts], default=str)
    return hashlib.sha256(texts.encode()).hexdigest()


def cut(plan: Plan) -> dict[str, int]:
    """Return how an epoch is dealt out, which may change from one start to the next."""
    return {"rank(s)": plan.world_size, "optimizer step(s) a pass": plan.num_updates}


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
        "config.seed": config.seed,
        IMAGES: total,
    }
