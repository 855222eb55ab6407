"""Make test_metadata.jsonl from your copy of DrawBench, an evaluation set (arXiv:2205.11487).

    python dataset/drawbench/convert.py DrawBench.csv [--copies 5] [--out FOLDER]

A table with the columns Prompts and Category is needed; the category becomes the row's tag.
"""

from __future__ import annotations

import argparse

from dataset.files import arguments, read_tables, write_test
from flow_grpo.cli import user_errors

COLUMNS = {"prompt": ("prompts", "prompt"), "tag": ("category", "tag")}


def convert(args: argparse.Namespace) -> None:
    """Write the file. Raises ValueError for a table without prompts."""
    rows = {}
    for row in read_tables(args.download, COLUMNS):
        prompt = " ".join((row["prompt"] or "").split())
        if prompt:
            rows.setdefault(prompt, {"tag": (row["tag"] or "").strip(), "prompt": prompt})
    write_test(args.download, args.out, [*rows.values()], args.copies)


if __name__ == "__main__":
    with user_errors():
        convert(arguments(__doc__, __file__, copies=5).parse_args())
