"""Training on images that the data set has: pairs for DPO, pictures for SFT, editing too."""

import json

import numpy as np
import pytest
import running
import tiny
import torch
from PIL import Image

from config.base import base, with_objective
from flow_grpo import prompts
from flow_grpo.launch import preflight
from flow_grpo.training import collect

COLORS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of running.make_files() with a data set whose rows have answers."""
    place = running.make_files(tmp_path_factory.mktemp("offline"))
    tiny.save("flux_kontext", place / "flux_kontext")
    (place / "pairs").mkdir()
    for name, color in COLORS.items():
        for suffix, shade in (("good", 1.0), ("bad", 0.3)):
            pixels = np.full((40, 48, 3), color) * shade
            Image.fromarray(pixels.astype(np.uint8)).save(place / "pairs" / f"{name}-{suffix}.png")
    rows = [
        {"prompt": f"a {name} wall", "chosen": f"{name}-good.png", "rejected": f"{name}-bad.png"}
        for name in COLORS
    ]
    pictures = [{"prompt": f"a {name} wall", "picture": f"{name}-good.png"} for name in COLORS]
    edits = [row | {"image": "red-bad.png"} for row in rows]
    for data, content in (("pairs", rows), ("pictures", pictures), ("edits", edits)):
        (place / data).mkdir(exist_ok=True)
        for image in (place / "pairs").glob("*.png"):
            (place / data / image.name).write_bytes(image.read_bytes())
        for split in ("train", "test"):
            text = "\n".join(map(json.dumps, content))
            (place / data / f"{split}_metadata.jsonl").write_text(text)
    return place


def arguments(folder, data, objective, group_size, **more):
    keys = {
        "dataset": folder / data,
        "sample__source": "data",
        "sample__num_image_per_prompt": group_size,
        "train__cfg": False,
        "use_lora": True,
        "train__lora_rank": 4,
    }
    return running.arguments(folder, objective=objective, **keys | more)


@pytest.mark.parametrize(
    ("data", "objective", "size"), [("pairs", "dpo", 2), ("pictures", "sft", 1)]
)
def test_it_trains_without_drawing_or_asking_a_reward(folder, data, objective, size):
    keys = {"run_name": f"{data}-{objective}", "eval_max_samples": 1}
    run = running.prepare(arguments(folder, data, objective, size, **keys))
    asked = running.watch_scores(run)
    drawn = []
    run.evaluator.pipeline.transformer.register_forward_pre_hook(
        lambda module, inputs: drawn.append(torch.is_grad_enabled())
    )
    assert run.passes()["sampling"] == 0
    sampled = collect.roll_out(run, 0)
    assert drawn == [] and asked == [] and len(sampled.rollout) == 16
    decoded = collect.decode(run.pipeline, sampled.rollout)
    assert len(decoded) == 16 and sampled.images[0].shape == (32, 32, 3)
    assert running.entry.execute(run) == 0
    assert {count for count, _ in asked} == {1}  # of evaluations alone
    updates = [row for row in running.metrics(run.folder) if row["kind"] == "update"]
    assert len(updates) == 4 and all(row["grad_norm"] > 0 for row in updates)


@pytest.mark.slow
def test_dpo_learns_the_pairs_order(folder):
    keys = {"run_name": "learns", "num_epochs": 30, "train__learning_rate": 3e-3, "save_freq": 30}
    run = running.train(arguments(folder, "pairs", "dpo", 2, eval_freq=30, **keys))
    updates = [row for row in running.metrics(run.folder) if row["kind"] == "update"]
    assert updates[0]["margin"] == 0
    assert np.mean([row["margin"] for row in updates[-8:]]) > 1
    assert np.mean([row["accuracy"] for row in updates[-8:]]) > 0.9


def test_an_edits_pair_is_conditioned_on_its_reference(folder):
    family, _ = tiny.MODELS["flux_kontext"]
    keys = {"pretrained__model": folder / "flux_kontext", "run_name": "edits", "num_epochs": 1}
    run = running.train(arguments(folder, "edits", "dpo", 2, **keys), family)
    (update, _) = [row for row in running.metrics(run.folder) if row["kind"] == "update"]
    assert update["grad_norm"] > 0


def test_an_answer_fills_the_size_and_is_cut_about_its_middle(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 200  # the middle third
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    row = json.dumps({"prompt": "x", "picture": "wide.png"})
    (tmp_path / "train_metadata.jsonl").write_text(row)
    (prompt,) = prompts.read(str(tmp_path), "train")
    found = prompt.load_answer(0, 40, 40)
    assert found.shape == (40, 40, 3) and (found[:, 3:-3] == 200).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a.png"}, "chosen and rejected must be a path"),
        ({"chosen": "a.png", "rejected": 3}, "chosen and rejected must be a path"),
        ({"picture": ["a.png"]}, "picture must be a path"),
        ({"picture": "missing.png"}, "cannot read the image"),
    ],
)
def test_a_row_with_a_wrong_answer_is_named(tmp_path, row, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "train_metadata.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": "x"} | row))
    with pytest.raises(ValueError, match=message) as error:
        prompts.read(str(tmp_path), "train")
    assert f"{path}, line 2" in str(error.value) or f"{path}:2" in str(error.value)


@pytest.mark.parametrize(
    ("objective", "data", "size", "message"),
    [
        ("grpo", "pairs", 2, "needs the steps by which an image was drawn"),
        ("sft", "prompts", 1, "has 0 image"),
        ("dpo", "pictures", 2, "has 1 image"),
        ("sft", "pairs", 1, "has 2 image"),
    ],
)
def test_what_has_no_images_to_train_on_is_refused_before_a_model_loads(
    folder, objective, data, size, message
):
    config = with_objective(base(), objective)
    config.dataset = str(folder / data)
    config.pretrained.model, config.resolution = str(folder / "sd3"), 32
    config.sample.source, config.sample.num_image_per_prompt = "data", size
    with pytest.raises(ValueError, match=message) as error:
        preflight.check(config, world_size=1)
    assert "config.sample.source=data" in str(error.value)
