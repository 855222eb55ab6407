"""Make test_metadata.jsonl from your copy of DrawBench, an evaluation set (arXiv:2205.11487).

    python dataset/drawbench/convert.py DrawBench.csv [--copies 5] [--out FOLDER]

A table with the columns Prompts and Category is needed; the category becomes the row's tag.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dataset.files import read_tables, write_rows
from flow_grpo.cli import user_errors

COLUMNS = {"prompt": ("prompts", "prompt"), "tag": ("category", "tag")}


def convert(args: argparse.Namespace) -> None:
    """Write the file. Raises ValueError for a table without prompts."""
    rows = {}
    for row in read_tables(args.download, COLUMNS):
        prompt = " ".join((row["prompt"] or "").split())
        if prompt:
            rows.setdefault(prompt, {"tag": (row["tag"] or "").strip(), "prompt": prompt})
    if not rows or args.copies < 1:
        raise ValueError(
            f"{args.download} has {len(rows)} prompts and --copies={args.copies}; at least 1 of "
            f"each is needed."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "test_metadata.jsonl", [*rows.values()] * args.copies)
    print(f"{args.out}/test_metadata.jsonl: {len(rows)} prompts, {args.copies} rows of each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("download", type=Path)
    parser.add_argument("--copies", type=int, default=5, help="rows of each prompt, each a noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    with user_errors():
        convert(parser.parse_args())
