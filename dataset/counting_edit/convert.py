"""Convert the published counting_edit set to this format, split by image.

    python dataset/counting_edit/convert.py generated_images.zip ROWS.jsonl [ROWS.jsonl ...] \\
        --out FOLDER [--test 30]

ROWS: the rows whose "image" is a path in the zip, such as the old train_metadata.jsonl and
test_metadata.jsonl. They were split by row, so every test image was also trained on; here the
rows of all files are split again.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.files import write_by_image
from flow_grpo import inputs
from flow_grpo.cli import user_errors
from flow_grpo.rewards.rules.geneval_rules import check_row

MAX_BYTES = 64 << 20  # of an image, uncompressed


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read rows that can be judged and have an image. Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    for where, row in inputs.json_lines(path):
        try:
            check_row(row)
            if not isinstance(row["image"], str) or not isinstance(row["prompt"], str):
                raise ValueError('"image" and "prompt" must be texts')
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}: {error!r}.") from None
        yield row


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return {name: image} of a zip's files. Two of one name would be mixed up: ValueError."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        if member.is_dir() or "__MACOSX" in path.parts:
            continue
        if path.name in found:
            raise ValueError(f"{archive.filename} has two files named {path.name}.")
        found[path.name] = member
    return found


def convert(args: argparse.Namespace) -> None:
    """Unpack the images that rows name and write both files. Raises ValueError."""
    unique = {json.dumps(row): row for path in args.rows for row in read_rows(path)}
    rows = list(unique.values())
    try:
        archive = zipfile.ZipFile(args.zip)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{args.zip}: not a zip file ({error}).") from None
    images = args.out / "images"
    with archive:
        pictures = members(archive)
        names = {PurePosixPath(row["image"]).name for row in rows}
        if missing := sorted(names - set(pictures)):
            raise ValueError(
                f"{args.zip} lacks {len(missing)} images that rows name, such as {missing[0]}."
            )
        images.mkdir(parents=True, exist_ok=True)
        for name in names:  # by its last part alone, so that none leaves the folder
            if pictures[name].file_size > MAX_BYTES:
                raise ValueError(f"{args.zip}: {name} is larger than {MAX_BYTES} bytes.")
            (images / name).write_bytes(archive.read(pictures[name]))
    rows = [row | {"image": f"images/{PurePosixPath(row['image']).name}"} for row in rows]
    write_by_image(args.out, rows, args.test)
    print(f"{args.out}: {len(rows)} rows of {len(names)} images, {args.test} of them for testing")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zip", type=Path)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--test", type=int, default=30, help="images that are held out")
    parser.add_argument("--out", type=Path, required=True)
    with user_errors():
        convert(parser.parse_args())
