"""Say what a run will need before anything loads: memory, disk and passes, under each engine.

    python -m flow_grpo.launch.estimate --config config/grpo.py:general_ocr_sd3 --gpus 8

Further --config.KEY=VALUE count as they do in training. The model need not be on this machine.
"""

from __future__ import annotations

import argparse
import sys

import torch

from flow_grpo.cli import user_errors
from flow_grpo.launch import settings
from flow_grpo.launch.estimate.table import GIB, LASTS, PHASES, Estimate, Row, estimate, needed

NUM_RANKS = 8
MEMORY_GIB = 80.0  # of a GPU, where none is seen
COLUMNS = {  # of the table, and the part behind each
    "frozen": LASTS[0],
    "trained": LASTS[1],
    "gradients": "gradients",
    "optimizer": LASTS[2],
    "snapshots": LASTS[3],
    "gathered": LASTS[4],
} | {name: name for name in PHASES}


def report(found: Estimate, memory: float) -> str:
    """Write an estimate as text. memory: bytes of a GPU, or of the host without one."""
    of, place = found.training, "GPU" if found.on_gpu else "host"
    passes = ", ".join(f"{count:,} {name}" for name, count in found.passes.items() if count)
    fits = found.first_that_fits(memory)
    head = [
        found.model,
        str(found.plan),
        f"passes of an image an epoch: {passes}",
        f"{of.trained / 1e6:,.1f} M elements train, {of.frozen / 1e6:,.1f} M do not; snapshots of "
        f"what trains: {of.copies}",
        f"on each {place}: encoders {_gib(found.encoders)}, VAE {_gib(found.vae)}, rewards "
        f"{_gib(found.rewards)} GiB; a checkpoint on the disk: {found.checkpoint / 2**20:,.0f} MiB",
        "",
    ]
    titles = [*COLUMNS, *(["GPU", "host"] if found.on_gpu else ["host"]), "sent"]
    lines = [f"{'GiB of a rank':24}" + "".join(f"{title:>10}" for title in titles)]
    for row in found.rows:
        lines.append(f"{row.kind.name:24}" + "".join(f"{_gib(v):>10}" for v in _cells(row, found)))
    if fits:
        least = needed(fits, found.on_gpu) / GIB
        chosen = f"{fits.kind.name} is the first that fits in {memory / GIB:.0f} GiB ({least:.1f})"
    else:
        chosen = f"None fits in {memory / GIB:.0f} GiB: docs/precision_memory.md says what helps"
    return "\n".join([*head, *lines, "", *NOTES, f"{chosen}."])


NOTES = (
    "From shapes: frozen, trained, gradients, optimizer, snapshots, encoders, VAE, checkpoint.",
    "From fake tensors that went through the model: sampling, decoding, update (above what lasts).",
    "Arithmetic: gathered, sent (an epoch), rewards (by their published sizes). Measured: 0.8 GiB",
    "of a process; gaps between tensors, 8 %, which a host with --cpu includes, and what fits on a",
    "GPU with 1 GiB of CUDA's. Of the three phases the largest counts, update with gradients.",
    "docs/scale.md has such estimates beside measurements.",
    "",
)


def _cells(row: Row, found: Estimate) -> list[float]:
    whole = [row.device, row.host] if found.on_gpu else [row.host]
    return [*(row.parts[part] for part in COLUMNS.values()), *whole, row.sent]


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}" if value < 100 * GIB else f"{value / GIB:,.0f}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=NUM_RANKS, help="of all machines; default: 8")
    parser.add_argument(
        "--gpu-memory", type=float, help="GiB; default: those of the GPU here, or 80"
    )
    parser.add_argument("--cpu", action="store_true", help="the ranks train on the CPU")
    args, given = parser.parse_known_args(argv[1:])
    with user_errors():
        if args.gpus < 1:
            raise ValueError(f"--gpus={args.gpus}: at least 1 is needed.")
        config, _ = settings.load([argv[0], *given], "")
        found = estimate(config, args.gpus, on_gpu=not args.cpu)
    memory = args.gpu_memory or MEMORY_GIB
    if not (args.gpu_memory or args.cpu) and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    print(report(found, memory * GIB))


if __name__ == "__main__":
    main(sys.argv)
