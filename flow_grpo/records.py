"""The records that travel from prompts to the loss. Every batched field has a row for an image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from flow_grpo.rollouts import Row

Rows = slice | Tensor  # which rows: a slice, or (M,) int64 on the CPU


@dataclass(frozen=True)
class Size:
    """What one call generates, in pixels and frames."""

    height: int
    width: int
    num_frames: int = 1

    def area(self) -> int:
        return self.height * self.width * self.num_frames

    @classmethod
    def read(cls, text: str, num_frames: int = 1) -> Size:
        """Read HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES. Raises ValueError."""
        parts = text.split("x")
        if len(parts) not in (2, 3) or not all(re.fullmatch(r"[1-9]\d{0,4}", p) for p in parts):
            raise ValueError(f"{text!r}: a size such as 1024x768 or 480x832x81 is needed")
        return cls(*map(int, parts)) if len(parts) == 3 else cls(*map(int, parts), num_frames)

    def __str__(self) -> str:
        frames = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.height}x{self.width}{frames}"


@dataclass(frozen=True)
class Guidance:
    """How a velocity is guided. What the numbers mean, and which it takes, a model decides."""

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)  # of sigma, where guidance acts
    rescale: float = 0.0


@dataclass(eq=False)
class Cond:
    """The unpadded conditioning of one distinct (prompt, reference images)."""

    tensors: dict[str, Tensor]  # on the CPU, no batch dimension: embeddings, reference latents

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy on the host, pinned if there is a GPU that it goes back to."""
    kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return kept.copy_(tensor.detach())


@dataclass
class PromptBatch:
    """B rows to generate: whom each row belongs to and what it is conditioned on."""

    branches: dict[str, list[Cond]]  # "positive", and "negative" where guidance asks for it
    guidance: Guidance
    index: Tensor  # (B,) int64 into each branch, whose conditionings are distinct
    owners: list[Row]  # B
    size: Size
    prompts: list[str]  # B
    metadata: list[dict]  # B
    references: list[tuple] | None = None  # B tuples of uint8 (H, W, 3) images

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def group(self) -> Tensor:
        """(B,) int64, slot of the prompt in the epoch."""
        return torch.tensor([row.group for row in self.owners])

    @property
    def member(self) -> Tensor:
        """(B,) int64, 0 ... group size - 1."""
        return torch.tensor([row.member for row in self.owners])

    def rows(self, rows: Rows) -> PromptBatch:
        """Return some rows, with the conditionings that they use."""
        used, index = torch.unique(self.index[rows], return_inverse=True)
        branches = {n: [conds[i] for i in used.tolist()] for n, conds in self.branches.items()}
        chosen = torch.arange(len(self))[rows].tolist()
        columns = {name: getattr(self, name) for name in OF_ROWS}
        lists = {name: column and [column[i] for i in chosen] for name, column in columns.items()}
        return replace(self, branches=branches, index=index, **lists)

    @staticmethod
    def cat(parts: list[PromptBatch]) -> PromptBatch:
        first, counts = parts[0], [len(part.branches["positive"]) for part in parts[:-1]]
        assert all(part.size == first.size for part in parts), "rows of several sizes"
        offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
        names = [name for name in OF_ROWS if getattr(first, name) is not None]
        return replace(
            first,
            branches={n: sum((part.branches[n] for part in parts), []) for n in first.branches},
            index=torch.cat([part.index + o for part, o in zip(parts, offsets, strict=True)]),
            **{name: sum((getattr(part, name) for part in parts), []) for name in names},
        )


OF_ROWS = ("owners", "prompts", "metadata", "references")


@dataclass
class Conditioning:
    """What a call of the model is conditioned on, on the device."""

    branches: dict[str, dict[str, Tensor]]  # rows (B, ...) by the branch's and the tensor's name
    guidance: Guidance
    size: Size

    def repeated(self, times: int) -> Conditioning:
        """Put all rows behind each other so many times."""
        if times == 1:
            return self
        branches = {
            branch: {name: torch.cat([value] * times) for name, value in tensors.items()}
            for branch, tensors in self.branches.items()
        }
        return replace(self, branches=branches)

    def __getitem__(self, branch: str) -> dict[str, Tensor]:
        assert branch in self.branches, (
            f"{self.guidance} needs the branch {branch!r}; this conditioning has "
            f"{', '.join(self.branches)}"
        )
        return self.branches[branch]


@dataclass
class Rollout:
    """N denoised rows, one for each segment; those that were drawn whole are leaves.

    K: the stochastic steps that were kept. A row with fewer than another has zeros behind them,
    and -1 as their steps.
    """

    batch: PromptBatch
    steps: Tensor  # (N, K) int64, ascending indices of the sigmas from which the steps went
    next_steps: Tensor  # (N, K) int64, and to which
    latents: Tensor  # (N, K, ...) fp32, the state before each of these steps
    next_latents: Tensor  # (N, K, ...) fp32, the state after it
    log_probs: Tensor  # (N, K) fp32
    final: Tensor  # (N, ...) fp32, where the segment ends: at sigma 0, if it is a leaf
    leaf: Tensor  # (N,) bool: its image is decoded and scored
    parent: Tensor  # (N, 2) int64: the row that it goes on from, and its sigma's index; -1: noise
    means: Tensor | None = None  # (N, K, ...) fp32, of the steps
    velocities: Tensor | None = None  # (N, K, ...) fp32, that were predicted at `latents`
    advantages: Tensor | None = None  # (N,) or (N, K) fp32
    weights: Tensor | None = None  # (N,) or (N, K) fp32; 0: it is not trained
    uncertain: Tensor | None = None  # (N,) fp32; 1: its reward is not to be trusted

    def __len__(self) -> int:
        return len(self.batch)

    def on_host(self) -> Rollout:
        """Return a copy on the host, pinned."""
        return replace(self, **{name: on_host(value) for name, value in self._moved()})

    def to(self, device: torch.device) -> Rollout:
        return replace(self, **{n: v.to(device, non_blocking=True) for n, v in self._moved()})

    def _moved(self) -> Iterator[tuple[str, Tensor]]:
        """Give what is on the device while rows are drawn and trained."""
        for name in (f.name for f in fields(self) if f.name not in ("batch", "leaf", "parent")):
            if (value := getattr(self, name)) is not None:
                yield name, value

    def rows(self, rows: Rows) -> Rollout:
        """Return some rows: views of these where they are a slice."""
        return replace(_rows(self, rows), batch=self.batch.rows(rows))

    @staticmethod
    def cat(parts: list[Rollout]) -> Rollout:
        """Put parts together; an optional field that one of them lacks is left out."""
        num_steps = max(part.steps.shape[1] for part in parts)
        columns = {"batch": PromptBatch.cat([part.batch for part in parts])}
        for name in (f.name for f in fields(Rollout) if f.name != "batch"):
            values = [getattr(part, name) for part in parts]
            if name in PER_STEP:
                fill = -1 if name.endswith("steps") else 0
                values = [v if v is None else _widened(v, num_steps, fill) for v in values]
            columns[name] = None if any(v is None for v in values) else torch.cat(values)
        return Rollout(**columns)

    def at(self, name: str, column: int) -> Tensor:
        """Return `advantages` or `weights` (N,) at one of the steps, or what holds for all."""
        values = getattr(self, name)
        return values if values.ndim == 1 else values[:, column]


PER_STEP = ("steps", "next_steps", "latents", "next_latents", "log_probs", "means", "velocities")


@dataclass
class Point:
    """Where an objective needs the velocity of B rows."""

    latents: Tensor  # (B, ...) fp32
    sigma: Tensor  # (B,) fp32
    step: Tensor  # (B,) int64, the step index that the loss uses and statistics are kept under
    column: int = 0  # of the rollout's kept steps; or which of the fresh noisings
    noise: Tensor | None = None  # (B, ...) fp32, the x1 that noised the final latents

    def rows(self, rows: Rows) -> Point:
        return _rows(self, rows)

    @staticmethod
    def stacked(points: list[Point]) -> Point:
        """Put points of the same B rows behind each other, (P x B, ...), for one prediction."""
        if len(points) == 1:
            return points[0]
        latents, sigma, step = (
            torch.cat([getattr(point, name) for point in points])
            for name in ("latents", "sigma", "step")
        )
        return Point(latents, sigma, step)


@dataclass
class Loss:
    """What an objective returns for B rows of one Point."""

    value: Tensor  # (B,) unreduced
    stats: dict[str, Tensor]  # name -> (B,) detached; metrics have their mean, also by step


@dataclass
class RowTable:
    """What is known of all ranks' rows: rank after rank, each's in its rollout's order."""

    group: Tensor  # (N,) int64
    member: Tensor  # (N,) int64
    rank: Tensor  # (N,) int64
    leaf: Tensor  # (N,) bool
    parent: Tensor  # (N,) int64, row of this table; -1: none
    steps: Tensor  # (N, K) int64; -1 behind those of a row with fewer
    branch: Tensor  # (N,) int64, its number among those of its parent; -1: it is no branch
    scores: dict[str, Tensor] | None = None  # each reward's, (N,) fp64, NaN where missing
    sizes: Tensor | None = None  # (N,) int64, of Plan.sizes_of(); None: all have the same

    def __len__(self) -> int:
        return len(self.group)

    def of_rank(self, rank: int, chosen: Tensor | None = None) -> np.ndarray:
        """Return a rank's leaves, or of its rows those `chosen`, (N,) bool, as numbers."""
        chosen = self.leaf if chosen is None else chosen
        return torch.nonzero((self.rank == rank) & chosen).flatten().numpy()


@dataclass
class Arranged:
    """What is trained in an epoch, by whom, in which order."""

    updates: list[list[list[list[np.ndarray]]]]  # plan.Updates, equal calls on all ranks
    advantages: Tensor  # (N,) or (N, K) fp64
    weights: Tensor  # (N,) or (N, K) fp64; an update's loss is its mean weighted by these
    uncertain: Tensor | None = None  # (N,) fp64; 1: a row's reward is not to be trusted


def _rows(record: Rollout | Point, rows: Rows) -> Rollout | Point:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    chosen = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    return replace(record, **chosen)


def _widened(values: Tensor, num_columns: int, fill: int) -> Tensor:
    missing = num_columns - values.shape[1]
    behind = values.new_full((len(values), missing, *values.shape[2:]), fill)
    return torch.cat([values, behind], dim=1) if missing else values
