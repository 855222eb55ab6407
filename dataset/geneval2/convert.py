"""Make test_metadata.jsonl from your copy of GenEval 2, an evaluation set (arXiv:2512.16853).

    python dataset/geneval2/convert.py geneval2_data.jsonl [--out FOLDER]

Each row keeps its atoms ("vqa_list", "skills"); its number of atoms becomes the tag.
"""

from __future__ import annotations

import argparse

from dataset.files import arguments, read_tables, write_test
from flow_grpo.cli import user_errors

COLUMNS = {name: (name,) for name in ("prompt", "atom_count", "vqa_list", "skills")}


def convert(args: argparse.Namespace) -> None:
    """Write the file. Raises ValueError for a row that lacks something."""
    rows = []
    for number, row in enumerate(read_tables(args.download, COLUMNS), 1):
        questions, skills, count = row["vqa_list"], row["skills"], row["atom_count"]
        if not (isinstance(questions, list) and isinstance(skills, list) and row["prompt"]):
            raise ValueError(f"{args.download}, row {number}: it lacks a prompt or a list.")
        rows.append(
            {
                "tag": f"{count} atoms",
                "prompt": row["prompt"],
                "vqa_list": questions,
                "skills": skills,
            }
        )
    write_test(args.download, args.out, rows)


if __name__ == "__main__":
    with user_errors():
        convert(arguments(__doc__, __file__).parse_args())
