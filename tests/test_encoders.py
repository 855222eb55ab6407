"""config.encoders: where prompts are encoded changes memory and time, never a bit of an image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import running
import tiny
import torch
from PIL import Image

from flow_grpo.conditioning import Item
from flow_grpo.diffusers_patch.weights import ENCODERS
from flow_grpo.launch import encoders
from flow_grpo.launch.settings import load as load_config
from flow_grpo.records import Guidance
from flow_grpo.training import collect

NAMES = {"sd3": 4.5, "flux_kontext": 2.5, "qwenimage_edit": 4.0, "zimage": 4.0}
NAMES |= {"flux2_klein": 4.0, "wan": 4.5, "qwenimage": 4.0}  # and its guidance
FAST = ("sd3", "qwenimage_edit")
MODELS = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)


@pytest.fixture
def files(tmp_path):
    """Return the function that writes a tiny pipeline and prompts; those of edits have images."""

    def write(name: str):
        tiny.save(name, tmp_path / name)
        (tmp_path / "prompts").mkdir()
        for n in range(3):
            Image.fromarray(tiny.picture(64, 64, n)).save(tmp_path / "prompts" / f"{n}.png")
        rows = [{"prompt": text} for text in running.PROMPTS[:3]]
        if name in tiny.EDITS:
            rows = [row | {"image": f"{n}.png"} for n, row in enumerate(rows)]
        text = "\n".join(map(json.dumps, rows))
        for split in ("train", "test"):
            (tmp_path / "prompts" / f"{split}_metadata.jsonl").write_text(text)
        return tmp_path

    return write


def argv(folder, name: str, mode: str, **overrides) -> list[str]:
    settings = {
        "pretrained__model": folder / name,
        "encoders": mode,
        "encoder_cache": folder / "cache",
        "run_name": f"{mode}-{len(list((folder / 'logs').glob('*')))}",
        "max_sequence_length": 48,
        "num_frames": 5 if name == "wan" else 1,
        "sample__guidance_scale": NAMES[name],
        "train__cfg": True,
        "use_lora": True,
        "sample__num_batches_per_epoch": 2,
        "sample__num_steps": 3,
        "sample__sde_window_size": 0,
        "train__gradient_accumulation_steps": 1,
    }
    return running.arguments(folder, **(settings | overrides))


def prepare(folder, name, mode, **overrides):
    family = tiny.MODELS[name][0].variants()[0]  # the script's
    return running.prepare(argv(folder, name, mode, **overrides), family)


def parts(run) -> list:
    """The pipeline's components that only prompts need."""
    components = run.pipeline.pipe.components
    return [value for key, value in components.items() if key.startswith(ENCODERS)]


def cached(folder) -> list:
    return sorted((folder / "cache").glob("*/*.safetensors"))


@MODELS
def test_the_three_modes_draw_the_same_pictures(files, name):
    folder, rollouts = files(name), {}
    for mode in ("keep", "offload", "precompute", "precompute"):
        run = prepare(folder, name, mode)
        assert all(part is None for part in parts(run)) == (mode == "precompute")
        rollout = collect.roll_out(run, 0).rollout
        rollouts[run.config.run_name] = rollout
        if mode != "precompute":
            assert run.evaluator.conditioner.num_encoded >= 2 and not cached(folder)
            continue
        assert run.evaluator.conditioner.num_encoded == 0
        guided = run.pipeline.needs_negative(Guidance(NAMES[name]))
        assert len(cached(folder)) == 3 + guided * (3 if name in tiny.EDITS else 1)
        for part in [*(folder / name).glob("text_enc*"), *(folder / name).glob("token*")]:
            shutil.rmtree(part)  # the second start finds none
    kept, *others = rollouts.values()
    assert len(others) == 3
    for other in others:
        for field in ("latents", "next_latents", "log_probs", "final"):
            assert torch.equal(getattr(kept, field), getattr(other, field))


def test_offloaded_encoders_are_back_on_the_cpu_after_each_call(files, monkeypatch):
    run = prepare(files("sd3"), "sd3", "offload")
    moves = []
    monkeypatch.setattr(run.pipeline, "move_encoders", lambda device: moves.append(str(device)))
    for number in (0, 1, 0):
        run.evaluator.prompt_batch([run.plan.train_prompts[number]], [(0, 0)], Guidance(4.5))
    home = str(run.pipeline.device)
    assert moves == ["cpu", home, "cpu"]  # the third call found its prompt in memory
    assert run.evaluator.conditioner.num_encoded == 3  # two prompts and what guidance subtracts


def test_encoders_move_and_nothing_else(files):
    pipeline = prepare(files("sd3"), "sd3", "keep").pipeline
    pipeline.move_encoders("meta")
    devices = {
        name: part.device.type
        for name, part in pipeline.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    encoders = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert {name for name, device in devices.items() if device == "meta"} == encoders
    assert pipeline.device.type == "cpu"


def test_the_key_follows_all_that_an_embedding_depends_on(files, monkeypatch):
    folder = files("flux_kontext")
    monkeypatch.chdir(Path(__file__).parent.parent)
    base = argv(folder, "flux_kontext", "precompute")
    family = tiny.MODELS["flux_kontext"][0]
    picture = folder / "prompts" / "0.png"

    def path(prompt="a cat", images=(str(picture),), **changed):
        more = [f"--config.{key.replace('__', '.')}={value}" for key, value in changed.items()]
        config, _ = load_config([*base, *more], running.DEFAULT)
        return encoders.store(config, family).path(Item(prompt, images))

    found = [
        path(),
        path("two cats"),
        path(None),
        path(images=()),
        path(images=(str(picture),) * 2),
        path(images=(str(folder / "prompts" / "1.png"),)),
        path(max_sequence_length=47),
        path(pretrained__revision="v2"),
        path(pretrained__model=folder),
        path(mixed_precision="bf16"),
        path(reference_area=4096),
    ]
    assert len(set(found)) == len(found) and found[0] == path()
    copy = folder / "prompts" / "copy.png"
    shutil.copy(picture, copy)
    assert path(images=(str(copy),)) == found[0]  # its bytes count, not its name
    copy2 = folder / "prompts" / "changed.png"
    copy2.write_bytes(picture.read_bytes() + b"\0")
    assert path(images=(str(copy2),)) != found[0]


def test_a_damaged_file_is_encoded_again_at_the_next_start(files, capsys):
    folder = files("sd3")
    prepare(folder, "sd3", "precompute")
    whole = {path: path.read_bytes() for path in cached(folder)}
    cut, gone, *_ = whole
    cut.write_bytes(whole[cut][:-7])
    gone.unlink()
    prepare(folder, "sd3", "precompute")
    assert capsys.readouterr().out.count("is damaged") == 1
    assert {path: path.read_bytes() for path in cached(folder)} == whole


def test_a_cache_that_can_not_be_written_to_is_named_before_weights_load(
    files, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    folder, loaded = files("sd3"), []
    monkeypatch.setattr(encoders, "_load", lambda *a: loaded.append(a))
    with pytest.raises(ValueError, match="config.encoder_cache: .*file/deeper can't be written to"):
        prepare(folder, "sd3", "precompute", encoder_cache=tmp_path / "file" / "deeper")
    assert not loaded


def test_a_file_that_is_damaged_while_a_run_goes_on_is_named(files):
    folder = files("sd3")
    run = prepare(folder, "sd3", "precompute")
    prompt = run.plan.train_prompts[0]
    path = run.evaluator.conditioner.store.path(Item(prompt.text))
    path.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=f"{path}, .*{prompt.text}.*Delete it"):
        run.evaluator.prompt_batch([prompt], [(0, 0)], Guidance(1.0))
