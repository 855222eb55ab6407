"""Write a full fine-tune of BAGEL as the one file that its authors' code loads.

    python scripts/export_bagel.py --model MODEL --out ema.safetensors \\
        --transformer logs/NAME/checkpoints/checkpoint-320/transformer

MODEL: the released folder. The file is a copy of its ema.safetensors, in which the weights of the
generation expert are the trained ones, rounded to the released precision; put it in place of that.
A LoRA needs no such file: docs/bagel.md says how their code loads one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flow_grpo.cli import make_writable, user_errors, user_path
from flow_grpo.diffusers_patch.bagel import folder
from flow_grpo.launch.weights import check_file, check_part


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=user_path, required=True, help="the released folder")
    parser.add_argument("--transformer", type=user_path, required=True, help="a run's transformer/")
    parser.add_argument("--out", type=user_path, required=True, help="a file that is not there yet")
    args = parser.parse_args(argv[1:])
    with user_errors():
        check(args.model, args.transformer, args.out)
        count = folder.export(args.model, args.transformer, args.out)
    print(f"{args.out}: {count} weights of {args.transformer}, all others of {args.model}")


def check(model: Path, transformer: Path, out: Path) -> None:
    """Raise ValueError, before anything is written, for what is missing, not whole, or there."""
    check_file(model / folder.WEIGHTS)
    check_part(transformer)
    if out.exists():
        raise ValueError(f"--out={out} is there already. Name a new file.")
    make_writable(out.parent, "--out")


if __name__ == "__main__":
    main(sys.argv)
