"""Train each objective for two epochs on tiny pipelines, and print what came of it as a table.

    python tests/matrix.py [--models sd3 flux qwenimage] [--objectives grpo dpo ...] [--rollouts]

Each cell is a run through the training script's own code: LoRA and full fine-tune. It trains,
saves, and resumes from its first epoch to the same bits; a policy gradient's log-ratio is 0 at
its start. --rollouts adds those of GRPO, Guard and DPPO by every rollout and kernel. A cell that
fails says why, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

import running
import tiny
import torch

from flow_grpo.objectives.registry import OBJECTIVES

KEYS = {  # what an objective can't do without
    "grpo": {"train.beta": 0.01},
    "grpo_guard": {},
    "flow_dppo": {"train.old_log_prob": "replay"},
    "dpo": {"train.ref_update_step": 2},
    "sft": {"train.ref_update_step": 2, "train.beta": 0.1},
    "nft": {"nft.kl_beta": 0.1},
    "awm": {"forward.ema_beta": 0.1},
    "vgrpo": {"vgrpo.old_beta": 0.3},
    "epg": {"epg.proximal": 0.1, "forward.decay": "rising"},
    "ram": {"forward.reset_every": 2},
    "crd": {"crd.temperature": 0.05},
    "dgpo": {"dgpo.clip_range": 1e-4, "dgpo.fast_from": 2},
}
UNGUIDED = KEYS.keys() - {"grpo", "grpo_guard", "flow_dppo"}
ROLLOUTS = {  # by a name for the table
    "subset": {"sample.sde_window": "subset"},
    "progressive": {"sample.sde_window": "progressive", "sample.window_dwell": 1},
    "stratified": {"sample.sde_window": "stratified", "sample.sde_window_size": 1},
    "shared_prefix": {"sample.branching": "shared_prefix", "sample.same_latent": True},
    "trunk": {"sample.branching": "trunk"},
    "per_step": {"sample.branching": "per_step"},
    "strides": {"sample.branching": "strides", "sample.num_image_per_prompt": 8},
    "tree": {"sample.branching": "tree"},
    "dropped": {"train.drop_equal_groups": True, "train.best_and_worst": 1},
}
KERNELS = ("sde", "cps", "dance", "linear")
RATIOS = ("grpo", "grpo_guard", "flow_dppo")
MODELS = ("sd3", "flux", "qwenimage")


def overrides(objective: str, use_lora: bool, rollout: str, kernel: str) -> dict:
    keys = {"objective": objective, "use_lora": use_lora, "train.lora_rank": 4}
    keys |= {"train.cfg": False} if objective in UNGUIDED else {}
    keys |= {"sample.sde_type": kernel} | ROLLOUTS.get(rollout, {}) | KEYS[objective]
    return {name.replace(".", "__"): value for name, value in keys.items()}


def check(
    folder: Path,
    model: str,
    objective: str,
    use_lora: bool,
    rollout: str = "window",
    kernel: str = "sde",
    precision: str = "no",
) -> dict[str, float]:
    """Run a cell in a folder that holds the files of running.make_files() and the model."""
    family, _ = tiny.MODELS[model]
    name = f"{model}-{objective}-{'lora' if use_lora else 'full'}-{rollout}-{kernel}"
    keys = overrides(objective, use_lora, rollout, kernel)
    keys |= {"pretrained__model": folder / model, "mixed_precision": precision}
    whole = running.train(running.arguments(folder, run_name=name, **keys), family)
    updates = [row for row in running.metrics(whole.folder) if row["kind"] == "update"]
    trains = (row["grad_norm"] > 0 or row.get("dropped") == 1 for row in updates)
    assert len(updates) == 4 and all(trains), updates
    first = sorted((whole.folder / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)[0]
    again = running.arguments(folder, run_name=f"{name}-again", resume_from=first, **keys)
    resumed = running.train(again, family)
    one, other = running.weights(whole.folder), running.weights(resumed.folder)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    figures = {"loss": updates[-1]["loss"], "grad_norm": updates[-1]["grad_norm"]}
    gate = whole.folder / "gate.json"
    if gate.exists():
        figures["log_ratio"] = max(json.loads(gate.read_text())["log_ratio"].values())
        assert figures["log_ratio"] == 0
    return figures


def row(cell: tuple[str, str, bool, str, str], folder: Path, precision: str) -> tuple[str, bool]:
    """Return a cell's line of the table, and whether it is as it should be."""
    model, objective, use_lora, rollout, kernel = cell
    what = f"| {model} | `{objective}` | {rollout} | {kernel} | {'LoRA' if use_lora else 'full'} |"
    try:
        with redirect_stdout(sys.stderr):
            seen = check(folder, *cell, precision=precision)
    except Exception as error:  # the others are worth a look all the same
        return f"{what} **failed**: {type(error).__name__}: {error}".splitlines()[0] + " |||", False
    ratio = f"{seen['log_ratio']:g}" if "log_ratio" in seen else "none"
    return f"{what} {seen['loss']:.4g} | {seen['grad_norm']:.3g} | {ratio} |", True


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=sorted(tiny.MODELS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--rollouts", action="store_true")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16"))
    args = parser.parse_args()
    columns = ("model", "objective", "rollout", "kernel", "trains", "last loss", "gradient norm")
    print(f"| {' | '.join((*columns, 'log-ratio at the start'))} |\n{'|---' * 8}|")
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = running.make_files(Path(place))
        for model in args.models:
            if not (folder / model).exists():
                tiny.save(model, folder / model)
            cells = [(each, lora) for each in args.objectives for lora in (True, False)]
            cells = [(*cell, "window", "sde") for cell in cells]
            if args.rollouts:
                cells += product(RATIOS, (True,), ROLLOUTS, KERNELS)
            for cell in cells:
                if (cell[0], cell[3]) == ("grpo_guard", "cps"):
                    continue  # refused
                line, passed = row((model, *cell), folder, args.mixed_precision)
                print(line, flush=True)
                failed += not passed
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
