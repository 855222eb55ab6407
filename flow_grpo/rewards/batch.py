"""The pictures of one call of a scorer, as a record that can be cut and sent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass
class Batch:
    """B pictures to score; what a scorer takes."""

    images: list[np.ndarray | None]  # uint8 (H, W, 3) or (F, H, W, 3); None: unreadable
    prompts: list[str]
    metadata: list[dict]
    references: list[tuple] | None = None  # B tuples of uint8 (H, W, 3)
    group: np.ndarray | None = None  # (B,) int64
    errors: dict[int, str] | None = None  # why a row's picture is None

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
            errors={j: self.errors[i] for j, i in enumerate(rows) if i in self.errors}
            if self.errors
            else None,
        )

    def units(self) -> list[list[int]]:
        """List the rows that must be scored together: runs of equal group, or each row alone."""
        if self.group is None:
            return [[row] for row in range(len(self))]
        starts = np.flatnonzero(np.diff(self.group)) + 1
        return [part.tolist() for part in np.split(np.arange(len(self)), starts)]

    def num_bytes(self) -> int:
        pictures = [*self.images, *(each for row in self.references or () for each in row)]
        return sum(each.nbytes for each in pictures if each is not None)
