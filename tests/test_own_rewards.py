"""A reward of the user's own, named as module:function in config.reward_fn."""

import sys

import numpy as np
import pytest

from config.base import base
from flow_grpo.launch import preflight
from flow_grpo.rewards import loading, options
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer

PICTURES = [np.full((4, 4, 3), value, np.uint8) for value in (0, 51, 255)]
SOURCE = """
import numpy as np
from flow_grpo.rewards.base import Reward, reward

NUMBER = 3

def brightness(images, prompts, metadata, references=None, group=None):
    means = np.array([image.mean() / 255 for image in images])
    return {"brightness": means, "dark": means < 0.1}

def bare(prompts, group):
    return [len(prompt) for prompt in prompts]

def whole(batch):
    return [len(prompt) + row["n"] for prompt, row in zip(batch.prompts, batch.metadata)]

def whole_by_default(batch, scale=10.0, group="none"):
    return [scale * len(prompt) + (group is None) for prompt in batch.prompts]

def only_images(images):
    return [image.mean() for image in images]

def long_enough(settings, prompts, metadata):
    if min(map(len, prompts)) < settings["least"]:
        raise ValueError("a prompt is too short")

@reward(check=long_enough, settings={"least": 1, "factor": 0.5})
def checked(batch, factor):
    return [factor * len(prompt) for prompt in batch.prompts]

@reward(needs_groups=True)
def compares(images, group):
    return group

def unknown(images, captions):
    return images

def any(*arguments):
    return arguments

def nothing():
    return []

class Kept(Reward):
    @classmethod
    def check(cls, settings, prompts, metadata):
        if "" in prompts:
            raise ValueError("an empty prompt")

    def __init__(self, settings, device):
        self.built_with = settings["clip"], device

    def __call__(self, batch):
        return {"Kept": np.ones(len(batch)), self.built_with[1]: np.zeros(len(batch))}

class Unrelated:
    pass

def like_jpeg(images):
    return {"like_jpeg": [1.0] * len(images), "jpeg_compressibility": [9.0] * len(images)}

def sums(images):
    return {"sums": [1.0] * len(images), "avg": [9.0] * len(images)}

def dark(images):
    return {"dark": [0.5] * len(images)}

def also_dark(images):
    return {"also_dark": [1.0] * len(images), "my_rewards:dark": [2.0] * len(images)}

def bright(images):
    return {"bright": [1.0] * len(images), "extra": [2.0] * len(images)}

def brighter(images):
    return {"brighter": [1.0] * len(images), "extra": [3.0] * len(images)}

def both(images):
    return {"both": [1.0] * len(images), "my_rewards:both": [2.0] * len(images)}

def scribbles(batch):
    for image in batch.images:
        image[:] = 7
    for row in batch.metadata:
        row["n"] += 10
        row["list"].append(1)
    for references in batch.references:
        references[0][:] = 7
    batch.group[:] = -1
    batch.prompts.clear()
    return [len(row["list"]) for row in batch.metadata]

class Scribbles(Reward):
    def __call__(self, batch):
        return {"Scribbles": scribbles(batch)}

def tensors(kind, images):
    import torch
    values = torch.tensor([0.5, -1.25, 3.0], requires_grad=kind != "bf16")
    return {"graph": values * 1, "bf16": values.bfloat16(), "list": list(values * 1),
            "named": {"named": values * 1, "half": values.half()}}[kind]

def graph(images): return tensors("graph", images)
def bf16(images): return tensors("bf16", images)
def in_a_list(images): return tensors("list", images)
def named(images): return tensors("named", images)

class Elsewhere:
    # a tensor on a device, as numpy sees it

    def __init__(self, values, here=False):
        self.values, self.here = values, here

    def __array__(self, *arguments, **named):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self): return self
    def cpu(self): return Elsewhere(self.values, True)
    def double(self): return self
    def numpy(self):
        assert self.here
        return np.array(self.values)

def on_a_device(images):
    return Elsewhere([0.5, -1.25, 3.0])
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


def score(weights, **settings):
    scorer = Scorer(weights, loading.settings(base()) | settings)
    found = scorer.score(Batch(PICTURES, ["a", "bb", "ccc"], [{"n": n} for n in range(3)]))
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bare", [1, 2, 3]),  # what it names
        ("whole", [1, 3, 5]),  # a Batch, as it has one required parameter
        ("whole_by_default", [11, 21, 31]),  # and what it names besides
        ("only_images", [0, 51, 255]),  # one parameter, and the name of a column
        ("checked", [0.5, 1, 1.5]),  # and settings of its own
    ],
)
def test_a_function_gets_the_batch_or_what_it_names(name, expected):
    assert score({f"my_rewards:{name}": 1.0})["avg"].tolist() == expected


def test_a_function_s_own_settings_may_be_set():
    assert score({"my_rewards:checked": 1.0}, factor=2.0)["avg"].tolist() == [2, 4, 6]
    assert options.settings(["factor=2", "least=3"], ["my_rewards:checked"])["least"] == 3
    with pytest.raises(ValueError, match="--set=factor=2: KEY=VALUE is needed, a key of .*clip"):
        options.settings(["factor=2"], ["my_rewards:bare"])
    config = base()
    with config.unlocked():
        config.rewards.factor = 3.0
    scorer = loading.load("my_rewards:checked", loading.settings(config), "cpu")
    assert scorer(Batch(PICTURES[:1], ["four"], [{}])) == {"my_rewards:checked": [12]}


def test_a_function_s_own_check_is_asked_before_anything_loads():
    loading.check("my_rewards:checked", {}, ["a"], [{}])
    with pytest.raises(ValueError, match="reward 'my_rewards:checked': a prompt is too short"):
        loading.check("my_rewards:checked", {}, ["a", ""], [{}] * 2)
    with pytest.raises(ValueError, match="a prompt is too short"):
        loading.check("my_rewards:checked", {"least": 2}, ["a"], [{}])
    loading.check("my_rewards:bare", {}, [""], [{}])  # which has none


def test_a_function_may_compare():
    assert loading.find("my_rewards:compares").needs_groups
    assert not loading.find("my_rewards:bare").needs_groups


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
        (
            "my_rewards:unknown",
            r"can't be called: .*'images', 'captions'.*Needed are some of images",
        ),
        ("my_rewards:any", r"can't be called: .*'arguments'.*; or a single one, for the whole"),
        ("my_rewards:nothing", r"can't be called: .*Needed are some of"),
        ("my_rewards", "there is no reward 'my_rewards'; .* module:function is one's own"),
    ],
)
def test_what_can_not_be_used_is_refused_before_anything_loads(name, message):
    config = base()
    config.reward_fn = {name: 1.0}
    with pytest.raises(ValueError, match="config.reward_fn=.*" + message):
        preflight.check(config, world_size=1)


@pytest.mark.parametrize(
    ("weights", "name", "column", "owner"),
    [
        (["like_jpeg", "jpeg_compressibility"], "like_jpeg", "jpeg_compressibility", ""),
        (["jpeg_compressibility", "like_jpeg"], "like_jpeg", "jpeg_compressibility", ""),
        (["like_jpeg"], "like_jpeg", "jpeg_compressibility", ""),
        (["sums"], "sums", "avg", ""),
        (["dark", "also_dark"], "also_dark", "my_rewards:dark", "my_rewards:dark"),
        (["also_dark", "dark"], "also_dark", "my_rewards:dark", "my_rewards:dark"),
        (["bright", "brighter"], "brighter", "extra", "my_rewards:bright"),
    ],
)
def test_a_column_that_is_another_s_is_refused(weights, name, column, owner):
    full = [each if each.startswith("jpeg") else f"my_rewards:{each}" for each in weights]
    with pytest.raises(RuntimeError) as error:
        score(dict.fromkeys(full, 1.0))
    said = f"reward 'my_rewards:{name}' returned a column {column!r}, which is that of"
    assert f"{said} {owner or column!r}" in str(error.value)


def test_a_score_returned_twice_is_refused():
    with pytest.raises(RuntimeError, match="'my_rewards:both' failed: it returned both 'both' and"):
        score({"my_rewards:both": 1.0})


@pytest.mark.parametrize("name", ["scribbles", "Scribbles"])
def test_what_a_function_writes_into_is_its_own(name):
    """Rows that share an array or a dict as well, as the images of a prompt do."""
    images = [np.full((4, 4, 3), value, np.uint8) for value in (0, 51, 255)]
    reference, row = np.zeros((4, 4, 3), np.uint8), {"n": 1, "list": []}
    reference.setflags(write=False)  # as an image is that PIL has read
    group = np.zeros(3, int)
    batch = Batch(images, ["a"] * 3, [row] * 3, [(reference,)] * 3, group)
    scorer = Scorer({f"my_rewards:{name}": 1.0, "my_rewards:only_images": 1.0}, {})
    found = scorer.score(batch)
    scorer.close()
    assert found[f"my_rewards:{name}"].tolist() == [1, 1, 1]
    assert found["my_rewards:only_images"].tolist() == [0, 51, 255]
    assert [image.max() for image in images] == [0, 51, 255] and not reference.any()
    assert row == {"n": 1, "list": []} and batch.prompts == ["a"] * 3 and not group.any()


@pytest.mark.parametrize("name", ["graph", "bf16", "in_a_list", "named", "on_a_device"])
def test_tensors_are_taken_from_where_they_are(name):
    found = score({f"my_rewards:{name}": 2.0})
    assert found[f"my_rewards:{name}"].tolist() == [0.5, -1.25, 3.0]
    assert found["avg"].tolist() == [1, -2.5, 6] and found["avg"].dtype == np.float64


def test_its_module_may_lie_in_a_package():
    config = base()
    config.reward_fn = {"scripts.testbed.one_color:redness": 0.5}
    colors = [np.zeros((2, 2, 3), np.uint8) for _ in range(2)]
    colors[1][..., 0] = 255
    batch = Batch(colors, ["a"] * 2, [{}] * 2)
    scorer = Scorer.of(config, "cpu")
    scoring = scorer.start()
    scoring.add(batch)
    assert scoring.result(600.0)["avg"].tolist() == [0, 0.5]
    scorer.close()
