"""Names of runs, checkpoints and paths; what a refusal or a stopped run says to paste."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from config.base import COMMON, base
from flow_grpo import keys
from flow_grpo.launch import preflight, provenance, settings, space, tools, weights
from flow_grpo.prompts import Prompt
from flow_grpo.rewards import options
from flow_grpo.training import checkpoint, digests, folders

ROOT = Path(__file__).parent.parent
COUNTED = dict.fromkeys(folders.COUNTERS, 0) | {"epoch": 2, "num_updates": 2}


def make(run: Path, name: str, **changed) -> Path:
    """Write a checkpoint of no weights."""
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    state = {"files": {}, "identity": {}} | COUNTED | changed
    (folder / folders.STATE).write_text(json.dumps(digests.sealed(state)))
    return folder


@pytest.fixture
def config(tmp_path):
    config = base(None)
    config.logdir, config.run_name = str(tmp_path / "my logs"), "x"
    return config


@pytest.fixture
def run(config):
    return Path(config.logdir) / "x"


COPIES = ["checkpoint-2-best", "checkpoint-2.bak", "checkpoint-2 (copy)", "my checkpoint-3"]
COPIES += [
    "checkpoint-",
    "checkpoint--3",
    "checkpoint-3.0",
    "checkpoint-٣",
    ".writing-checkpoint-9",
]


@pytest.mark.parametrize("name", COPIES)
def test_only_checkpoint_and_digits_is_a_runs_checkpoint(config, run, name):
    copy = make(run, name)
    own = [make(run, f"checkpoint-{number}") for number in (2, 10)]
    assert folders.checkpoints(run) == own
    config.resume_from = "latest"
    assert folders.resume_point(config, {}) == own[1]
    checkpoint._prune(run, 1)
    assert folders.checkpoints(run) == own[1:]
    assert copy.exists() == (not name.startswith(".writing"))


class Tracker:
    def cut(self, num_bytes):
        self.length = num_bytes


def load(run: Path, folder: Path) -> Tracker:
    """What loading does to the run's folder."""
    engine = SimpleNamespace(load=lambda folder, copies: {})
    snapshots = SimpleNamespace(load_state_dict=lambda state: None, names=[])
    ranks = SimpleNamespace(is_main=True, barrier=lambda: None)
    fake = SimpleNamespace(engine=engine, snapshots=snapshots, ranks=ranks, tracker=Tracker())
    fake.folder, fake.updater = run, SimpleNamespace()
    checkpoint.load(fake, folder)
    return fake.tracker


@pytest.mark.parametrize("kind", ["last", "checkpoint-7", "outside"])
def test_a_link_to_a_checkpoint_is_that_checkpoint(config, run, tmp_path, kind):
    own = [make(run, f"checkpoint-{number}") for number in (1, 2, 3)]
    link = tmp_path / "to" if kind == "outside" else run / "checkpoints" / kind
    link.symlink_to(own[1])
    config.resume_from = str(link)
    found = folders.resume_point(config, {})
    assert found.samefile(own[1])
    assert load(run, found).length == 0
    assert [path for path in own if path.exists()] == own[:2]


@pytest.mark.parametrize("place", ["checkpoints/checkpoint-2-best", "kept/checkpoint-2", "best"])
def test_a_copy_in_the_runs_folder_goes_on_where_it_was_made(config, run, place):
    own = [make(run, f"checkpoint-{n}", num_updates=n) for n in (1, 2, 3)]
    copy = shutil.copytree(own[1], run / place)
    config.resume_from = str(copy)
    assert load(run, folders.resume_point(config, {})).length == 0
    assert [path for path in own if path.exists()] == own[:2] and copy.exists()


def test_a_checkpoint_that_was_moved_and_linked_is_pruned_as_others_are(run, tmp_path):
    make(run, "checkpoint-1").rename(tmp_path / "moved")
    (run / "checkpoints" / "checkpoint-1").symlink_to(tmp_path / "moved")
    kept = make(run, "checkpoint-2")
    checkpoint._prune(run, 1)
    assert folders.checkpoints(run) == [kept] and (tmp_path / "moved").is_dir()
    assert os.listdir(run / "checkpoints") == ["checkpoint-2"]


DAMAGED = ["", "{", "[]", "null", "{}", '{"format": 2}', '{"format": 2, "files": []}', "\x00"]
EDITED = [{"epoch": "2"}, {"epoch": -1}, {"num_updates": None}, {"metrics_bytes": 1.5}]
EDITED += [{"files": {"a": "1"}}, {"files": []}, {"identity": 3}, {"epoch": True}]


@pytest.mark.parametrize("wanted", ["latest", "auto", "path"])
@pytest.mark.parametrize("state", [*DAMAGED, *EDITED], ids=str)
def test_a_trainer_json_that_no_run_wrote_is_refused_with_an_older_checkpoint(
    config, run, state, wanted
):
    older, damaged = make(run, "checkpoint-1"), make(run, "checkpoint-2")
    make(run, "checkpoint-3" if wanted == "path" else "checkpoint-0")
    file = damaged / folders.STATE
    if isinstance(state, dict):
        state = json.dumps(json.loads(file.read_text()) | state)
    file.write_text(state)
    config.resume_from = str(damaged) if wanted == "path" else wanted
    with pytest.raises(ValueError) as error:
        folders.resume_point(config, {})
    message = str(error.value)
    assert str(damaged) in message and "trainer.json is damaged or was changed by hand" in message
    (option,) = shlex.split(message.partition("older checkpoint: ")[2])
    assert option == f"--config.resume_from={older}"


REFUSED = ["..", ".", "../x", "a/../b", "/tmp/x", "a//b", "a/", "/", "./a", "~", "~/a", " ", " a"]
REFUSED += ["a ", "a/ b", "a\nb", "a\0b", "a/checkpoints/b", "images", "..."[:2] + "/.."]


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(ValueError) as error:
        preflight._check_name(name)
    assert f"config.run_name={name!r}" in str(error.value) and "--config.logdir=" in str(
        error.value
    )


@pytest.mark.parametrize(
    "name", ["a", "a b", "sweep/lr 1", "x..y", ".hidden", "-x", "größe", "a'b"]
)
def test_another_run_name_is_a_folder_and_its_remedy_can_be_pasted(config, name):
    preflight._check_name(name)
    config.run_name = name
    folder = Path(config.logdir) / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    argv = ["s.py", "--config", "c.py:r", f"--config.logdir={config.logdir}"]
    again = provenance.command(argv, 1, run_name=name, resume_from="latest")
    with pytest.raises(ValueError) as error:
        preflight._check_folder(config, again)
    pasted = shlex.split(str(error.value).partition("continue the run with: ")[2])
    assert pasted == ["python", *argv, f"--config.run_name={name}", "--config.resume_from=latest"]
    assert settings.load(["s.py", *pasted[4:]], "config/testbed.py:shapes_sd3")[0].run_name == name


def test_a_command_to_paste_says_no_key_twice():
    argv = ["s.py", "--config.run_name=x", "--config.resume_from=latest", "--config.seed=1"]
    command = provenance.command(argv, 1, run_name="x", resume_from="latest")
    assert shlex.split(command) == ["python", argv[0], argv[3], argv[1], argv[2]]


PATHS = [name for name, key in COMMON.items() if key.is_path]


def test_every_key_of_a_path_is_one():
    named = {"logdir", "resume_from", "dataset", "encoder_cache", "reward_token_file"}
    named |= {"pretrained.model", "train.lora_path", "rewards.clip", "rewards.judge_templates"}
    assert named < set(PATHS)
    words = ("folder", "file", ".pt", ".safetensors", "hub id", "warm start")
    told = {name for name, key in COMMON.items() if any(w in str(key.meaning) for w in words)}
    assert told - set(PATHS) <= {"run_name", "eval_split"}


@pytest.mark.parametrize("name", PATHS)
def test_a_tilde_is_the_home_in_every_path(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["s.py", f"--config.{name}=~/a b"]
    config = settings.load(argv, "config/testbed.py:shapes_sd3")[0]
    assert keys.get(config, name) == f"{tmp_path}/a b"
    config = base(None)
    keys.parent(config, name)[name.rpartition(".")[2]] = "~"  # as a config file may
    keys.check(config, COMMON)
    assert keys.get(config, name) == str(tmp_path)
    argv[1] = f"--config.{name}=~nobody-of-this-name/a"
    with pytest.raises(ValueError, match=rf"config.{name}=.*there is no such user"):
        settings.load(argv, "config/testbed.py:shapes_sd3")
    argv[1] = f"--config.{name}=a~b"
    config = settings.load(argv, "config/testbed.py:shapes_sd3")[0]
    assert keys.get(config, name) == "a~b"


def test_a_tilde_is_the_home_in_what_scripts_are_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lora").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert weights.find("~/lora").path == tmp_path / "lora"
    found = options.settings(["hpsv2=~/hps.pt"], ["jpeg_compressibility"])
    assert found["hpsv2"] == f"{tmp_path}/hps.pt"
    (tmp_path / "run.py").write_text("from config.testbed import shapes_sd3 as get_config\n")
    assert settings.load(["s.py", "--config=~/run.py"], "")[1] == "default"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("case", ["full", "copies", "lora", "warm start", "resumed", "unknown"])
def test_a_folder_without_room_for_a_checkpoint_is_refused(tmp_path, case, monkeypatch):
    copies = case == "copies"  # the average, the reference and what draws
    config, _ = settings.load(["s.py"], f"config/{'sft' if copies else 'grpo'}.py:pickscore_sd3")
    config.train.ema, config.train.beta = copies, float(copies)
    config.logdir, config.train.lora_rank = str(tmp_path), 4
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    tensors = {"block.to_q.weight": torch.zeros(100, 60), "proj.weight": torch.zeros(10, 10)}
    if case != "unknown":
        save_file(tensors, model / "transformer" / "m.safetensors")
    config.pretrained.model, config.use_lora = str(model), case not in ("full", "copies")
    if case == "warm start":
        config.train.lora_path = str(model / "transformer" / "m.safetensors")
    resumed = None
    if case == "resumed":
        resumed = make(tmp_path / "x", "checkpoint-1", files={"a": "a digest"})
        (resumed / "a").write_bytes(b"x" * 700)
    needed = {
        "full": 6100 * 16,
        "copies": 6100 * 28,
        "lora": 640 * 16,
        "warm start": 6100 * 16,
        "resumed": 700,
    }
    least = needed.get(case, 16)
    for free, fits in ((least - 1, False), (least, True)):
        usage = Usage(10**9, 0, free)
        monkeypatch.setattr(space.shutil, "disk_usage", lambda folder, usage=usage: usage)
        if fits:
            space.check(config, ("to_q",), tmp_path, resumed)
        else:
            with pytest.raises(ValueError, match="config.logdir=.*MiB are free there. Make room"):
                space.check(config, ("to_q",), tmp_path, resumed)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch, tracker):
    monkeypatch.setitem(preflight.TRACKERS, tracker, lambda: False)
    config = base(None)
    config.tracker = tracker
    with pytest.raises(ValueError, match=f"config.tracker='{tracker}': .*`pip install "):
        preflight._check_tracker(config)
    config.tracker = "none"
    preflight._check_tracker(config)


DATA = [Prompt("a cat"), Prompt("a dog", {"tag": "t"})]
CHANGES = {
    "dataset": ({"dataset": "dataset/ocr"}, DATA, "config.dataset='dataset/ocr' (was '')"),
    "reward": ({"reward_fn": {"ocr": 1.0}}, DATA, "config.reward_fn={'ocr': 1.0} (was {'jpeg"),
    "detector": ({"rewards.geneval_score": "strict"}, DATA, "geneval_score='strict' (was 'soft')"),
    "engine": ({"ocr_engine": "paddleocr"}, DATA, "config.ocr_engine='paddleocr'"),
    "prompts": ({}, DATA[:1], "other training prompts"),
    "tags": ({}, [DATA[0], Prompt("a dog", {"tag": "u"})], "other training prompts"),
    "none": ({"num_epochs": 7, "logdir": "elsewhere"}, DATA, ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_resumed_with_other_data_or_another_reward_says_so(run, case):
    changed, prompts, told = CHANGES[case]
    written = {"config": json.loads(base().to_json_best_effort()), "prompts": folders.digest(DATA)}
    saved, config = make(run, "checkpoint-1", **written), base()
    with config.unlocked():
        config.update_from_flattened_dict({k: v for k, v in changed.items() if k != "reward_fn"})
        config.reward_fn = changed.get("reward_fn", config.reward_fn)
    plan = SimpleNamespace(train_prompts=prompts, world_size=1, num_updates=2)
    note = provenance.differences(config, plan, saved)
    assert told in note and bool(told) == bool(note)
    older = make(run, "checkpoint-2")
    assert provenance.differences(config, plan, older) == ""


@pytest.mark.parametrize(
    "said, shown",
    [
        ("config.height=100: no", "--size=100: no"),
        ("config.resolution=100x90: no", "--size=100x90: no"),
        ("Set --config.pretrained.model='x'.", "Set --model='x'."),
        ("config.num_frames=2, config.seed=1", "--num_frames=2, config.seed=1"),
    ],
)
def test_a_tools_messages_name_its_own_options(monkeypatch, said, shown):
    def refuse(*_):
        raise ValueError(said)

    monkeypatch.setattr(tools, "_load", refuse)
    with pytest.raises(ValueError) as error:
        tools.load(None, (), None)
    assert str(error.value) == shown


@pytest.mark.parametrize("given", ["NEW", "sde=x", "cps=2", "dance=-1", "sde=nan", "sde=inf"])
def test_a_kernel_or_level_that_is_none_is_refused_by_the_options_name(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["noise_level.py", "--kernels", given])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / "demo" / "noise_level.py"), run_name="__main__")
    assert left.value.code == 2 and "error: --kernels" in capsys.readouterr().err
