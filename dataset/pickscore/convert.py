"""Make train.txt and test.txt from the prompts of a table that you have, such as Pick-a-Pic.

    python dataset/pickscore/convert.py DOWNLOAD [--test 2048] [--out FOLDER]

DOWNLOAD: a .parquet, .jsonl, .csv, .tsv or .txt, or a folder of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from dataset.files import held_out, read_tables, write_lines
from flow_grpo.cli import user_errors

COLUMNS = ("caption", "prompt", "prompts", "text")


def clean(texts: Iterable[str | None], min_words: int, max_chars: int) -> list[str]:
    """Keep each prompt once, whatever its case and spaces, if its length is right; in order."""
    kept: dict[str, str] = {}
    for text in texts:
        words = (text or "").split()  # so that a prompt is one line
        line = " ".join(words)
        if len(words) >= min_words and len(line) <= max_chars:
            kept.setdefault(line.lower(), line)
    return list(kept.values())


def convert(args: argparse.Namespace) -> None:
    """Write both files. Raises ValueError for a table without prompts."""
    table = read_tables(args.download, {"prompt": (args.column,) if args.column else COLUMNS})
    prompts = clean((row["prompt"] for row in table), args.min_words, args.max_chars)
    test = held_out(prompts, args.test)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [prompt for prompt in prompts if (prompt in test) == (split == "test")]
        write_lines(args.out / f"{split}.txt", lines)
        print(f"{args.out / split}.txt: {len(lines)} prompts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("download", type=Path)
    parser.add_argument("--column", help=f"of the prompts; default: the first of {COLUMNS}")
    parser.add_argument("--test", type=int, default=2048, help="prompts that are held out")
    parser.add_argument("--min_words", type=int, default=6)
    parser.add_argument("--max_chars", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    with user_errors():
        convert(parser.parse_args())
