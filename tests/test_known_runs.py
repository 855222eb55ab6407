"""Every known run of config/ trains for an epoch through its own script, on a tiny pipeline.

What makes it small is overridden: the model's folder, the data, the reward, all sizes, and fp16,
which needs a GPU. What makes it the run it is stays: steps, window, kernel, guidance, KL, EMA,
objective, LoRA.
"""

from __future__ import annotations

import difflib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import running
import tiny
from PIL import Image

from config import dpo, forward, grpo, grpo_guard, sft
from config.base import runs_of
from flow_grpo import plan
from flow_grpo.launch import entry
from flow_grpo.report.output import read_metrics

ROOT = Path(__file__).parent.parent
FILES = {"grpo": grpo, "grpo_guard": grpo_guard, "dpo": dpo, "sft": sft, "forward": forward}
RUNS = [f"{file}:{run}" for file, module in FILES.items() for run in runs_of(vars(module))]
FAST = {"grpo:clipscore_sd3", "grpo:geneval_sd3_fast_nocfg", "dpo:geneval_sd3_online"}
FAST |= {"grpo_guard:geneval_sd3_rationorm", "sft:geneval_sd3_online"}
SLOW = {  # 39 trained steps; 19 of videos; the script and class of another
    "grpo:compressibility",
    "grpo:general_ocr_wan2_1",
    "grpo:counting_qwenimage_edit_2509",
    "grpo:pickscore_sd3_5_large",
}


def config_of(name: str):
    file, _, run = name.partition(":")
    return FILES[file].get_config(run)


def scripts() -> dict[str, tuple[Path, str]]:
    """Return the script and pipeline patch of each model that a script trains by default."""
    found = {}
    for path in (ROOT / "scripts").glob("train_*.py"):
        text = path.read_text()
        (family,) = re.findall(r"from (flow_grpo\.diffusers_patch[.\w]+ import \w+)", text)
        family = family.replace(" import ", ":")
        default = re.findall(r'"([\w./]+:\w+)"', text)[-1]
        run = default.partition(":")[2]
        model = config_of(f"grpo:{run}").pretrained.model if f"grpo:{run}" in RUNS else path.stem
        found[model] = (path, family)
    found["stabilityai/stable-diffusion-3.5-medium"] = found.pop("train_sd3")
    return found


def script_of(model: str) -> tuple[Path, str]:
    """The script of this model, or of the most similar name of the same owner."""
    owner = model.split("/")[0]
    near = [name for name in SCRIPTS if name.split("/")[0] == owner]
    assert near, f"no script's default config has a model of {owner}"
    return SCRIPTS[max(near, key=lambda name: difflib.SequenceMatcher(None, name, model).ratio())]


def marked(name: str):
    """Mark a run as slow unless it is the first of its model, or in FAST."""
    models = [config_of(run).pretrained.model for run in RUNS[: RUNS.index(name) + 1]]
    slow = name in SLOW or (models[-1] in models[:-1] and name not in FAST)
    return pytest.param(name, marks=pytest.mark.slow) if slow else name


SCRIPTS = scripts()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Return the function that writes a family's tiny pipeline once."""
    folder = tmp_path_factory.mktemp("models")
    return lambda family: save_tiny(family, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def save_tiny(family: str, folder: Path) -> Path:
    """Write a family's tiny pipeline into a folder of its own unless it is there; returns that."""
    name = next(name for name, (cls, _) in tiny.MODELS.items() if family == _path(cls))
    return folder / name if (folder / name).exists() else tiny.save(name, folder / name)


def make_data(folder: Path) -> Path:
    """Write two data sets, prompts and prompts with a reference image; returns the folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rows = [{"prompt": prompt, "image": "reference.png"} for prompt in running.PROMPTS[:2]]
    for name in ("texts", "edits"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "edits" / "reference.png")
    for split in ("train", "test"):
        (folder / "texts" / f"{split}.txt").write_text("\n".join(running.PROMPTS[:2]))
        text = "\n".join(map(json.dumps, rows))
        (folder / "edits" / f"{split}_metadata.jsonl").write_text(text)
    return folder


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__name__}"


def arguments(name: str, model: Path, data: Path, logs: Path) -> list[str]:
    config = config_of(name)
    edits = config.dataset.endswith("edit")
    sizes = {
        "pretrained.model": model,
        "dataset": data / ("edits" if edits else "texts"),
        "reward_fn": {"jpeg_incompressibility": 1.0},
        "logdir": logs,
        "run_name": name.replace(":", "_"),
        "tracker": "none",
        "num_epochs": 1,
        "resolution": 32,
        "max_sequence_length": tiny.parts.LENGTH,
        "sample.eval_num_steps": 2,
        "sample.train_batch_size": 2,
        "sample.test_batch_size": 2,
        "sample.num_image_per_prompt": 4,
        "sample.num_batches_per_epoch": 4,
        "train.gradient_accumulation_steps": 2,
    }
    if config.num_frames > 1:
        sizes |= {"height": 32, "width": 32, "num_frames": 5}
    if config.mixed_precision == "fp16":
        sizes["mixed_precision"] = "no"
    for each in ("dpo", "sft"):  # 39 of these are no other than 2
        if each in config:
            sizes |= {"sample.num_steps": 4, f"{each}.num_times": 2}
    return [
        f"--config=config/{name.replace(':', '.py:')}",
        *(f"--config.{k}={v}" for k, v in sizes.items()),
    ]


@pytest.mark.parametrize("name", map(marked, RUNS))
def test_the_run_trains_for_an_epoch_through_its_script(
    name, tiny_model, data, tmp_path, monkeypatch
):
    config = config_of(name)
    script, family = script_of(config.pretrained.model)
    statuses = []
    monkeypatch.setattr(entry, "leave", statuses.append)
    monkeypatch.setattr(
        sys, "argv", [str(script), *arguments(name, tiny_model(family), data, tmp_path)]
    )
    monkeypatch.chdir(ROOT)
    with running.fresh_process():
        runpy.run_path(str(script), run_name="__main__")
    assert statuses == [0]

    folder = tmp_path / name.replace(":", "_")
    ran = json.loads((folder / "config.json").read_text())
    assert ran["objective"] == config.objective
    own_images = {"dpo", "sft"} & set(config)
    for key in ("noise_level", "sde_type", "sde_window_size", "guidance_scale"):
        assert ran["sample"][key] == config.sample[key], key
    assert own_images or ran["sample"]["num_steps"] == config.sample.num_steps
    assert own_images or ran["train"].get("clip_range") == config.train.get("clip_range")
    for key in ("beta", "cfg", "ema", "learning_rate", "lora_rank"):
        assert ran["train"].get(key) == config.train.get(key), key
    updates = read_metrics(folder, "update")
    assert len(updates) == 2 and all(np.isfinite(row["loss"]) for row in updates)
    assert updates[0]["grad_norm"] > 0
    assert any((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_the_run_fits_the_number_of_gpus_that_its_docstring_names(name):
    file, _, run = name.partition(":")
    says = getattr(FILES[file], run).__doc__
    gpus, groups = re.search(r"(\d+) GPU", says), re.search(r"(\d+) groups", says)
    assert gpus, f"{name}'s docstring must say on how many GPUs it has its number of groups"
    sample = config_of(name).sample
    pictures = int(gpus[1]) * sample.train_batch_size * sample.num_batches_per_epoch
    wanted = int(groups[1]) if groups else plan.PUBLISHED_GROUPS
    assert pictures == wanted * sample.num_image_per_prompt


def test_the_average_is_kept_where_the_published_run_keeps_one():
    kept = {name for name in RUNS if config_of(name).train.ema}
    assert RUNS and set(RUNS) - kept == {
        name
        for name in RUNS
        if name == "grpo:compressibility" or "qwenimage" in name or "bagel" in name
    }
