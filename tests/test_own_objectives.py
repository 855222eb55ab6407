"""An objective of the user's own, named as module:Class in config.objective."""

import json
import sys
from pathlib import Path

import pytest
import running

from config.base import base, keys_of, with_objective
from flow_grpo import keys
from flow_grpo.launch import preflight, settings

ROOT = Path(__file__).parents[1]
RUN = f"{ROOT}/config/testbed.py:shapes_sd3_grpo"
SOURCE = """
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Objective
from flow_grpo.objectives.ratio.grpo import GRPO

NUMBER = 3

class Scaled(GRPO):
    keys = GRPO.keys | {
        "scaled.factor": Key(2.0, "of the loss", above=0, most=100),
        "scaled.steps": Key((), of=int, least=0, most=9),
        "train.clip_range": Key(0.25, least=0, most=1),
    }

    def loss(self, *arguments):
        loss = super().loss(*arguments)
        loss.value = loss.value * self.factor
        return loss

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        self.factor = config.scaled.factor

class Unrelated:
    keys = {}

class Clashing(Objective):
    keys = {"train.learning_rate": Key(1.0, least=0, most=1)}

class Flat(Objective):
    keys = {"factor": Key(1.0, least=0, most=1)}

class Bare(Objective):
    keys = {"bare.factor": 1.0}
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A file of the user's in the current folder, which is on no path yet."""
    (tmp_path / "my_objectives.py").write_text(SOURCE)
    (tmp_path / "broken_objectives.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_objectives", "broken_objectives"):
        sys.modules.pop(name, None)


def load(*arguments):
    return settings.load(["train.py", *arguments], RUN)[0]


def test_its_keys_are_set_on_the_command_line():
    config = load(
        "--config.scaled.factor=3",
        "--config.objective=my_objectives:Scaled",  # wherever it stands
        "--config.scaled.steps=(1, 2)",
        "--config.train.beta=0.5",
    )
    assert config.objective == "my_objectives:Scaled" and config.train.beta == 0.5
    assert config.scaled.to_dict() == {"factor": 3.0, "steps": (1, 2)}
    keys.check(config, keys_of(config))


def test_a_config_file_may_choose_it_and_set_its_keys(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from config.base import base\n"
        "def get_config(name=''):\n"
        "    config = base('my_objectives:Scaled')\n"
        "    config.scaled.factor = 4.0\n"
        "    return config\n"
    )
    config = load("--config=mine.py", "--config.scaled.steps=(3,)")
    assert config.scaled.to_dict() == {"factor": 4.0, "steps": (3,)}


def test_its_default_of_a_shared_key_counts_where_the_run_has_set_none():
    assert base("my_objectives:Scaled").train.clip_range == 0.25
    config = base("grpo")
    assert with_objective(config, "my_objectives:Scaled").train.clip_range == 0.25
    config = load("--config.objective=my_objectives:Scaled")
    assert config.train.clip_range == 1e-3  # the testbed's run sets it


@pytest.mark.parametrize("value", ["0", "101", "nan", "inf"])
def test_a_value_out_of_its_range_is_refused_with_its_meaning(value):
    config = load("--config.objective=my_objectives:Scaled", f"--config.scaled.factor={value}")
    with pytest.raises(ValueError) as error:
        preflight.check(config, world_size=1)
    assert f"config.scaled.factor={float(value)!r}: a number above 0 and at most 100 is needed" in (
        said := str(error.value)
    )
    assert "(of the loss)" in said and "The default is 2.0." in said


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.scaled.factor=much", "A value like 2.0 .float. is needed"),
        ("--config.scaled.facto=1", "no key config.scaled.facto.*mean --config.scaled.factor?"),
        ("--config.nft.beta=1", "key is of the objective nft, and config.objective is 'my_objec"),
    ],
)
def test_a_mistake_in_its_keys_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        load("--config.objective=my_objectives:Scaled", argument)


def test_a_key_that_another_objective_reads_is_refused_with_its_name():
    with pytest.raises(ValueError) as error:
        load("--config.nft.beta=0.5")
    assert "--config.nft.beta=0.5: this key is of the objective nft, and config.objective is " in (
        said := str(error.value)
    )
    assert "'grpo'. Add --config.objective=nft, or leave the key out." in said
    assert load("--config.nft.beta=0.5", "--config.objective=nft").nft.beta == 0.5
    with pytest.raises(
        ValueError, match="of the objective grpo and .*, and config.objective is 'nft'"
    ):
        load("--config.objective=nft", "--config.train.kl_mode=x")  # though the run has it


@pytest.mark.parametrize(
    "name, message",
    [
        ("my_objective:Scaled", "can't be imported .ModuleNotFoundError.* as module:class"),
        ("my_objectives:Scale", "can't be imported .AttributeError"),
        ("broken_objectives:Any", "No module named 'no_such_package'"),
        ("my_objectives:NUMBER", "is 3; needed is a class of flow_grpo.objectives.base.Objective"),
        ("my_objectives:Unrelated", "needed is a class of flow_grpo.objectives.base.Objective"),
        ("my_objectives:Clashing", "declares train.learning_rate, which config/base.py has"),
        ("my_objectives:Flat", "declares 'factor': .* needed is section.key"),
        ("my_objectives:Bare", "declares 'bare.factor': 1.0; needed is section.key"),
        ("my_objectives", "one of grpo, .* is needed, or module:Class of one's own"),
    ],
)
def test_what_is_no_objective_is_refused(name, message):
    with pytest.raises(ValueError, match=f"config.objective='{name}'.*{message}"):
        load(f"--config.objective={name}")


def test_it_trains_with_its_keys(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(ROOT)
    given = {"objective": "my_objectives:Scaled", "scaled__factor": 3.0}
    norms = []
    for name, more in (("own", given), ("grpo", {})):
        argv = running.arguments(files, run_name=name, logdir=tmp_path, num_epochs=1, **more)
        rows = running.metrics(running.train(argv).folder)
        norms.append(next(row["grad_norm"] for row in rows if row["kind"] == "update"))
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert written["scaled"]["factor"] == 3.0
    assert norms[0] == pytest.approx(3 * norms[1], rel=1e-4) != 0
