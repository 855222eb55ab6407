"""DeQA's scorer on a model folder with code of its own, as the released one has.

Its code here is a stand-in with the released one's interface, `score(images)`, 1 to 5; not seen
with the real weights.
"""

import json
from pathlib import Path

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


@pytest.mark.slow
def test_a_server_gives_a_client_the_same(folder):
    with (
        serving.started("deqa", f"--set=deqa={folder}", "--device=cpu") as url,
        serving.client(url, name="deqa", timeout_s=HANG_S) as reward,
    ):
        found = reward(Batch(PICTURES, ["p"] * 20, [{}] * 20))
    np.testing.assert_allclose(found["deqa"], WANTED, atol=1e-6)


@pytest.mark.parametrize("commit", ["", "main", "a" * 39, "A" * 40, "v1.0"])
def test_the_code_of_a_hub_id_runs_at_a_commit_alone(commit):
    settings = loading.settings(base()) | {"deqa": "owner/model", "deqa_revision": commit}
    with pytest.raises(
        ValueError, match="deqa_revision='.*the commit that you have read is needed"
    ):
        loading.check("deqa", settings, ["p"], [{}])
    loading.check("deqa", settings | {"deqa_revision": "0f" * 20}, ["p"], [{}])


def test_that_commit_is_of_the_weights_and_of_the_code(monkeypatch):
    import transformers

    asked = {}

    def load(name, **more):
        asked.update(more, name=name)
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    settings = loading.settings(base()) | {"deqa": "owner/model", "deqa_revision": "0f" * 20}
    with pytest.raises(OSError, match="no network"):
        loading.load("deqa", settings, "cpu")
    assert asked["revision"] == asked["code_revision"] == "0f" * 20
    assert asked["name"] == "owner/model"


@pytest.mark.parametrize("code", ["other/model--rater.Rater", ["a/b--c.D", None]])
def test_a_folder_whose_code_is_elsewhere_is_refused(folder, code):
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({"model_type": "rater", "auto_map": {"AutoModel": code}}))
    with pytest.raises(ValueError, match="auto_map names the code of another repository"):
        loading.check("deqa", loading.settings(base()) | {"deqa": folder}, ["p"], [{}])


def test_no_other_module_runs_code_that_comes_with_a_model():
    root = serving.ROOT
    files = [*(root / "flow_grpo").rglob("*.py"), *(root / "scripts").rglob("*.py")]
    found = [path.name for path in files if "trust_remote_code" in path.read_text()]
    assert found == ["deqa.py"]
    assert "deqa" not in base().reward_fn and "deqa" not in base().eval_reward_fn
