"""What an evaluation has scored so far, so that one that was killed goes on where it was."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

FOLDER, ABOUT = "unfinished", "about.json"
NUM_CALLS = 4  # of each rank, from one part to the next
COLUMN, IMAGE = "score/", "image/"


class Kept:
    """Parts of an evaluation's scores, in `folder`/unfinished until all are there.

    made_with: what the parts to come depend on. Raises ValueError where those that are there were
    made with something else, or are damaged.
    """

    def __init__(self, folder: Path, made_with: dict):
        self.folder = folder / FOLDER
        self.columns: dict[str, dict[int, float]] = {}
        self.images: dict[int, np.ndarray] = {}
        self.rows: set[int] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        about, text = self.folder / ABOUT, json.dumps(made_with, indent=1, sort_keys=True)
        if not about.exists():
            _write(about, text.encode())
        before = json.loads(about.read_text())
        if changed := [key for key in made_with if before.get(key) != json.loads(text)[key]]:
            raise ValueError(
                f"--resume: {folder} holds an evaluation with another {', '.join(changed)}. Give "
                f"what it was started with, or name a new --out."
            )
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as part:
                    self._take({name: part[name] for name in part.files})
            except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
                raise ValueError(f"--resume: {path} is damaged ({error}): delete it.") from None

    def add(
        self, rows: Sequence[int], columns: dict[str, np.ndarray], images: dict[int, np.ndarray]
    ) -> None:
        """Keep rows, each once, with their scores (M,) and the images that will be shown."""
        part = {"rows": np.asarray(rows, np.int64)}
        part |= {f"{COLUMN}{name}": values for name, values in columns.items()}
        part |= {f"{IMAGE}{row}": image for row, image in images.items()}
        path = self.folder / f"{len(self.rows):08d}.npz"
        aside = path.with_suffix(".tmp")
        with aside.open("wb") as file:
            np.savez(file, **part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        self._take(part)

    def _take(self, part: dict[str, np.ndarray]) -> None:
        rows = part["rows"].tolist()
        for name, values in part.items():
            if name.startswith(COLUMN):
                known = self.columns.setdefault(name.removeprefix(COLUMN), {})
                known |= dict(zip(rows, values.tolist(), strict=True))
            elif name.startswith(IMAGE):
                self.images[int(name.removeprefix(IMAGE))] = values
        self.rows |= set(rows)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Tell whether a folder has an evaluation that has not come to its end."""
        return (folder / FOLDER).exists()

    def result(self, num_rows: int) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
        """Return the columns (num_rows,) by name, NaN where a part lacks one, and the images."""
        columns = {
            name: np.array([known.get(row, np.nan) for row in range(num_rows)])
            for name, known in self.columns.items()
        }
        return columns, dict(sorted(self.images.items()))

    def end(self) -> None:
        """Delete the parts, once their results are written."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def _write(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_bytes(data)
    os.replace(aside, path)
