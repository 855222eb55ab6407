"""Aesthetic v2.5 on a tiny SigLIP; EditReward, EditScore and VideoAlign on stand-ins.

A stand-in has its package's interface. Not seen with the real packages, nor with released weights.
"""

import sys

import numpy as np
import pytest
import serving
import torch
from PIL import Image
from tiny.parts import seeded
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel
from waiting import HANG_S

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (24 + 8 * n, 40, 3), dtype=np.uint8) for n in range(3)]
SOURCES = [(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8),) for _ in range(3)]
PROMPTS = ["make it red", "add a hat", "no"]
ROWS = [{"image": "a.png"}, {"image": ["b.png"]}, {"image": "c.png"}]
VIDEOS = [np.full((n + 2, 16, 32, 3), 40 * n, np.uint8) for n in range(3)]


def test_aesthetic_v2_5_is_the_mlp_on_siglips_unit_features(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8)
    model = seeded(SiglipVisionModel, config)
    model.save_pretrained(tmp_path / "siglip")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "siglip")
    torch.manual_seed(0)
    widths = (32, 24, 16, 8, 4, 1)
    layers = [torch.nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
    head = {
        f"scoring_head.{2 * n}.{name}": value  # dropout lies between them
        for n, layer in enumerate(layers)
        for name, value in layer.state_dict().items()
    }
    torch.save(head, tmp_path / "head.pth")
    settings = loading.settings(base()) | {
        "siglip": str(tmp_path / "siglip"),
        "aesthetic_v2_5_head": str(tmp_path / "head.pth"),
    }
    loading.check("aesthetic_v2_5", settings, PROMPTS, ROWS)
    found = loading.load("aesthetic_v2_5", settings, "cpu")(Batch(PICTURES, PROMPTS, ROWS))
    for image, score in zip(PICTURES, found["aesthetic_v2_5"], strict=True):
        small = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)
        with torch.no_grad():
            features = model(pixels[None]).pooler_output[0]
            features = features / features.norm()
            for layer in layers:
                features = layer(features)
        assert score == pytest.approx(features.item(), abs=1e-5)
    with pytest.raises(ValueError, match="rewards.aesthetic_v2_5_head='': there is no such file"):
        loading.check("aesthetic_v2_5", settings | {"aesthetic_v2_5_head": ""}, PROMPTS, ROWS)


EDITREWARD = """
import numpy as np
import torch
from PIL import Image

class EditRewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", reward_dim="dim1",
                 rm_head_type="default"):
        assert (device, reward_dim, rm_head_type) == ("cpu", "overall_detail", "ranknet_multi_head")
        self.offset = float(config_path) + float(checkpoint_path)

    def reward(self, prompts, image_src, image_paths):
        assert all(isinstance(path, str) for path in image_src + image_paths)
        means = [[np.asarray(Image.open(path)).mean() for path in paths]
                 for paths in (image_src, image_paths)]
        return torch.tensor([[edited - 2 * source + len(text) + self.offset, 99.0]
                for text, source, edited in zip(prompts, *means, strict=True)])
"""
EDITSCORE = """
import numpy as np

class EditScore:
    def __init__(self, backbone, model_name_or_path, score_range, num_pass, lora_path=None):
        assert (backbone, model_name_or_path, score_range) == ("qwen3vl", "m", 25)
        assert (num_pass, lora_path) == (2, "l")

    def evaluate(self, images, instruction):
        source, edited = (np.asarray(image).mean() for image in images)
        if instruction == "no":
            return {"SC_reasoning": "I can not say."}
        return {"overall": edited - source, "prompt_following": edited, "consistency": source,
                "perceptual_quality": len(instruction), "SC_reasoning": ""}
"""
VIDEOALIGN = """
import numpy as np

class VideoVLMRewardInference:
    def __init__(self, load_from_pretrained, load_from_pretrained_step=-1, device="", dtype=None):
        assert (load_from_pretrained, device, str(dtype)) == ("c", "cpu", "torch.bfloat16")

    def reward(self, video_paths, prompts, fps=None, num_frames=None, use_norm=True):
        videos = [np.load(path + ".npy") for path in video_paths]
        rates = [float(open(path).read()) for path in video_paths]
        return [{"VQ": len(video), "MQ": rate, "TA": len(text), "Overall": video.mean()}
                for video, rate, text in zip(videos, rates, prompts, strict=True)]
"""
IMAGEIO = """
import numpy as np

def mimwrite(path, frames, fps, quality, macro_block_size):
    assert (quality, macro_block_size) == (10, 1)
    np.save(path + ".npy", frames)
    open(path, "w").write(str(fps))
"""
MODULES = {
    "EditReward": EDITREWARD,
    "editscore": EDITSCORE,
    "inference": VIDEOALIGN,
    "imageio": IMAGEIO,
}
SETTINGS = {
    "editreward": {"editreward_config": "1.5", "editreward_checkpoint": "2"},
    "editscore": {"editscore_model": "m", "editscore_lora": "l", "editscore_passes": 2},
    "videoalign": {"videoalign": "c", "videoalign_fps": 24.0},
}
MEANS = [(image.mean(), source.mean()) for image, (source,) in zip(PICTURES, SOURCES, strict=True)]
WANTED = {
    "editreward": {
        "editreward": [a - 2 * b + len(t) + 3.5 for (a, b), t in zip(MEANS, PROMPTS, strict=True)]
    },
    "editscore": {
        "editscore": [a - b for a, b in MEANS[:2]] + [np.nan],
        "editscore_prompt_following": [a for a, _ in MEANS[:2]] + [np.nan],
        "editscore_consistency": [b for _, b in MEANS[:2]] + [np.nan],
        "editscore_perceptual_quality": [11, 9, np.nan],
    },
    "videoalign": {
        "videoalign": [0, 40, 80],
        "videoalign_vq": [2, 3, 4],
        "videoalign_mq": [24, 24, 24],
        "videoalign_ta": [11, 9, 2],
    },
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of processes
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def batch(name):
    if name == "videoalign":
        return Batch(VIDEOS, PROMPTS, ROWS)
    return Batch(PICTURES, PROMPTS, ROWS, SOURCES)


def check(name, found):
    assert found.keys() == WANTED[name].keys()
    for column, values in WANTED[name].items():
        np.testing.assert_allclose(found[column], values, rtol=1e-6)


@pytest.mark.parametrize("name", WANTED)
def test_a_packages_scores_are_passed_on(name, packages):
    settings = loading.settings(base()) | SETTINGS[name]
    loading.check(name, settings, PROMPTS, ROWS)
    check(name, loading.load(name, settings, "cpu")(batch(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", WANTED)
def test_a_server_gives_a_client_the_same(name, packages):
    options = [f"--set={key}={value}" for key, value in SETTINGS[name].items()]
    with (
        serving.started(name, *options, "--device=cpu") as url,
        serving.client(url, name=name, timeout_s=HANG_S) as reward,
    ):
        check(name, reward(batch(name)))


@pytest.mark.parametrize("name", WANTED)
def test_without_the_package_it_says_where_to_run_it(name, monkeypatch):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"can't be imported here .*reward_servers/{name}.sh"):
        loading.load(name, loading.settings(base()) | SETTINGS[name], "cpu")


@pytest.mark.parametrize("name", ["editreward", "editscore"])
def test_rows_have_one_source(name, packages):
    settings = loading.settings(base()) | SETTINGS[name]
    for image in (None, [], ["a.png", "b.png"]):
        with pytest.raises(ValueError, match=f"{name} sees one"):
            loading.check(name, settings, ["p"], [{"image": image}])
    scorer = loading.load(name, settings, "cpu")
    for references in (None, [()], [SOURCES[0] * 2]):
        with pytest.raises(ValueError, match="needs one reference image for each image"):
            scorer(Batch(PICTURES[:1], ["p"], [{}], references))


def test_videoalign_scores_videos(packages):
    scorer = loading.load("videoalign", loading.settings(base()) | SETTINGS["videoalign"], "cpu")
    with pytest.raises(ValueError, match="videoalign scores videos"):
        scorer(Batch(PICTURES[:1], ["p"], [{}]))
