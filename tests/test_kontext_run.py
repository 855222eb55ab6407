"""FLUX.1 Kontext through the very loop that trains SD3: references, packed latents, two sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import running
import tiny
from diffusers import FluxKontextPipeline
from fixtures import sample
from PIL import Image

from flow_grpo.diffusers_patch.flux_kontext import FluxKontext
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance
from flow_grpo.report.output import read_metrics

SIZES = [(32, 32), (48, 32)]  # width, height


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kontext")
    tiny.save("flux_kontext", folder / "kontext")
    (folder / "edits").mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for n in range(4):
        width, height = SIZES[n % 2]
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "edits" / f"{n}.png")
        rows.append({"prompt": f"make it {running.PROMPTS[n]}", "image": f"{n}.png", "tag": "edit"})
    for split in ("train", "test"):
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / "edits" / f"{split}_metadata.jsonl").write_text(text)
    return folder


def arguments(files: Path, **overrides) -> list[str]:
    settings = {
        "pretrained__model": files / "kontext",
        "dataset": files / "edits",
        "sample__guidance_scale": 2.5,
        "height": 32,
        "width": 48,
        "train__cfg": True,
        "train__learning_rate": 1e-2,
        "use_lora": True,
    }
    return running.arguments(files, **(settings | overrides))


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_kontext_trains_and_its_lora_loads_into_the_stock_pipeline(files, kind):
    argv = arguments(files, run_name=f"kontext-{kind}", sample__sde_type=kind, train__beta=0.01)
    run = running.train(argv, FluxKontext)
    found = running.gate(run.folder)
    assert len(found) == 2 and set(found.values()) == {0.0}
    assert read_metrics(run.folder, "update")[-1]["kl"] > 0
    assert "avg/edit" in read_metrics(run.folder, "eval")[0]

    prompt = run.plan.eval_prompts[1]  # the wider reference
    batch = run.evaluator.prompt_batch([prompt], [(0, -1)], Guidance(2.5))
    randomness = Randomness(run.config.seed, ())
    ours = sample(run.pipeline, run.model, batch, run.evaluator.schedule, randomness).images[0]
    stock = FluxKontextPipeline.from_pretrained(files / "kontext")
    noise = randomness.normal("init", [(0, -1)], run.pipeline.noise_shape(run.evaluator.size))
    settings = dict(
        image=Image.fromarray(prompt.load_images()[0]),
        prompt=prompt.text,
        latents=run.pipeline.initial_latents(run.evaluator.size, noise),
        guidance_scale=2.5,
        num_inference_steps=3,
        max_sequence_length=16,
        height=32,
        width=48,
        max_area=32 * 48,
        _auto_resize=False,
    )
    base = np.asarray(stock(**settings).images[0])
    stock.load_lora_weights(run.folder / "checkpoints" / "checkpoint-4" / "lora")
    trained = np.asarray(stock(**settings).images[0])
    assert np.array_equal(trained, ours) and not np.array_equal(base, ours)


def test_a_call_that_would_mix_reference_sizes_is_refused_before_weights_load(files):
    with pytest.raises(ValueError, match="reference pictures have 2 sizes"):
        running.prepare(arguments(files, sample__train_batch_size=8), FluxKontext)


def test_a_row_without_a_reference_is_named(files, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(running.PROMPTS))
    with pytest.raises(ValueError, match="0 reference pictures"):
        running.prepare(arguments(files, dataset=tmp_path), FluxKontext)
