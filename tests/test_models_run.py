"""Models that came after SD3 through the very loop that trains it: video, edits, ragged text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import running
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from fixtures import sample
from PIL import Image
from running import PROMPTS
from tiny import qwen

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.launch import entry
from flow_grpo.randomness import Randomness
from flow_grpo.report.output import read_metrics

GUIDANCE = {
    "bagel": 4.0,
    "flux2_klein_edit": 1.0,
    "qwenimage": 4.0,
    "qwenimage_edit": 4.0,
    "qwenimage_edit_2511": 4.0,
    "wan": 4.5,
    "zimage": 4.0,
}
MODELS = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "qwenimage_edit")) for n in GUIDANCE],
)
TEXTS = (*PROMPTS[:3], 'a sign that says "Grüße 42"')  # the last one is twice as long
LENGTH, HEIGHT, WIDTH, FRAMES = 48, 32, 48, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Tiny pipelines, and three data sets: texts, and edits of one or two images of two sizes."""
    folder = tmp_path_factory.mktemp("models")
    for name in GUIDANCE:
        tiny.save(name, folder / name)
    for data in ("texts", "edits1", "edits2"):
        (folder / data).mkdir()
    rows = {1: [], 2: []}
    for n, text in enumerate(TEXTS):
        names = [f"{n}-{k}.png" for k in range(2)]
        for k, file in enumerate(names):
            pixels = tiny.picture(64, (64, 80)[n % 2], seed=2 * n + k)
            Image.fromarray(pixels).save(folder / file)
        for count, lines in rows.items():
            paths = [f"../{name}" for name in names[:count]]
            lines.append(json.dumps({"prompt": text, "image": paths}))
    for split in ("train", "test"):
        (folder / "texts" / f"{split}.txt").write_text("\n".join(TEXTS))
        for count, lines in rows.items():
            path = folder / f"edits{count}" / f"{split}_metadata.jsonl"
            path.write_text("\n".join(lines))
    return folder


def family(name: str) -> type[PatchedPipeline]:
    return tiny.MODELS[name][0].variants()[0]  # the script's


def arguments(files: Path, name: str, **overrides) -> list[str]:
    settings = {
        "pretrained__model": files / name,
        "dataset": files / (f"edits{len(tiny.EDITS[name])}" if name in tiny.EDITS else "texts"),
        "max_sequence_length": LENGTH,
        "sample__guidance_scale": GUIDANCE[name],
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES if name == "wan" else 1,
        "train__learning_rate": 1e-2,
        "use_lora": True,
        "train__cfg": True,
        "save_freq": 2,
    }
    if name not in tiny.EDITS:  # prompts of unequal length share a call
        settings |= {"sample__train_batch_size": 8, "sample__num_batches_per_epoch": 2}
        settings |= {"train__gradient_accumulation_steps": 1}
    return running.arguments(files, **(settings | overrides))


def stock_picture(pipe, name: str, run, prompt, randomness) -> np.ndarray:
    """Call a stock pipeline as an evaluation of the run does."""
    noise = randomness.normal("init", [(0, -1)], run.pipeline.noise_shape(run.evaluator.size))
    images = prompt.load_images()
    (pictures,) = pipe(
        prompt=prompt.text,
        num_inference_steps=run.evaluator.schedule.num_steps,
        max_sequence_length=LENGTH,
        output_type="pil",
        return_dict=False,
        **run.pipeline.stock_arguments(run.evaluator.size, run.evaluator.guidance, noise, images),
    )
    return np.asarray(pictures[0])


@MODELS
def test_a_model_trains_and_its_lora_gives_the_same_picture_in_a_stock_pipeline(files, name):
    run = running.train(arguments(files, name, run_name=f"{name}-lora"), family(name))
    assert set(running.gate(run.folder).values()) == {0.0}
    assert read_metrics(run.folder, "update")[-1]["ratio_std"] > 0

    prompt, randomness = run.plan.eval_prompts[3], Randomness(run.config.seed, ())
    batch = run.evaluator.prompt_batch([prompt], [(0, -1)], run.evaluator.guidance)
    alone = replace(run.evaluator.schedule, pad_to=0)  # as a stock call of this prompt
    ours = sample(run.pipeline, run.model, batch, alone, randomness).images[0]
    path = str(files / name)
    stock = run.pipeline.stock.from_pretrained(path, **run.pipeline.components(path, "main"))
    if isinstance(stock, WanPipeline):
        assert ours.shape == (FRAMES, HEIGHT, WIDTH, 3)
        stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with qwen.stock_reference_area(run.pipeline.reference_area):  # elsewhere it is the same
        base = stock_picture(stock, name, run, prompt, randomness)
        stock.load_lora_weights(run.folder / "checkpoints" / "checkpoint-4" / "lora")
        trained = stock_picture(stock, name, run, prompt, randomness)
    assert np.array_equal(trained, ours) and not np.array_equal(base, ours)


@MODELS
def test_a_full_fine_tune_changes_every_matrix_and_exports_them(files, name):
    settings = {"use_lora": False, "train__learning_rate": 1e-3, "sample__sde_type": "cps"}
    run = running.prepare(arguments(files, name, run_name=f"{name}-full", **settings), family(name))
    start = {key: value.clone() for key, value in run.pipeline.transformer.state_dict().items()}
    scored = running.watch_scores(run)
    assert entry.execute(run) == 0
    trained = sum(count for count, held_out in scored if not held_out)
    assert trained == run.config.num_epochs * run.plan.num_groups * run.plan.group_size
    assert set(running.gate(run.folder).values()) == {0.0}
    trained = run.pipeline.transformer.state_dict()
    folder = run.folder / "checkpoints" / "checkpoint-4" / "transformer"
    exported = type(run.pipeline.transformer).from_pretrained(folder).state_dict()
    assert all(torch.equal(exported[key], trained[key]) for key in trained)
    still = {key for key in trained if torch.equal(start[key], trained[key])}
    heard = [key for key in still if run.pipeline.trains(key)]
    assert not [key for key in heard if trained[key].ndim > 1], still


@pytest.mark.slow
@MODELS
def test_a_lora_trains_every_target_and_nothing_at_learning_rate_zero(files, name):
    for rate in (0.0, 1e-2):
        argv = arguments(files, name, run_name=f"{name}-{rate}", train__learning_rate=rate)
        run = running.prepare(argv, family(name))
        start = {key: value.clone() for key, value in running.trained_parameters(run)}
        for target in run.pipeline.lora_target_modules:
            assert any(f".{target}.lora_A." in key for key in start), target
        assert entry.execute(run) == 0
        moved = {
            key
            for key, value in running.trained_parameters(run)
            if not torch.equal(start[key], value)
        }
        assert moved == (set(start) if rate else set())


@pytest.mark.slow
@MODELS
def test_replayed_log_probs_allow_another_micro_batch(files, name):
    argv = arguments(
        files,
        name,
        run_name=f"{name}-replay",
        num_epochs=1,
        train__batch_size=2,
        train__old_log_prob="replay",
    )
    run = running.train(argv, family(name))
    assert read_metrics(run.folder, "update")[0]["approx_kl"] == 0  # of the same calls
    assert max(running.gate(run.folder, "velocity").values()) < 1e-5  # to calls of the rollout
    assert run.plan.num_micro_batches == 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sde", "cps"])
@MODELS
def test_in_bf16_the_log_ratio_is_zero_too(files, name, kind):
    argv = arguments(
        files,
        name,
        run_name=f"{name}-bf16-{kind}",
        num_epochs=1,
        mixed_precision="bf16",
        sample__sde_type=kind,
    )
    run = running.train(argv, family(name))
    assert set(running.gate(run.folder).values()) == {0.0}
    assert run.pipeline.input_dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bagel", "qwenimage_edit_2511", "wan", "flux2_klein_edit"])
def test_with_batched_guidance_the_log_ratio_is_zero_too(files, name):
    keys = {"num_epochs": 1, "sample__batched_guidance": True, "sample__guidance_scale": 4.0}
    run = running.prepare(arguments(files, name, run_name=f"{name}-batched", **keys), family(name))
    rows = set()
    run.pipeline.transformer.register_forward_pre_hook(
        lambda _, args, inputs: rows.add(len(inputs["hidden_states"])), with_kwargs=True
    )
    assert entry.execute(run) == 0
    batch_sizes = {run.config.sample.train_batch_size, run.config.sample.test_batch_size}
    assert rows and all(count % 2 == 0 and count // 2 <= max(batch_sizes) for count in rows)
    assert 2 * run.config.sample.train_batch_size in rows
    assert set(running.gate(run.folder).values()) == {0.0}


def test_a_video_is_shown_moving(files):
    run = running.prepare(arguments(files, "wan", run_name="shown"), family("wan"))
    frames = np.arange(FRAMES, dtype=np.uint8)[:, None, None, None] * 50
    video = np.broadcast_to(frames, (FRAMES, 32, 48, 3))
    run.tracker.save_images("films", [video, video], num_columns=2)
    images = run.folder / "images"
    with Image.open(images / "films.gif") as film:
        assert film.n_frames == FRAMES
    middle = np.asarray(Image.open(images / "films.png"))
    assert middle[middle.shape[0] // 2, middle.shape[1] // 4].tolist() == [100] * 3


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("wan", 8, "config.num_frames=8: .* The nearest is 9"),
        ("wan", 0, "config.num_frames=0"),
        ("zimage", 5, "config.num_frames=5: ZImage draws images"),
    ],
)
def test_a_number_of_frames_that_a_model_can_not_draw_is_refused(files, name, num_frames, message):
    with pytest.raises(ValueError, match=message):
        running.prepare(arguments(files, name, num_frames=num_frames), family(name))


def test_a_wan_with_two_transformers_is_refused(files, tmp_path):
    pipe = WanPipeline.from_pretrained(files / "wan")
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="two transformers.*Wan2.1"):
        running.prepare(arguments(files, "wan", pretrained__model=tmp_path), family("wan"))


def test_a_reference_that_klein_can_not_take_is_named(files, tmp_path):
    Image.fromarray(tiny.picture(48, 64)).save(tmp_path / "small.png")
    for split in ("train", "test"):
        row = {"prompt": TEXTS[0], "image": "small.png"}
        (tmp_path / f"{split}_metadata.jsonl").write_text(json.dumps(row))
    name = "flux2_klein_edit"
    with pytest.raises(ValueError, match="small.png.* has 64 x 48 pixels"):
        running.prepare(arguments(files, name, dataset=tmp_path), family(name))
