"""Make test_metadata.jsonl from your copy of DPG-Bench, an evaluation set (arXiv:2403.05135).

    python dataset/dpg/convert.py dpg_bench.csv [--copies 4] [--out FOLDER]

The table has a line a question: item_id, text, proposition_id, dependency (numbers of questions, 0
for none) and question_natural_language.
"""

from __future__ import annotations

import argparse

from dataset.files import arguments, read_tables, write_test
from flow_grpo.cli import user_errors

COLUMNS = {
    "item": ("item_id",),
    "prompt": ("text",),
    "number": ("proposition_id",),
    "parents": ("dependency",),
    "question": ("question_natural_language",),
}


def convert(args: argparse.Namespace) -> None:
    """Write the file. Raises ValueError for a question whose number or parents are none."""
    items: dict[str, list[dict]] = {}
    for row in read_tables(args.download, COLUMNS):
        items.setdefault(row["item"], []).append(row)
    rows = [_row(item, asked) for item, asked in items.items()]
    write_test(args.download, args.out, rows, args.copies)


def _row(item: str, asked: list[dict]) -> dict:
    """Put an item's questions together, their numbers from 0."""
    try:
        numbers = {int(row["number"]): n for n, row in enumerate(asked)}
        parents = [[int(each) for each in row["parents"].split(",")] for row in asked]
        found = [[numbers[each] for each in of if each] for of in parents]
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the item {item!r}: {error!r} is no question's number.") from None
    questions = [[row["question"].strip(), "Yes"] for row in asked]
    return {"prompt": asked[0]["prompt"].strip(), "vqa_list": questions, "parents": found}


if __name__ == "__main__":
    with user_errors():
        convert(arguments(__doc__, __file__, copies=4).parse_args())
