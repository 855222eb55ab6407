"""HPSv3's scorer on a stand-in for its package, which has that one's interface.

Not seen with the real package or its weights.
"""

import sys

import numpy as np
import pytest
import serving
from waiting import HANG_S

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch

PACKAGE = """
import numpy as np
import torch
from PIL import Image

class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        assert device == "cpu"
        offset = 0.0 if checkpoint_path is None else float(open(checkpoint_path).read())
        self.offset = torch.nn.Parameter(torch.tensor(offset))

    def reward(self, image_paths, prompts):  # rows of (mean, spread)
        assert all(isinstance(image, Image.Image) for image in image_paths)
        means = [np.asarray(image).mean() / 255 + len(text)
                 for image, text in zip(image_paths, prompts, strict=True)]
        found = torch.tensor([[mean, 99.0] for mean in means]) + self.offset
        assert not found.requires_grad  # as the package, it leaves that to its caller
        return found
"""
PROMPTS = [f"{n} cats" + "!" * n for n in range(20)]
PICTURES = [np.full((8, 8 + n % 3, 3), 12 * n, np.uint8) for n in range(20)]
WANTED = [12 * n / 255 + len(text) + 2 for n, text in enumerate(PROMPTS)]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    (tmp_path / "hpsv3").mkdir()
    (tmp_path / "hpsv3" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "HPSv3.safetensors").write_text("2.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of processes
    monkeypatch.syspath_prepend(tmp_path)
    return loading.settings(base()) | {"hpsv3": str(tmp_path / "HPSv3.safetensors")}


def test_score_is_the_mean_of_the_packages_distribution(settings):
    loading.check("hpsv3", settings, PROMPTS, [{}] * 20)
    found = loading.load("hpsv3", settings, "cpu")(Batch(PICTURES, PROMPTS, [{}] * 20))
    np.testing.assert_allclose(found["hpsv3"], WANTED, atol=1e-5)


def test_a_server_gives_a_client_the_same(settings):
    options = f"--set=hpsv3={settings['hpsv3']}", "--device=cpu"
    with (
        serving.started("hpsv3", *options) as url,
        serving.client(url, name="hpsv3", timeout_s=HANG_S) as reward,
    ):
        found = reward(Batch(PICTURES, PROMPTS, [{}] * 20))
    np.testing.assert_allclose(found["hpsv3"], WANTED, atol=1e-5)


def test_without_the_package_it_says_where_to_run_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv3", None)
    with pytest.raises(ValueError, match="can't be imported here .* scripts/reward_servers/hpsv3"):
        loading.load("hpsv3", loading.settings(base()), "cpu")


def test_a_checkpoint_that_is_not_there_is_named(settings):
    with pytest.raises(ValueError, match="config.rewards.hpsv3='./nowhere': there is no such"):
        loading.check("hpsv3", settings | {"hpsv3": "./nowhere"}, PROMPTS, [{}] * 20)
