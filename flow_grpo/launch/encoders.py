"""Load a model with its text encoders, or encode every prompt once and go without them."""

from __future__ import annotations

from pathlib import Path

import torch
from ml_collections import ConfigDict

from flow_grpo.cli import make_writable, progress
from flow_grpo.conditioning import Conditioner, Item, Store, guidances
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.parallel.engine import Ranks
from flow_grpo.prompts import Prompt

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(
    config: ConfigDict,
    family: type[PatchedPipeline],
    prompts: list[Prompt],
    ranks: Ranks,
    transformer_waits: bool = False,
) -> PatchedPipeline:
    """Load the model onto the device; every rank must call it.

    transformer_waits: on the host, from where the engine takes it in parts.
    config.encoders=precompute: if any prompt is not on disk yet, each rank encodes its share, on
    the device, while the transformer is on the CPU. A damaged file counts as none.
    Raises ValueError if a rank can't write there, or does not see what another one wrote.
    """
    if config.encoders != "precompute":
        return _load(config, family, ranks.device, transformer_waits)
    held, items = store(config, family), _items(config, family, prompts)
    mine = list(items)[ranks.rank :: ranks.num_ranks]
    missing = {item: items[item] for item in mine if not held.holds(item)}
    if not any(ranks.gather_objects(len(missing))):
        return _load(config, family, ranks.device, transformer_waits, encoders=False)
    make_writable(held.folder, "config.encoder_cache")
    pipeline = _load(config, family, ranks.device, transformer_waits=True)
    for item in missing:
        damaged = held.path(item)
        if damaged.exists():
            print(f"{damaged} is damaged; its prompt is encoded again.", flush=True)
    ranks.watch.phase = "encode"
    _precompute(pipeline, held, missing, config.max_sequence_length, ranks.is_main)
    ranks.watch.phase = "load"
    pipeline.drop_encoders()
    if not transformer_waits:
        pipeline.move(ranks.device)
    ranks.barrier()
    if not all(held.path(item).exists() for item in items):
        raise ValueError(
            f"config.encoder_cache: {held.folder} does not hold what other ranks wrote. A folder "
            f"that all machines share is needed; set config.encoder_cache to one."
        )
    return pipeline


def conditioner(config: ConfigDict, pipeline: PatchedPipeline) -> Conditioner:
    """Return what encodes prompts as config.encoders wants it."""
    precomputed = config.encoders == "precompute"
    return Conditioner(
        pipeline,
        config.max_sequence_length,
        store=store(config, type(pipeline)) if precomputed else None,
        offload=config.encoders == "offload",
    )


def store(config: ConfigDict, family: type[PatchedPipeline]) -> Store:
    """Return where conditionings are kept. family: the class of the checkpoint (variant())."""
    folder, model = config.encoder_cache, config.pretrained.model
    return Store(
        Path(folder) if folder else Path(config.logdir) / "conditionings",
        {
            "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
            "revision": config.pretrained.revision,
            "pipeline": family.stock_name(),
            "negative_prompt": family.negative_prompt,
            "precision": config.mixed_precision,
            "max_sequence_length": config.max_sequence_length,
            "reference_area": reference_area(config, family),
        },
    )


def reference_area(config: ConfigDict, family: type[PatchedPipeline]) -> int:
    """Return the pixels of a reference image as the model sees it."""
    if config.reference_area or not family.enlarges_references:
        return config.reference_area or family.reference_area
    return (config.height or config.resolution) * (config.width or config.resolution)


def _load(
    config: ConfigDict,
    family: type[PatchedPipeline],
    device: torch.device,
    transformer_waits: bool,
    encoders: bool = True,
) -> PatchedPipeline:
    dtype = DTYPES[config.mixed_precision]
    pipeline = family.from_pretrained(
        config.pretrained.model,
        dtype=dtype,
        transformer_dtype=dtype if config.use_lora else torch.float32,
        device=torch.device("cpu") if transformer_waits else device,
        revision=config.pretrained.revision,
        encoders=encoders,
    )
    pipeline.move_vae(device)
    pipeline.move_encoders(device)
    pipeline.reference_area = reference_area(config, family)
    return pipeline


def _items(
    config: ConfigDict, family: type[PatchedPipeline], prompts: list[Prompt]
) -> dict[Item, Prompt]:
    """List what the run will ask for, and a prompt that holds its images."""
    items = {}
    guided = any(each and family.may_need_negative(each) for each in guidances(config))
    for prompt in prompts:
        items[Item(prompt.text, prompt.images)] = prompt
        if guided:
            items.setdefault(Item(None, prompt.images), prompt)
    return items


@torch.no_grad()
def _precompute(
    pipeline: PatchedPipeline, held: Store, items: dict[Item, Prompt], max_length: int, shown: bool
) -> None:
    encoder = Conditioner(pipeline, max_length, cache_bytes=0)
    bar = progress(len(items), "encode prompts", shown=shown)
    for item, prompt in items.items():
        held.save(item, encoder.cond(item, prompt.load_images()))
        bar.update()
    bar.close()
