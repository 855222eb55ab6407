"""Put a run, or an evaluation alone, together from a checked config: load the model, wrap it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
)
from ml_collections import ConfigDict
from torch import nn

from config.base import base, with_objective
from flow_grpo.cli import redacted
from flow_grpo.conditioning import guidances
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.evaluate import Evaluator, sizes
from flow_grpo.launch import encoders, quiet
from flow_grpo.launch.weights import Weights
from flow_grpo.objectives.registry import anywhere, copies, find
from flow_grpo.parallel import choose, speed
from flow_grpo.parallel.engine import Engine
from flow_grpo.parallel.faults.stop import Stop
from flow_grpo.plan import Plan, size_of
from flow_grpo.prompts import Prompt
from flow_grpo.records import Size
from flow_grpo.rewards.combine import Scorer
from flow_grpo.sampling import Schedule, grids
from flow_grpo.training import checkpoint, optimizer
from flow_grpo.training.claim import Claim
from flow_grpo.training.optimizer import Updater
from flow_grpo.training.run import Run
from flow_grpo.training.snapshots import Snapshots
from flow_grpo.training.tracking import Tracker


def build(
    config: ConfigDict,
    plan: Plan,
    family: type[PatchedPipeline],
    identity: dict,
    resume_from: Path | None,
    engine: Engine,
    claim: Claim,
) -> Run:
    """Load the model and put a run together; nothing is written before all of it has worked."""
    objective_class = find(config.objective)
    pipeline, size = load(config, family, plan.train_prompts + plan.eval_prompts, engine)
    drawn = dict.fromkeys(prompt.size or size for prompt in plan.train_prompts)
    sigmas, of_size = grids(pipeline, config.sample.num_steps, drawn)
    schedule = Schedule(
        sigmas=sigmas,
        of_size=of_size,
        kind=config.sample.sde_type,
        noise_level=config.sample.noise_level,
        same_latent=config.sample.same_latent,
        pad_to=config.max_sequence_length,
        solver=config.sample.solver,
    )
    objective = objective_class(config, schedule)
    add_trained_weights(pipeline, config)
    speed.leave_casts_to_autocast(pipeline.transformer)
    if config.compile:
        speed.compile_blocks(pipeline.transformer)
    params = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    engine.wrap(
        pipeline.transformer, optimizer.build(params, config.train), config.train.max_grad_norm
    )
    pipeline.input_dtype = pipeline.transformer.dtype  # its frozen weights'; fp32 where all train
    held = copies(objective, config)
    total_updates = config.num_epochs * config.train.num_inner_epochs * plan.num_updates
    run = Run(
        config=config,
        plan=plan,
        identity=identity,
        folder=claim.folder,
        evaluator=_evaluator(config, engine, engine.model, pipeline, size, plan.eval_prompts),
        schedule=schedule,
        guidance=guidances(config).training,
        reference_guidance=guidances(config).reference,
        objective=objective,
        engine=engine,
        updater=Updater(engine, config.train, total_updates),
        snapshots=Snapshots(engine, held, config.use_lora, "snapshots" in config.offload),
        tracker=Tracker(engine.ranks, claim.folder),
        claim=claim,
    )
    if resume_from is None:
        run.tracker.cut(0)  # of a run that ended before its first checkpoint
    else:
        checkpoint.load(run, resume_from)
    run.tracker.start(config)
    run.tracker.write("run.json", _about(config.objective))
    return run


def build_evaluator(
    config: ConfigDict, family: type[PatchedPipeline], weights: Weights, prompts: list[Prompt]
) -> Evaluator:
    """Load a model and what was trained, in the precision that config.use_lora trains it in.

    Raises ValueError if the weights do not fit the model, or it does not suit the prompts.
    """
    engine = start(config, family, prompts)
    pipeline, size = load(config, family, prompts, engine)
    if weights.kind == "lora":
        pipeline.load_lora(str(weights.path))
    elif weights.kind == "transformer":
        pipeline.load_transformer(weights.path)
    pipeline.input_dtype = pipeline.transformer.dtype
    model = engine.wrap_frozen(pipeline.transformer)
    return _evaluator(config, engine, model, pipeline, size, prompts)


def _evaluator(
    config: ConfigDict,
    engine: Engine,
    model: nn.Module,
    pipeline: PatchedPipeline,
    size: Size,
    prompts: list[Prompt],
) -> Evaluator:
    """model: the transformer, wrapped."""
    drawn = sizes(config) or dict.fromkeys(prompt.size or size for prompt in prompts)
    sigmas, of_size = grids(pipeline, config.sample.eval_num_steps, drawn)
    return Evaluator(
        config=config,
        ranks=engine.ranks,
        pipeline=pipeline,
        model=model,
        size=size,
        schedule=Schedule(sigmas, pad_to=config.max_sequence_length, of_size=of_size),
        guidance=guidances(config).evaluation,
        conditioner=encoders.conditioner(config, pipeline),
        scorer=Scorer.of(config, str(engine.ranks.device)),
        stop=Stop(engine.ranks),
    )


def _about(objective: str) -> dict:
    """What the report must be told of a run, for it knows neither objectives nor their keys."""
    statistics = {name: each._asdict() for name, each in find(objective).statistics.items()}
    defaults = with_objective(base(), objective)
    return {
        "statistics": statistics,
        "defaults": redacted(json.loads(defaults.to_json_best_effort())),
    }


def start(config: ConfigDict, family: type[PatchedPipeline], prompts: list[Prompt]) -> Engine:
    """Meet the other ranks, if the model's class suits the config. Raises ValueError."""
    family = family.variant(config.pretrained.model, config.pretrained.revision)
    family.check_prompts(prompts)
    for num_frames in (config.num_frames, *(size.num_frames for size in sizes(config))):
        family.check_num_frames(num_frames)
    _of_prompts(prompts, lambda size: family.check_num_frames(size.num_frames))
    for guidance in filter(None, guidances(config)):
        family.check_guidance(guidance)
    _check_attention_backend(config.attention_backend, family)
    _check_limits(config, family)
    engine = _start(config)
    if engine.cuts_weights and config.sample.merged_lora:
        raise ValueError(
            f"config.sample.merged_lora=True: ZeRO-3 and FSDP cut the weights in parts, so that no "
            f"LoRA is added to them. Set it to False, or launch with --config_file {choose.WHOLE}."
        )
    if engine.cuts_weights and family.reads_by_transformer:
        raise ValueError(
            f"{family.__name__} reads prompts by its transformer, but ZeRO-3 and FSDP cut that in "
            f"parts. Launch it with --config_file {choose.WHOLE}."
        )
    return engine


def load(
    config: ConfigDict, family: type[PatchedPipeline], prompts: list[Prompt], engine: Engine
) -> tuple[PatchedPipeline, Size]:
    """Load the model, as yet without what trains. Raises ValueError if it does not suit."""
    family = family.variant(config.pretrained.model, config.pretrained.revision)
    quiet.say_once()
    engine.ranks.watch.phase = "load"
    pipeline = encoders.load_pipeline(
        config, family, prompts, engine.ranks, transformer_waits=engine.cuts_weights
    )
    size = size_of(config)
    pipeline.check_size(size)
    _of_prompts(prompts, pipeline.check_size)
    for each in sizes(config):
        try:
            pipeline.check_size(each)
        except ValueError as error:
            given = tuple(config.sample.eval_sizes)
            raise ValueError(f"config.sample.eval_sizes={given}: {error}") from None
    pipeline.batches_guidance = config.sample.batched_guidance
    pipeline.clean_grid = config.sample.clean_grid
    if config.attention_backend:
        pipeline.transformer.set_attention_backend(config.attention_backend)
    pipeline.cut_decoding(config.vae_tiling, config.vae_slicing)
    return pipeline, size


def _of_prompts(prompts: list[Prompt], check: Callable[[Size], None]) -> None:
    """Check each size that a prompt has; an error names the first one's line."""
    first = {prompt.size: prompt.where for prompt in reversed(prompts) if prompt.size}
    for size, where in first.items():
        try:
            check(size)
        except ValueError as error:
            raise ValueError(f'{where}: "size" is {size}: {error}') from None


def add_trained_weights(pipeline: PatchedPipeline, config: ConfigDict) -> None:
    """Add a LoRA, or let the whole transformer train; in fp32, unless the engine casts it."""
    transformer, train = pipeline.transformer, config.train
    if config.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    if not config.use_lora:
        for name, param in transformer.named_parameters():
            param.requires_grad_(pipeline.trains(name))
        return
    if train.lora_path:
        pipeline.load_lora(train.lora_path, train.lora_rank, train.lora_alpha)
    else:
        targets = list(train.lora_targets) or list(pipeline.lora_target_modules)
        torch.manual_seed(config.seed)
        pipeline.add_lora(train.lora_rank, train.lora_alpha, targets)
    for name, param in transformer.named_parameters():
        param.requires_grad_("lora_" in name and pipeline.trains(name))


def _check_limits(config: ConfigDict, family: type[PatchedPipeline]) -> None:
    try:
        family.check_targets(config.train.lora_targets)
    except ValueError as error:
        given = tuple(config.train.lora_targets)
        raise ValueError(f"config.train.lora_targets={given}: {error}") from None
    if config.train.reference_guidance is not None:
        if "reference" not in anywhere(config).snapshots:
            raise ValueError(
                f"config.train.reference_guidance={config.train.reference_guidance}: "
                f"config.objective={config.objective} has no reference here. Give its KL a weight, "
                f"or leave this out."
            )
    if config.compile and not family.compiles:
        raise ValueError(
            f"config.compile=True: {family.__name__}'s prompts are not padded, so each length is a "
            f"shape to be compiled anew. Set it to False."
        )
    if family.reads_by_transformer and config.encoders != "keep":
        raise ValueError(
            f"config.encoders={config.encoders!r}: {family.__name__} has no text encoder to send "
            f"away, its transformer reads the prompts, and needs all of itself at each step. Set "
            f"config.encoders='keep'; each prompt is read once, as with other models."
        )


def _check_attention_backend(name: str, family: type[PatchedPipeline]) -> None:
    if name and not family.has_attention_backends:
        raise ValueError(
            f"config.attention_backend={name!r}: {family.__name__} has no choice, diffusers gives "
            f"it torch's attention. Leave it empty."
        )
    known = [backend.value for backend in AttentionBackendName]
    if name and name not in known:
        raise ValueError(
            f"config.attention_backend={name!r}: one of diffusers' is needed: {', '.join(known)}; "
            f"or leave it empty for its default."
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(name or "native"))
    except RuntimeError as error:
        raise ValueError(f"config.attention_backend={name!r} can't be used here: {error}") from None


def _start(config: ConfigDict) -> Engine:
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(
            "config.mixed_precision=fp16 needs a GPU. Set config.mixed_precision=bf16 or no."
        )
    if config.train.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise ValueError(
            "config.train.use_8bit_adam=True needs the package bitsandbytes: "
            "pip install bitsandbytes, or set it to False."
        )
    engine = choose.start(config.mixed_precision, config.compile, config.collective_timeout)
    engine.ranks.watch.begin(engine.cuts_weights)
    return engine
