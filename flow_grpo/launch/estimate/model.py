"""A run's model without its weights: the real classes, of tensors that hold no numbers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from flow_grpo.conditioning import guidances
from flow_grpo.diffusers_patch.disk.released import RELEASED, Released
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.diffusers_patch.weights import ENCODERS
from flow_grpo.evaluation.evaluate import sizes
from flow_grpo.inputs import json_object
from flow_grpo.launch import build, encoders, model_files, space
from flow_grpo.launch.estimate.live import AsOnGPU, Live
from flow_grpo.parallel import speed
from flow_grpo.plan import Plan
from flow_grpo.records import Conditioning, Guidance, Size

MODE = FakeTensorMode(allow_non_fake_inputs=True)
WIDTHS = ("joint_attention_dim", "text_dim", "cap_feat_dim")  # of text, in a transformer's config


def describe(config: ConfigDict) -> tuple[Released, str]:
    """Return what config.pretrained.model says of itself, and where that stands.

    Raises ValueError if it is neither on this machine nor among the released ones, or no family's.
    """
    name = config.pretrained.model
    needed = ("model_index.json", "transformer/config.json", "vae/config.json")
    index, *others = (model_files.file_of(config, file) for file in needed)
    here = index is not None and None not in others
    if name in RELEASED and not (here and Path(name).is_dir()):
        return RELEASED[name], f"{name} as it was released"
    if not here:
        raise ValueError(
            f"config.pretrained.model={name!r} is no stock pipeline here, and its sizes are not "
            f"known. Name a folder with {', '.join(needed)}, or one of {', '.join(RELEASED)}."
        )
    found, folder = json_object(index), index.parent
    parts = [part for part, each in found.items() if part.startswith(ENCODERS[0]) and any(each)]
    return Released(
        model_files.family(config).stock_name(),
        *(json_object(folder / part / "config.json") for part in ("transformer", "vae")),
        encoders={
            part: sum(map(math.prod, space.shapes_of(folder / part).values())) for part in parts
        },
        scheduler=json_object(folder / "scheduler" / "scheduler_config.json"),
        settings=found,
    ), str(folder)


@dataclass(frozen=True)
class Peaks:
    """Bytes above what lasts, in each phase of an epoch."""

    sampling: int
    decoding: int
    update: int  # without the gradients of what trains
    calls: int  # of the transformer for a guided velocity


class Fake:
    """A pipeline and what trains of it, in the types in which a run has them; no numbers."""

    def __init__(self, config: ConfigDict, described: Released, plan: Plan, casts_trained: bool):
        """casts_trained: what trains is of the type that is computed with, not fp32."""
        family, self.dtype = FAMILIES[described.pipeline], encoders.DTYPES[config.mixed_precision]
        prompts, self.config = plan.train_prompts + plan.eval_prompts, config
        self.num_references = max(len(prompt.images) for prompt in prompts)
        self.size = max((prompt.size for prompt in plan.train_prompts), key=Size.area)
        self.drawn = {self.size, *(sizes(config) or [each.size for each in plan.eval_prompts])}
        dtype = self.dtype if config.use_lora or casts_trained else torch.float32
        pipeline = self.pipeline = family.blank(described, dtype)
        pipeline.check_size(self.size)
        pipeline.reference_area = encoders.reference_area(config, family)
        pipeline.batches_guidance = config.sample.batched_guidance
        pipeline.cut_decoding(config.vae_tiling, config.vae_slicing)
        own = config.copy_and_resolve_references()
        own.train.lora_path = ""  # an adapter of the same rank, maybe of other modules
        with torch.device("meta"):
            build.add_trained_weights(pipeline, own)
        speed.leave_casts_to_autocast(pipeline.transformer)
        for module in pipeline.modules():
            _fill(module, self.dtype if casts_trained else None)
        pipeline.input_dtype = pipeline.transformer.dtype

    def count(self, trained: bool) -> int:
        """Count the transformer's elements that train, or that do not, buffers among them."""
        transformer = self.pipeline.transformer
        params = sum(p.numel() for p in transformer.parameters() if p.requires_grad == trained)
        return params + (0 if trained else sum(b.numel() for b in transformer.buffers()))

    def largest_block(self) -> int:
        blocks = speed.repeated_blocks(self.pipeline.transformer)
        return max(sum(param.numel() for param in block.parameters()) for block in blocks)

    def merged(self) -> int:
        """Count the bytes of the weights that a rollout holds twice."""
        if not self.config.sample.merged_lora:
            return 0
        named = self.pipeline.transformer.named_parameters()
        return sum(each.nbytes for name, each in named if name.endswith(".base_layer.weight"))

    def peaks(self, autocasts: bool, on_gpu: bool) -> Peaks:
        """Run each phase once, with the run's largest calls."""
        sample, train, pipeline = self.config.sample, self.config.train, self.pipeline
        guidance, eval_guidance, _ = guidances(self.config)
        micro = sample.train_batch_size if train.batch_size is None else train.batch_size
        decoded = max(sample.train_batch_size, sample.test_batch_size)
        trained_with = guidance if train.cfg else pipeline.unguided
        autocasts = autocasts and self.dtype != torch.float32
        calls: list[int] = []
        precision = AsOnGPU if on_gpu else nullcontext

        def checkpointed(block: nn.Module, *inputs: object) -> object:
            # A backward pass, which runs it again, leaves the mode behind.
            again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), precision())}
            return checkpoint(block, *inputs, **again)

        def predict(num_rows: int, guidance: Guidance, size: Size = self.size) -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=autocasts):
                return self._velocity(num_rows, guidance, size)

        def decode() -> None:
            for size in self.drawn:
                pipeline.decode(self._latents(decoded, size), size)

        def evaluate() -> None:
            for size in self.drawn:
                predict(sample.test_batch_size, eval_guidance, size)

        def update() -> None:
            velocity = predict(micro * train.stacked_points, trained_with)
            velocity.square().mean().backward()

        if self.config.activation_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing(checkpointed)
        tensors = [t for m in pipeline.modules() for t in (*m.parameters(), *m.buffers())]
        with MODE:
            for param in pipeline.transformer.parameters():
                param.grad = torch.zeros_like(param) if param.requires_grad else None
            with Live(tensors) as live, precision():
                with torch.no_grad():
                    hook = pipeline.transformer.register_forward_pre_hook(
                        lambda *_: calls.append(1)
                    )
                    sampling = live.rise(lambda: predict(sample.train_batch_size, guidance))
                    hook.remove()
                    other = live.rise(evaluate)
                    decoding = live.rise(decode)
                sampling, decoding = sampling + self.merged(), decoding + self.merged()
                return Peaks(max(sampling, other), decoding, live.rise(update), len(calls))

    def _velocity(self, num_rows: int, guidance: Guidance, size: Size) -> Tensor:
        rows, pipeline = self._conditioning(num_rows), self.pipeline
        names = ("positive", "negative") if pipeline.needs_negative(guidance) else ("positive",)
        conditioning = Conditioning(dict.fromkeys(names, rows), guidance, size)
        latents, sigma = self._latents(num_rows, size), torch.ones(num_rows)
        return pipeline.velocity(pipeline.transformer, latents, sigma, conditioning)

    def _latents(self, num_rows: int, size: Size) -> Tensor:
        noise = torch.zeros(num_rows, *self.pipeline.noise_shape(size))
        return self.pipeline.initial_latents(size, noise)

    def _conditioning(self, num_rows: int) -> dict[str, Tensor]:
        """Return rows of the longest prompts, as wide as the transformer's config says."""
        wanted, pipeline = self.pipeline.transformer.config, self.pipeline
        width = next(filter(None, (wanted.get(key) for key in WIDTHS)))
        tokens = self.config.max_sequence_length + pipeline.num_clip_tokens
        found = {"embeds": torch.zeros(num_rows, tokens, width, dtype=self.dtype)}
        if pooled := wanted.get("pooled_projection_dim"):
            found["pooled"] = torch.zeros(num_rows, pooled, dtype=self.dtype)
        if pipeline.ragged_text:
            with unset_fake_temporarily():  # it is read, so these are numbers
                found["lengths"] = torch.full((num_rows,), tokens)
        side = math.isqrt(pipeline.reference_area) // 16 * 16
        shape = pipeline.noise_shape(Size(side, side))
        for number in range(self.num_references):
            found[f"reference_{number}"] = torch.zeros(num_rows, *shape)
        return found


def _fill(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Put fake tensors in place of those on no device. dtype: of what trains, if it is cast."""
    with MODE:
        for each in module.modules():
            for name, param in each._parameters.items():
                if param is not None:
                    kind = dtype if dtype and param.requires_grad else param.dtype
                    fake = nn.Parameter(torch.empty(param.shape, dtype=kind), param.requires_grad)
                    each._parameters[name] = fake
            for values in (each._buffers, vars(each)):
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.is_meta:
                        values[name] = torch.empty(value.shape, dtype=value.dtype)
