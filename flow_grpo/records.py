"""The records that travel from prompts to the loss. Every batched field is a row a picture."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """What one call generates, in pixels and frames."""

    height: int
    width: int
    num_frames: int = 1


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

    conds: list[Cond]  # distinct
    negatives: list[Cond] | None  # beside conds; None: the model needs none
    index: Tensor  # (B,) int64 into conds
    group: Tensor  # (B,) int64, slot of the prompt in the epoch
    member: Tensor  # (B,) int64, 0 ... group size - 1
    size: Size
    prompts: list[str]  # B
    metadata: list[dict]  # B
    references: list[tuple] | None = None  # B tuples of uint8 (H, W, 3) images

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: slice) -> PromptBatch:
        used, index = torch.unique(self.index[rows], return_inverse=True)
        return replace(
            self,
            conds=[self.conds[i] for i in used.tolist()],
            negatives=self.negatives and [self.negatives[i] for i in used.tolist()],
            index=index,
            group=self.group[rows],
            member=self.member[rows],
            prompts=self.prompts[rows],
            metadata=self.metadata[rows],
            references=self.references and self.references[rows],
        )

    @staticmethod
    def cat(parts: list[PromptBatch]) -> PromptBatch:
        first = parts[0]
        offsets = torch.tensor([0, *(len(part.conds) for part in parts[:-1])]).cumsum(0)
        return replace(
            first,
            conds=[cond for part in parts for cond in part.conds],
            negatives=first.negatives and [cond for part in parts for cond in part.negatives],
            index=torch.cat([p.index + o for p, o in zip(parts, offsets.tolist(), strict=True)]),
            group=torch.cat([part.group for part in parts]),
            member=torch.cat([part.member for part in parts]),
            prompts=[prompt for part in parts for prompt in part.prompts],
            metadata=[row for part in parts for row in part.metadata],
            references=first.references and [row for part in parts for row in part.references],
        )


@dataclass
class Rollout:
    """N sampled rows. K is the number of trained steps; it is 0 where only `final` is kept."""

    batch: PromptBatch
    steps: Tensor  # (N, K) int64, ascending step indices
    latents: Tensor  # (N, K, ...) fp32, the state before each trained step
    next_latents: Tensor  # (N, K, ...) fp32, the state after it
    log_probs: Tensor  # (N, K) fp32
    final: Tensor  # (N, ...) fp32, at sigma 0
    images: list = field(default_factory=list)  # N uint8 (H, W, 3) or (F, H, W, 3), until scored
    advantages: Tensor | None = None  # (N,) fp32
    weights: Tensor | None = None  # (N,) fp32; 0: the row is not trained

    def __len__(self) -> int:
        return len(self.batch)

    def rows(self, rows: slice) -> Rollout:
        tensors = {
            f.name: value[rows]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, batch=self.batch.rows(rows), images=self.images[rows], **tensors)

    @staticmethod
    def cat(parts: list[Rollout]) -> Rollout:
        tensors = {
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(Rollout)
            if isinstance(getattr(parts[0], f.name), Tensor)
        }
        return replace(
            parts[0],
            batch=PromptBatch.cat([part.batch for part in parts]),
            images=[image for part in parts for image in part.images],
            **tensors,
        )


@dataclass
class Point:
    """Where an objective needs the velocity of B rows."""

    latents: Tensor  # (B, ...) fp32
    sigma: Tensor  # (B,) fp32
    step: Tensor  # (B,) int64, the step index that the loss uses and statistics are kept under
    column: int = 0  # of the rollout's trained steps; or which of the fresh noisings
    noise: Tensor | None = None  # (B, ...) fp32, the x1 that noised the final latents


@dataclass
class Loss:
    """What an objective returns for B rows of one Point."""

    value: Tensor  # (B,) unreduced
    stats: dict[
        str, Tensor
    ]  # name -> (B,) detached, averaged over rows, and by step, in the metrics
