"""Put an evaluation together from a checked config: a model and, if there are any, its weights."""

from __future__ import annotations

import ml_collections

from flow_grpo.conditioning import guidances
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
        pipeline.load_lora(str(weights.path))
    elif weights.kind == "transformer":
        pipeline.load_transformer(weights.path)
    pipeline.input_dtype = transformer.dtype
    return Evaluator(
        config=config,
        ranks=engine.ranks,
        pipeline=pipeline,
        model=engine.wrap_frozen(transformer),
        size=size,
        schedule=build.schedules(config, pipeline, size)[1],
        guidance=guidances(config)[1],
        conditioner=encoders.conditioner(config, pipeline),
        scorer=Scorer.of(config, str(engine.ranks.device)),
        stop=Stop(engine.ranks),
    )
