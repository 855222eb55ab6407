"""Put an evaluation together from a checked config: a model and, if there are any, its weights."""

from __future__ import annotations

from pathlib import Path

import ml_collections
import torch

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation.evaluate import Evaluator
from flow_grpo.launch import build, encoders
from flow_grpo.launch.weights import Weights
from flow_grpo.parallel.stop import Stop
from flow_grpo.prompts import Prompt
from flow_grpo.rewards.combine import Scorer


def build_evaluator(
    config: ml_collections.ConfigDict,
    family: type[PatchedPipeline],
    weights: Weights,
    prompts: list[Prompt],
) -> Evaluator:
    """Load a model and what was trained, in the precision that config.use_lora trains it in.

    Raises ValueError if the weights do not fit the model, or it does not suit the prompts.
    """
    engine, pipeline, size = build.load(config, family, prompts)
    transformer = pipeline.transformer
    if weights.kind == "lora":
        build.add_lora(pipeline, str(weights.path))
        for name, param in transformer.named_parameters():
            if "lora_" in name:
                param.data = param.data.float()  # as in training
    elif weights.kind == "transformer":
        _replace(transformer, weights.path)
    pipeline.input_dtype = transformer.dtype
    return Evaluator(
        config=config,
        ranks=engine.ranks,
        pipeline=pipeline,
        model=engine.wrap_frozen(transformer),
        size=size,
        eval_schedule=build.schedules(config, pipeline, size)[1],
        conditioner=encoders.conditioner(config, pipeline),
        scorer=Scorer.of(config, str(engine.ranks.device)),
        stop=Stop(engine.ranks),
    )


def _replace(transformer: torch.nn.Module, folder: Path) -> None:
    """Put a saved transformer's weights in place, in the dtype that is there."""
    saved = type(transformer).from_pretrained(folder, torch_dtype=transformer.dtype)
    try:
        transformer.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{str(folder)!r} does not fit the transformer of config.pretrained.model, which must "
            f"be its base: {error}"
        ) from None
