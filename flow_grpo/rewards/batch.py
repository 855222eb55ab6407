"""The images of one call of a scorer, as a record that can be cut, joined and sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass
class Batch:
    """B images to score; what a scorer takes."""

    images: list[np.ndarray | None]  # uint8 (H, W, 3) or (F, H, W, 3); None: unreadable
    prompts: list[str]
    metadata: list[dict]
    references: list[tuple] | None = None  # B tuples of uint8 (H, W, 3)
    group: np.ndarray | None = None  # (B,) int64
    errors: dict[int, str] | None = None  # why a row's image is None

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """Put rows one after another. Either all batches have groups or none has."""
        errors: dict[int, str] = {}
        offset = 0
        for batch in batches:
            errors |= {offset + row: text for row, text in (batch.errors or {}).items()}
            offset += len(batch)
        groups = [batch.group for batch in batches if batch.group is not None]
        assert len(groups) in (0, len(batches))
        references = None
        if any(batch.references is not None for batch in batches):
            references = [row for b in batches for row in b.references or [()] * len(b)]
        return cls(
            images=[image for batch in batches for image in batch.images],
            prompts=[prompt for batch in batches for prompt in batch.prompts],
            metadata=[row for batch in batches for row in batch.metadata],
            references=references,
            group=np.concatenate(groups) if groups else None,
            errors=errors or None,
        )

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: list[int]) -> Batch:
        return replace(
            self,
            images=[self.images[i] for i in rows],
            prompts=[self.prompts[i] for i in rows],
            metadata=[self.metadata[i] for i in rows],
            references=self.references and [self.references[i] for i in rows],
            group=None if self.group is None else self.group[rows],
            errors=self.errors
            and {j: self.errors[i] for j, i in enumerate(rows) if i in self.errors},
        )

    def units(self) -> list[list[int]]:
        """List the rows that must be scored together: runs of equal group, or each row alone."""
        if self.group is None:
            return [[row] for row in range(len(self))]
        starts = np.flatnonzero(np.diff(self.group)) + 1
        return [part.tolist() for part in np.split(np.arange(len(self)), starts)]

    def num_bytes(self) -> int:
        images = [*self.images, *(each for row in self.references or () for each in row)]
        return sum(each.nbytes for each in images if each is not None)


def scatter(
    parts: Iterable[tuple[Sequence[int], Mapping[str, np.ndarray]]], num_rows: int
) -> dict[str, np.ndarray]:
    """Put scores of parts, each with its row numbers, in place: (num_rows,) float64 or NaN."""
    columns: dict[str, np.ndarray] = {}
    for rows, scores in parts:
        for name, values in scores.items():
            columns.setdefault(name, np.full(num_rows, np.nan))[list(rows)] = values
    return columns
