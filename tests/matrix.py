"""Train each objective for two epochs on tiny pipelines, and print what came of it as a table.

    python tests/matrix.py [--models sd3 flux qwenimage] [--objectives grpo dpo ...]

Each cell is a run through the training script's own code: LoRA and full fine-tune. It trains,
saves, and resumes from its first epoch to the same bits; a policy gradient's log-ratio is 0 at
its start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
}
UNGUIDED = {"dpo", "sft", "nft"}
MODELS = ("sd3", "flux", "qwenimage")


def overrides(objective: str, use_lora: bool) -> dict:
    keys = {"objective": objective, "use_lora": use_lora, "train.lora_rank": 4}
    keys |= {"train.cfg": False} if objective in UNGUIDED else {}
    return {name.replace(".", "__"): value for name, value in (keys | KEYS[objective]).items()}


def check(folder: Path, model: str, objective: str, use_lora: bool) -> dict[str, float]:
    """Run a cell in a folder that holds the files of running.make_files() and the model."""
    family, _ = tiny.MODELS[model]
    name = f"{model}-{objective}-{'lora' if use_lora else 'full'}"
    keys = overrides(objective, use_lora) | {"pretrained__model": folder / model}
    whole = running.train(running.arguments(folder, run_name=name, **keys), family)
    updates = [row for row in running.metrics(whole.folder) if row["kind"] == "update"]
    assert len(updates) == 4 and all(row["grad_norm"] > 0 for row in updates), updates
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=sorted(tiny.MODELS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    args = parser.parse_args()
    rows = ["| model | objective | trains | last loss | gradient norm | log-ratio at the start |"]
    rows.append("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = running.make_files(Path(place))
        for model in args.models:
            if not (folder / model).exists():
                tiny.save(model, folder / model)
            for objective in args.objectives:
                for use_lora in (True, False):
                    seen = check(folder, model, objective, use_lora)
                    ratio = f"{seen['log_ratio']:g}" if "log_ratio" in seen else "none"
                    what = "LoRA" if use_lora else "full"
                    norms = f"{seen['loss']:.4g} | {seen['grad_norm']:.3g}"
                    rows.append(f"| {model} | `{objective}` | {what} | {norms} | {ratio} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
