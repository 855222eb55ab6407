"""What the converters of dataset/ share: reading a user's own table, and splitting it. No torch."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_grpo import inputs

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
TEXT_COLUMN = "prompt"  # what the lines of a .txt are


def read_tables(
    path: Path, columns: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a table, or of every table in a folder and below it, in order of names.

    columns: {key of a yielded row: names of its column, the first that exists counts, whatever its
    case}. A .txt has one column, "prompt", a line each. None stands for a missing value.
    Raises ValueError naming the file and what is needed.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES)
    if not paths or not paths[0].is_file():
        raise ValueError(f"{path}: a file or folder of {', '.join(SUFFIXES)} is needed.")
    for one in paths:
        if one.suffix not in SUFFIXES:
            raise ValueError(f"{one}: one of {', '.join(SUFFIXES)} is needed.")
        yield from _read_parquet(one, columns) if one.suffix == ".parquet" else _read(one, columns)


def _read(path: Path, columns: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in enumerate(_rows(path, file)):
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, row {number + 1}: an object is needed.")
                if number == 0:
                    chosen = _choose(path, list(row), columns)
                yield {key: row.get(name) for key, name in chosen.items()}
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a UTF-8 {path.suffix} file ({error}).") from None


def _rows(path: Path, file: Iterable[str]) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return _values(path)
    if path.suffix == ".txt":
        return ({TEXT_COLUMN: line} for _, line in inputs.lines(path))
    return csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


def _values(path: Path) -> Iterator[Any]:
    try:
        yield from (value for _, value in inputs.json_lines(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a UTF-8 .jsonl file: {error}") from None


def _read_parquet(path: Path, columns: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install pyarrow`.") from None
    try:
        table = ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise ValueError(f"{path} is not a parquet file ({error}).") from None
    chosen = _choose(path, table.schema_arrow.names, columns)
    # Only these columns: the others of such tables hold images.
    for batch in table.iter_batches(columns=list(chosen.values())):
        for row in batch.to_pylist():
            yield {key: row[name] for key, name in chosen.items()}


def _choose(path: Path, found: list[str], columns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return {key: the table's own name of its column}."""
    lower, chosen = {name.lower(): name for name in found if name}, {}
    for key, names in columns.items():
        known = [lower[name.lower()] for name in names if name.lower() in lower]
        if not known:
            raise ValueError(
                f"{path} has the columns {', '.join(lower.values())}; a column "
                f"{' or '.join(map(repr, names))} is needed."
            )
        chosen[key] = known[0]
    return chosen


def held_out(keys: Iterable[str], number: int) -> set[str]:
    """Choose a test split: the `number` keys of the least SHA-256.

    The order of the keys does not matter, and keys that are added later displace few. Raises
    ValueError if none would be left to train on.
    """
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if not 0 < number < len(distinct):
        raise ValueError(
            f"{number} of {len(distinct)} can't be held out for the test split: at least 1 must "
            f"be, and at least 1 must be left. Change the number."
        )
    return set(distinct[:number])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a .txt of prompts, the same bytes on every system."""
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a .jsonl of metadata, the same bytes on every system."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def arguments(description: str, file: str, copies: int | None = None) -> argparse.ArgumentParser:
    """Declare what a converter of one table is told. file: its own. copies: the default, if any."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("download", type=Path)
    parser.add_argument("--out", type=Path, default=Path(file).parent)
    if copies:
        said = "rows of each prompt, each a noise"
        parser.add_argument("--copies", type=int, default=copies, help=said)
    return parser


def write_test(download: Path, folder: Path, rows: list[dict], copies: int = 1) -> None:
    """Write test_metadata.jsonl of an evaluation set, `copies` times. Raises ValueError if empty.

    download: what they were read from.
    """
    if not rows or copies < 1:
        raise ValueError(
            f"{download} has {len(rows)} prompts, for {copies} rows of each; at least 1 of each is "
            f"needed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "test_metadata.jsonl", rows * copies)
    print(f"{folder}/test_metadata.jsonl: {len(rows)} prompts, {copies} rows of each")


def write_by_image(folder: Path, rows: Sequence[Mapping[str, Any]], num_test: int) -> None:
    """Write {train,test}_metadata.jsonl; all rows of one "image" are in one split.

    num_test: images, not rows, that are held out.
    """
    test = held_out((row["image"] for row in rows), num_test)
    for split in ("train", "test"):
        kept = [row for row in rows if (row["image"] in test) == (split == "test")]
        write_rows(folder / f"{split}_metadata.jsonl", kept)
