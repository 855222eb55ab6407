"""The records that travel from prompts to the loss. Every batched field has a row for an image."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Guidance:
    """How a velocity is guided. What the numbers mean, and which it takes, a model decides."""

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)  # of sigma, where guidance acts
    rescale: float = 0.0


@dataclass(eq=False)
class Cond:
    """The unpadded conditioning of one distinct (prompt, reference images)."""

    tensors: dict[
        str, Tensor
    ]  # without a batch dimension, on the CPU: embeddings, reference latents

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


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
        return replace(
            self,
            branches={
                name: [conds[i] for i in used.tolist()] for name, conds in self.branches.items()
            },
            index=index,
            owners=_chosen(self.owners, rows),
            prompts=_chosen(self.prompts, rows),
            metadata=_chosen(self.metadata, rows),
            references=self.references and _chosen(self.references, rows),
        )

    @staticmethod
    def cat(parts: list[PromptBatch]) -> PromptBatch:
        first = parts[0]
        counts = [len(part.branches["positive"]) for part in parts[:-1]]
        offsets = torch.tensor([0, *counts]).cumsum(0)
        return replace(
            first,
            branches={
                name: [cond for part in parts for cond in part.branches[name]]
                for name in first.branches
            },
            index=torch.cat([p.index + o for p, o in zip(parts, offsets.tolist(), strict=True)]),
            owners=[owner for part in parts for owner in part.owners],
            prompts=[prompt for part in parts for prompt in part.prompts],
            metadata=[row for part in parts for row in part.metadata],
            references=first.references and [row for part in parts for row in part.references],
        )


@dataclass
class Conditioning:
    """What a call of the model is conditioned on, on the device."""

    branches: dict[str, dict[str, Tensor]]  # rows (B, ...) by the branch's and the tensor's name
    guidance: Guidance
    size: Size

    def __getitem__(self, branch: str) -> dict[str, Tensor]:
        """Return a branch's rows. Fails, naming it, where the guidance needs one that is absent."""
        assert branch in self.branches, (
            f"{self.guidance} needs the branch {branch!r}; this conditioning has "
            f"{', '.join(self.branches)}"
        )
        return self.branches[branch]


@dataclass
class Rollout:
    """N denoised rows, one for each segment; those that were drawn whole are leaves.

    K is the number of stochastic steps whose states were kept, 0 where only `final` is. A row with
    fewer than another has zeros behind its own.
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

    def __len__(self) -> int:
        return len(self.batch)

    def rows(self, rows: Rows) -> Rollout:
        """Return some rows: views of these where they are a slice."""
        tensors = {
            f.name: value[rows]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, batch=self.batch.rows(rows), **tensors)

    @staticmethod
    def cat(parts: list[Rollout]) -> Rollout:
        """Put parts together; an optional field that one of them lacks is left out."""
        num_steps = max(part.steps.shape[1] for part in parts)
        columns: dict[str, Tensor | None] = {}
        for f in fields(Rollout):
            values = [getattr(part, f.name) for part in parts]
            if f.name != "batch":
                present = all(isinstance(value, Tensor) for value in values)
                wide = f.name in PER_STEP
                values = [_widened(v, num_steps) if wide and present else v for v in values]
                columns[f.name] = torch.cat(values) if present else None
        return Rollout(batch=PromptBatch.cat([part.batch for part in parts]), **columns)

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
        """Return it for some rows."""
        noise = None if self.noise is None else self.noise[rows]
        return replace(
            self,
            latents=self.latents[rows],
            sigma=self.sigma[rows],
            step=self.step[rows],
            noise=noise,
        )


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
    steps: Tensor  # (N, K) int64

    def __len__(self) -> int:
        return len(self.group)

    def of_rank(self, rank: int) -> np.ndarray:
        """Return the leaves of a rank, row numbers of this table."""
        return torch.nonzero((self.rank == rank) & self.leaf).flatten().numpy()


@dataclass
class Arranged:
    """What is trained in an epoch, by whom, in which order."""

    updates: list[list[list[list[np.ndarray]]]]  # plan.Updates, equal calls on all ranks
    advantages: Tensor  # (N,) or (N, K) fp64
    weights: Tensor  # (N,) or (N, K) fp64; an update's loss is its mean weighted by these


def _chosen(items: list, rows: Rows) -> list:
    return items[rows] if isinstance(rows, slice) else [items[i] for i in rows.tolist()]


def _widened(values: Tensor, num_columns: int) -> Tensor:
    """Append columns of zeros."""
    missing = num_columns - values.shape[1]
    if not missing:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)
