"""A reward of the user's own, named as module:function in config.reward_fn."""

import sys

import numpy as np
import pytest

from config.base import base
from flow_grpo.launch import preflight
from flow_grpo.rewards import loading
from flow_grpo.rewards.combine import Scorer

PICTURES = [np.full((4, 4, 3), value, np.uint8) for value in (0, 51, 255)]
SOURCE = """
import numpy as np
from flow_grpo.rewards.base import Reward

NUMBER = 3

def brightness(images, prompts, metadata, references=None, group=None):
    means = np.array([image.mean() / 255 for image in images])
    return {"brightness": means, "dark": means < 0.1}

def bare(images, prompts, metadata, references=None, group=None):
    return [len(prompt) for prompt in prompts]

class Kept(Reward):
    @classmethod
    def check(cls, settings, prompts, metadata):
        if "" in prompts:
            raise ValueError("an empty prompt")

    def __init__(self, settings, device):
        self.built_with = settings["clip"], device

    def __call__(self, images, prompts, metadata, references=None, group=None):
        return {"Kept": np.ones(len(images)), self.built_with[1]: np.zeros(len(images))}

class Unrelated:
    pass
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A file of the user's in the current folder, which is on no path yet."""
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


def score(weights):
    scorer = Scorer(weights, loading.settings(base()))
    found = scorer.score(PICTURES, ["a", "bb", "ccc"], [{}] * 3)
    scorer.close()
    return found


def test_a_function_s_score_goes_under_the_name_in_the_config():
    found = score({"my_rewards:brightness": 2.0})
    assert found["my_rewards:brightness"].tolist() == pytest.approx([0, 0.2, 1])
    assert found["avg"].tolist() == pytest.approx([0, 0.4, 2])
    assert found["dark"].tolist() == [1, 0, 0]


def test_a_function_may_return_its_scores_alone_and_mix_with_other_rewards():
    found = score({"my_rewards:bare": 1.0, "jpeg_compressibility": 0.0})
    assert found["my_rewards:bare"].tolist() == found["avg"].tolist() == [1, 2, 3]


def test_a_class_is_built_with_the_settings_and_the_device():
    found = score({"my_rewards:Kept": 1.0})
    assert found["avg"].tolist() == [1, 1, 1] and found["cpu"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="reward 'my_rewards:Kept': an empty prompt"):
        loading.check("my_rewards:Kept", {}, [""], [{}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_reward:brightness", "can't be imported .ModuleNotFoundError"),
        ("my_rewards:brightnes", "can't be imported .AttributeError"),
        ("broken_rewards:anything", "No module named 'no_such_package'"),
        ("my_rewards:NUMBER", "is 3; needed is a function"),
        ("my_rewards:Unrelated", "needed is a function, or a class of flow_grpo.rewards.base"),
        ("my_rewards", "there is no reward 'my_rewards'; .* module:function is one's own"),
    ],
)
def test_what_can_not_be_used_is_refused_before_anything_loads(name, message):
    config = base()
    config.reward_fn = {name: 1.0}
    with pytest.raises(ValueError, match="config.reward_fn=.*" + message):
        preflight.check(config, world_size=1)
