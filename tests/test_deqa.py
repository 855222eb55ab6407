"""DeQA's scorer on a model folder with code of its own, as the released one has.

Its code here is a stand-in with the released one's interface, `score(pictures)`, 1 to 5; not seen
with the real weights.
"""

import json

import numpy as np
import pytest
import serving
from waiting import HANG_S

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch

CODE = """
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

class RaterConfig(PretrainedConfig):
    model_type = "rater"

class Rater(PreTrainedModel):
    config_class = RaterConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def score(self, images, task_="quality", input_="image"):
        means = torch.tensor([np.asarray(image).mean() / 255 for image in images])
        return self.weight * (1 + 4 * means.float())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "rater"
    path.mkdir()
    (path / "rater.py").write_text(CODE)
    classes = {"AutoConfig": "rater.RaterConfig", "AutoModelForCausalLM": "rater.Rater"}
    (path / "config.json").write_text(json.dumps({"model_type": "rater", "auto_map": classes}))
    save_file({"weight": torch.ones(1)}, path / "model.safetensors", {"format": "pt"})
    return str(path)


PICTURES = [np.full((8, 8 + n % 3, 3), 51 * (n % 6), np.uint8) for n in range(20)]
WANTED = [(1 + 4 * (n % 6) / 5) / 5 for n in range(20)]


def test_score_is_the_opinion_divided_by_five(folder):
    settings = loading.settings(base()) | {"deqa": folder}
    loading.check("deqa", settings, ["p"], [{}])
    found = loading.load("deqa", settings, "cpu")(Batch(PICTURES, ["p"] * 20, [{}] * 20))
    np.testing.assert_allclose(found["deqa"], WANTED, atol=1e-6)


def test_a_server_gives_a_client_the_same(folder):
    with (
        serving.started("deqa", f"--set=deqa={folder}", "--device=cpu") as url,
        serving.client(url, name="deqa", timeout_s=HANG_S) as reward,
    ):
        found = reward(Batch(PICTURES, ["p"] * 20, [{}] * 20))
    np.testing.assert_allclose(found["deqa"], WANTED, atol=1e-6)
