"""Make test_metadata.jsonl from your copy of PartiPrompts, an evaluation set (arXiv:2206.10789).

    python dataset/parti/convert.py PartiPrompts.tsv [--out FOLDER]

A table with the columns Prompt and Category is needed; the category becomes the row's tag.
"""

from __future__ import annotations

import argparse

from dataset.files import arguments, read_tables, write_test
from flow_grpo.cli import user_errors

COLUMNS = {"prompt": ("prompt",), "tag": ("category",)}


def convert(args: argparse.Namespace) -> None:
    """Write the file, a row of the table a row. Raises ValueError for a table without prompts."""
    table = read_tables(args.download, COLUMNS)
    rows = [{"tag": (row["tag"] or "").strip(), "prompt": row["prompt"]} for row in table]
    rows = [row | {"prompt": " ".join((row["prompt"] or "").split())} for row in rows]
    rows = [row for row in rows if row["prompt"]]
    write_test(args.download, args.out, rows)


if __name__ == "__main__":
    with user_errors():
        convert(arguments(__doc__, __file__).parse_args())
