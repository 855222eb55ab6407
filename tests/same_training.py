"""Train each cell on one process and on two ranks of every engine, and compare them in a table.

    python tests/same_training.py table.md [--engines ddp zero1 zero2 zero3 fsdp2]

A cell is a model, an objective, LoRA or full, and a precision: 20 updates of Adam in two epochs,
the second again from the checkpoint between them. test_same_training.py tries some.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import engines
import numpy as np
import running
import tiny
import torch
from diffusers import DiffusionPipeline
from forking import FSDP, ON_CPU, on_ranks, zero
from safetensors.torch import load_file

from flow_grpo.training import collect, loop

ENGINES = {"ddp": ON_CPU} | {f"zero{n}": zero(n) for n in (1, 2, 3)} | {"fsdp2": FSDP}
MODELS = ("sd3", "qwenimage")
OBJECTIVES = {
    "grpo": {"train__beta": 0.1, "train__ema": True, "train__ema_update_every": 1},
    "nft": {"nft__kl_beta": 0.1},
    "dpo": {"train__ref_update_step": 5},
    "trunk": {"objective": "grpo", "sample__branching": "trunk", "sample__same_latent": True},
}
COMMON = {"num_epochs": 2, "train__num_inner_epochs": 5}
LIMITS = {"no": (1e-3, 1e-3), "bf16": (2e-2, 2e-2)}  # of losses and of gradients' norms
# ZeRO-3's linear layers round before they add the bias, too, of which DPO's beta makes that much.
ROUNDED = {("sd3-dpo-lora-bf16", "zero3"): (5e-2, 5e-2)}
# Adam's first step is as long where rounding decides its sign, so that after it one process in bf16
# is as far from its own in fp32.
NUM_COMPARED = {"no": 20, "bf16": 1}
PICTURE = 1e-2  # of what training changed in it
FIRST = (1e-6, 1e-5)  # in fp32, of the first update


class Cell(NamedTuple):
    model: str
    objective: str
    lora: bool
    precision: str = "no"

    def __str__(self) -> str:
        kind = "lora" if self.lora else "full"
        return f"{self.model}-{self.objective}-{kind}-{self.precision}"


ALL = [Cell(*cell) for cell in product(MODELS, OBJECTIVES, (True, False), LIMITS)]


class Seen(NamedTuple):
    """The largest relative differences from one process."""

    loss: float
    norm: float


def make_files(folder: Path) -> Path:
    """Add to running.make_files() the other models, and a LoRA for each."""
    for model in MODELS:
        if not (folder / model).exists():
            tiny.save(model, folder / model)
        if not (folder / f"lora-{model}").exists():
            family = tiny.MODELS[model][0]
            running.save_random_lora(folder / model, folder / f"lora-{model}", family=family)
    return folder


def keys_of(cell: Cell, files: Path) -> dict:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    keys = {"sample__num_batches_per_epoch": 8 // ranks, "pretrained__model": files / cell.model}
    keys |= {"train__gradient_accumulation_steps": 4 // ranks}  # 2 updates an epoch
    keys |= {"objective": cell.objective, "mixed_precision": cell.precision}
    keys |= running.lora(files) if cell.lora else {"use_lora": False}
    keys |= {"train__lora_path": files / f"lora-{cell.model}"} if cell.lora else {}
    return keys | COMMON | OBJECTIVES[cell.objective]


def train(files: Path, logs: Path, cells: list[Cell]) -> None:
    """Train cells on this rank: each, and its second epoch again."""
    for cell in cells:
        keys = keys_of(cell, files)
        run_through(files, logs, str(cell), cell, keys)
        first = min(checkpoints(logs / str(cell)), key=number)
        run_through(files, logs, f"{cell}-again", cell, keys | {"resume_from": first})


def run_through(files: Path, logs: Path, name: str, cell: Cell, keys: dict) -> None:
    """Make a run, on scores that know no pixel: of these the last bit could decide."""
    keys = keys | {"logdir": logs, "run_name": name}
    with engines.small_weights_cut():
        run = running.prepare(running.arguments(files, **keys), tiny.MODELS[cell.model][0])

    def given(scores, held_out):
        place = run.ranks.rank * len(scores["avg"]) + np.arange(len(scores["avg"]))
        return scores | {"avg": np.sin(1.0 + place)}

    running.watch_scores(run, given)
    (rollouts := logs / f"{name}-rollouts").mkdir(exist_ok=True)
    honest = collect.weigh
    running.record_rollouts(rollouts, run.ranks.rank)
    try:
        loop.train(run)
    finally:
        collect.weigh = honest
        run.close()


def compare(cell: Cell, engine: str, files: Path, one: Path, two: Path) -> Seen:
    """Hold the logs of two ranks against those of one process; raises AssertionError."""
    rolled_out(cell, one, two)
    ours, theirs = (
        [row for row in running.metrics(logs / str(cell)) if row["kind"] == "update"]
        for logs in (two, one)
    )
    assert len(ours) == len(theirs) == 20, (len(ours), len(theirs))
    assert all(row["grad_norm"] > 0 for row in ours)
    found = [
        Seen(*(apart(row[key], like[key]) for key in ("loss", "grad_norm")))
        for row, like in list(zip(ours, theirs, strict=True))[: NUM_COMPARED[cell.precision]]
    ]
    if cell.precision == "no":
        assert abs(ours[0]["loss"] - theirs[0]["loss"]) <= FIRST[0] * max(1, abs(theirs[0]["loss"]))
        assert found[0].norm <= FIRST[1], found[0]
    worst = Seen(*map(max, zip(*found, strict=True)))
    limits = ROUNDED.get((str(cell), engine), LIMITS[cell.precision])
    assert all(x <= limit for x, limit in zip(worst, limits, strict=True)), worst
    resumed(cell, two)
    exported(cell, files, one, two)
    return worst


def rolled_out(cell: Cell, one: Path, two: Path) -> None:
    """The first epoch's rollouts and rewards are bit-equal."""
    if cell.precision == "bf16":
        return  # DeepSpeed computes in it where others autocast
    if "sample__branching" in OBJECTIVES[cell.objective]:
        return  # a rank's paths lie before its images, so that rows have another order
    whole = load_file(one / f"{cell}-rollouts" / "0-0")
    halves = [load_file(two / f"{cell}-rollouts" / f"{rank}-0") for rank in (0, 1)]
    for key, value in whole.items():
        assert torch.equal(torch.cat([half[key] for half in halves]), value), key


def apart(one: float, other: float) -> float:
    """Return the relative difference; a loss below 1e-4 is a difference of equal numbers."""
    return abs(one - other) / max(abs(other), 1e-4)


def resumed(cell: Cell, logs: Path) -> None:
    """What went on from the first epoch's checkpoint ended with the same bits."""
    whole, again = (
        max(checkpoints(logs / name), key=number) for name in (str(cell), f"{cell}-again")
    )
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*.safetensors"))]
    assert len(files) >= 3, files  # weights, moments, and what is exported
    for file in files:
        ours, theirs = load_file(again / file), load_file(whole / file)
        assert theirs and ours.keys() == theirs.keys(), file
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file


def picture(cell: Cell, files: Path, checkpoint: Path | None) -> np.ndarray:
    """Draw with the stock pipeline and what a checkpoint exports, or without."""
    pipe = DiffusionPipeline.from_pretrained(files / cell.model)
    if checkpoint and cell.lora:
        pipe.load_lora_weights(checkpoint / "lora")
    elif checkpoint:
        pipe.transformer = type(pipe.transformer).from_pretrained(checkpoint / "transformer")
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **how).images


def exported(cell: Cell, files: Path, one: Path, two: Path) -> None:
    """The stock pipeline draws the picture of one process with what two ranks export."""
    base = picture(cell, files, None)
    ours, theirs = (
        picture(cell, files, max(checkpoints(logs / str(cell)), key=number)) for logs in (two, one)
    )
    trained = min(np.abs(drawn - base).max() for drawn in (ours, theirs))
    assert trained > 0, "the picture is the untrained model's"
    differs = np.abs(ours - theirs).max() / trained
    assert cell.precision == "bf16" or differs <= PICTURE, f"pictures differ by {differs:.3f}"


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").iterdir())


def number(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("table", type=Path, help="which gets a line as a cell ends")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--cells", nargs="+", default=list(map(str, ALL)), metavar="CELL")
    args = parser.parse_args()
    cells = [cell for cell in ALL if str(cell) in args.cells]
    failed = 0
    with tempfile.TemporaryDirectory() as place, args.table.open("w") as table:
        head = f"| | {' | '.join(args.engines)} |\n{'|---' * (1 + len(args.engines))}|"
        print(head, file=table, flush=True)
        files = make_files(running.make_files(Path(place)))
        for cell in cells:
            shown = []
            logs = {name: files / f"{cell}-{name}" for name in ("alone", *args.engines)}
            for name, folder in logs.items():
                folder.mkdir()
                ranks = (1, ON_CPU) if name == "alone" else (2, ENGINES[name])
                try:
                    on_ranks(*ranks, train, files, folder, [cell])
                    if name != "alone":
                        seen = compare(cell, name, files, logs["alone"], folder)
                        shown.append(f"{seen.loss:.0e}, {seen.norm:.0e}")
                except AssertionError as error:
                    failed += 1
                    shown.append(f"**{str(error).splitlines()[0] if str(error) else 'failed'}**")
            print(f"| {cell} | {' | '.join(shown)} |", file=table, flush=True)
            for folder in logs.values():
                shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
