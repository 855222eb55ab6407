"""Encode each distinct (prompt, reference images) once; keep the result in memory or on disk."""

import hashlib
import json
import os
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ml_collections
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.records import Cond, Conditioning, Guidance, PromptBatch


class Item(NamedTuple):
    """What is encoded: a prompt, or what guidance subtracts, with its reference images."""

    prompt: str | None  # None: what guidance subtracts
    image_paths: tuple[str, ...] = ()


class Store:
    """Conditionings on disk, each named by a hash of identity, prompt, and reference images."""

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        self.identity = identity

    def path(self, item: Item) -> Path:
        images = [_digest(path) for path in item.image_paths]
        whole = self.identity | {"prompt": item.prompt, "images": images}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def holds(self, item: Item) -> bool:
        """Whether the item's file is there and whole: its header must fit its length."""
        try:
            with safe_open(self.path(item), "pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def load(self, item: Item) -> Cond:
        """Read what save() wrote. Raises RuntimeError naming the file if it can't be read."""
        path = self.path(item)
        try:
            return Cond(load_file(path))
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"{path}, the conditioning of {item.prompt!r}, can't be read ({error}). Delete it: "
                f"the next start encodes it again."
            ) from error

    def save(self, item: Item, cond: Cond) -> None:
        """Write a conditioning so that a kill midway leaves none."""
        path = self.path(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        tensors = {name: tensor.contiguous() for name, tensor in cond.tensors.items()}
        save_file(tensors, aside, metadata={"prompt": repr(item.prompt)})
        os.replace(aside, path)


class Conditioner:
    """Encodes prompts one at a time, so that an embedding depends on nothing beside its prompt.

    The latest stay on the CPU, up to `cache_bytes`. A store must hold all that is asked for.
    offload: the text encoders are on the device only from the first new prompt to rest().
    """

    def __init__(
        self,
        pipeline: PatchedPipeline,
        max_length: int,
        cache_bytes: int = 2**31,
        store: Store | None = None,
        offload: bool = False,
    ):
        self.pipeline = pipeline
        self.max_length = max_length
        self.cache_bytes = cache_bytes
        self.store = store
        self.offload = offload
        self._cache: OrderedDict[Item, Cond] = OrderedDict()
        self._held_bytes = 0
        self._awake = True  # the encoders are on the device
        self.num_encoded = 0

    def cond(self, item: Item, images: tuple) -> Cond:
        """Return an item's conditioning. images: those that its paths name, uint8 (H, W, 3)."""
        if item not in self._cache:
            self._cache[item] = self.store.load(item) if self.store else self._encode(item, images)
            self._held_bytes += self._cache[item].num_bytes()
        self._cache.move_to_end(item)
        while self._held_bytes > self.cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._held_bytes -= oldest.num_bytes()
        return self._cache[item]

    def branches(
        self, rows: list[tuple[str, tuple, tuple]], *guidances: Guidance | None
    ) -> dict[str, list[Cond]]:
        """Encode rows, each (prompt, paths of its reference images, these), for a PromptBatch."""
        branches = {"positive": [self.cond(Item(*row[:2]), row[2]) for row in rows]}
        if any(each and self.pipeline.needs_negative(each) for each in guidances):
            branches["negative"] = [self.cond(Item(None, row[1]), row[2]) for row in rows]
        return branches

    def rest(self) -> None:
        """Send the encoders back to the CPU if they are to be there while nobody needs them."""
        if self.offload and self._awake:
            self.pipeline.move_encoders("cpu")
            self._awake = False

    def _encode(self, item: Item, images: tuple) -> Cond:
        if not self._awake:
            self.pipeline.move_encoders(self.pipeline.device)
            self._awake = True
        self.num_encoded += 1
        if item.prompt is None:
            return self.pipeline.negative(images, self.max_length)
        return self.pipeline.encode(item.prompt, images, self.max_length)


def collate(pipeline: PatchedPipeline, batch: PromptBatch, pad_to: int) -> Conditioning:
    """Return what a call of the model needs of a batch: rows (B, ...) of each branch."""
    branches = {}
    for branch, conds in batch.branches.items():
        distinct = pipeline.collate(conds, pad_to)
        branches[branch] = {n: value[batch.index.to(value.device)] for n, value in distinct.items()}
    return Conditioning(branches, batch.guidance, batch.size)


class Guidances(NamedTuple):
    """How a run's velocities are guided."""

    training: Guidance
    evaluation: Guidance
    reference: Guidance | None  # None: as training


def guidances(config: ml_collections.ConfigDict) -> Guidances:
    scale, eval_scale = config.sample.guidance_scale, config.sample.eval_guidance_scale
    reference, interval = config.train.reference_guidance, tuple(config.sample.guidance_interval)
    return Guidances(
        training=Guidance(scale, interval),
        evaluation=Guidance(scale if eval_scale is None else eval_scale, interval),
        reference=None if reference is None else Guidance(reference, interval),
    )


@lru_cache(maxsize=4096)
def _digest(path: str) -> str:
    # The word for how inputs.picture shows it: what was encoded before it turned images is stale.
    return hashlib.sha256(b"as seen" + Path(path).read_bytes()).hexdigest()
