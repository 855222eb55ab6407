"""Encode each distinct (prompt, reference images) once and keep the result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.rollout import Cond, PromptBatch


class Conditioner:
    """Encodes prompts one at a time, so that an embedding depends on nothing beside its prompt.

    The most recently used ones stay on the CPU, up to `cache_bytes`.
    """

    def __init__(self, pipeline: PatchedPipeline, max_length: int, cache_bytes: int = 2**31):
        self.pipeline = pipeline
        self.max_length = max_length
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[Hashable, Cond] = OrderedDict()
        self._held_bytes = 0
        self.num_encoded = 0

    def cond(self, prompt: str, image_paths: tuple, images: tuple) -> Cond:
        """Return the conditioning of a prompt. image_paths name `images` in the cache."""
        return self._cached(
            ("prompt", prompt, image_paths),
            lambda: self.pipeline.encode([prompt], [images], self.max_length)[0],
        )

    def negative(self, image_paths: tuple, images: tuple) -> Cond:
        """Return what guidance subtracts for a prompt with these reference images."""
        return self._cached(
            ("negative", image_paths), lambda: self.pipeline.negative(images, self.max_length)
        )

    def _cached(self, key: Hashable, encode) -> Cond:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        cond = self._cache[key] = encode()
        self.num_encoded += 1
        self._held_bytes += cond.num_bytes()
        while self._held_bytes > self.cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._held_bytes -= oldest.num_bytes()
        return cond


def collate(
    pipeline: PatchedPipeline, batch: PromptBatch, pad_to: int
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the conditioning and negative rows (B, ...) of a batch, on the device."""
    index = batch.index.to(pipeline.device)

    def rows(conds: list[Cond]) -> dict[str, Tensor]:
        return {k: v[index] for k, v in pipeline.collate(conds, pad_to).items()}

    return rows(batch.conds), rows(batch.negatives) if batch.negatives else None
