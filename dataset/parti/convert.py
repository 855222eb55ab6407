"""Make test_metadata.jsonl from your copy of PartiPrompts, an evaluation set (arXiv:2206.10789).

    python dataset/parti/convert.py PartiPrompts.tsv [--out FOLDER]

A table with the columns Prompt and Category is needed; the category becomes the row's tag.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dataset.files import read_tables, write_rows
from flow_grpo.cli import user_errors

COLUMNS = {"prompt": ("prompt",), "tag": ("category",)}


def convert(args: argparse.Namespace) -> None:
    """Write the file, a row of the table a row. Raises ValueError for a table without prompts."""
    table = read_tables(args.download, COLUMNS)
    rows = [{"tag": (row["tag"] or "").strip(), "prompt": row["prompt"]} for row in table]
    rows = [row | {"prompt": " ".join((row["prompt"] or "").split())} for row in rows]
    rows = [row for row in rows if row["prompt"]]
    if not rows:
        raise ValueError(f"{args.download} has no prompts; at least 1 is needed.")
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "test_metadata.jsonl", rows)
    print(f"{args.out}/test_metadata.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("download", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    with user_errors():
        convert(parser.parse_args())
