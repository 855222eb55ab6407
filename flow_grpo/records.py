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
            branches={
                name: [conds[i] for i in used.tolist()] for name, conds in self.branches.items()
            },
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
        counts = [len(part.branches["positive"]) for part in parts[:-1]]
        offsets = torch.tensor([0, *counts]).cumsum(0)
        return replace(
            first,
            branches={
                name: [cond for part in parts for cond in part.branches[name]]
                for name in first.branches
            },
            index=torch.cat([p.index + o for p, o in zip(parts, offsets.tolist(), strict=True)]),
            group=torch.cat([part.group for part in parts]),
            member=torch.cat([part.member for part in parts]),
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
