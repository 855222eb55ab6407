"""A checkpoint that is not as it was written changes nothing: it is refused by its file's name."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import running
import torch
from safetensors.torch import load_file, save_file

from flow_grpo.launch import provenance
from flow_grpo.parallel import state
from flow_grpo.training import checkpoint, digests, folders

NUM_FLIPS = 25  # bits, of each file


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run of two epochs with an average, and a checkpoint after each."""
    keys = running.lora(files) | {"train__ema": True, "num_epochs": 2, "save_freq": 1}
    logdir = tmp_path_factory.mktemp("logs")
    return running.train(running.arguments(files, run_name="kept", logdir=logdir, **keys))


@pytest.fixture
def saved(run, tmp_path) -> Path:
    """A copy of its last checkpoint."""
    return Path(shutil.copytree(folders.checkpoints(run.folder)[-1], tmp_path / "checkpoint-4"))


def resume_point(run, folder: Path) -> Path:
    config = run.config.copy_and_resolve_references()
    config.resume_from = str(folder)
    return folders.resume_point(config, run.identity)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_every_file_has_a_digest_and_an_honest_copy_is_taken(run, saved):
    written = folders.read(saved)["files"]
    assert sorted([*written, folders.STATE]) == names(saved)
    assert resume_point(run, saved) == saved


def test_a_flipped_bit_of_any_file_is_found(run, saved):
    draw = random.Random(0)
    for name in names(saved):
        path = saved / name
        honest = path.read_bytes()
        for _ in range(NUM_FLIPS):
            bytes_, place = bytearray(honest), draw.randrange(len(honest))
            bytes_[place] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes_)
            with pytest.raises(ValueError, match=r"checkpoint-4'"):
                resume_point(run, saved)
        path.write_bytes(honest)
    assert resume_point(run, saved) == saved


def test_a_file_of_another_step_is_found(run, saved):
    earlier = folders.checkpoints(run.folder)[0]
    for name in names(saved):
        honest = (saved / name).read_bytes()
        other = (earlier / name).read_bytes()
        if other != honest and name != folders.STATE:
            (saved / name).write_bytes(other)
            with pytest.raises(ValueError, match=f"{name} is not as it was written"):
                resume_point(run, saved)
            (saved / name).write_bytes(honest)
    (saved / "weights-0.safetensors").unlink()
    with pytest.raises(ValueError, match="weights-0.safetensors is missing. Resume from"):
        resume_point(run, saved)


def forge(folder: Path, name: str, change) -> None:
    """Change a file's tensors and make its digest fit."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    content = {k: v for k, v in folders.read(folder).items() if k != digests.SEAL}
    content["files"] |= digests.of(folder, [folder / name])
    (folder / folders.STATE).write_text(json.dumps(digests.sealed(content)))


def first(tensors: dict, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def nan(tensors, ending):
    tensors[first(tensors, ending)].view(-1)[0] = torch.nan


def widen(tensors, ending):
    name = first(tensors, ending)
    tensors[name] = torch.zeros(len(tensors[name]) + 1, *tensors[name].shape[1:])


def rename(tensors, ending):
    name = first(tensors, ending)
    tensors[f"{name}.other"] = tensors.pop(name)


def lose_the_average(tensors, ending):
    for name in [name for name in tensors if name.startswith("ema/")]:
        del tensors[name]


def halve(tensors, ending):
    name = first(tensors, ending)
    tensors[name] = tensors[name].half()


def negate(tensors, ending):
    name = first(tensors, ending)
    tensors[name] = -tensors[name] - 1


WEIGHTS, OPTIMIZER = state.WEIGHTS.format(0), state.OPTIMIZER.format(0)


@pytest.mark.parametrize(
    "name, change, ending, message",
    [
        (WEIGHTS, nan, "weight", "is not finite"),
        (WEIGHTS, widen, "weight", "has the shape"),
        (WEIGHTS, rename, "weight", "belongs to no weight|is missing"),
        (WEIGHTS, halve, "weight", "the type torch.float16"),
        (WEIGHTS, lose_the_average, "weight", "ema/.* is missing"),
        (OPTIMIZER, halve, "exp_avg", "the type torch.float16"),
        (OPTIMIZER, negate, "exp_avg_sq", "exp_avg_sq is negative"),
        (OPTIMIZER, negate, "step", "step is negative"),
        (OPTIMIZER, nan, "exp_avg", "is not finite"),
        (OPTIMIZER, widen, "exp_avg_sq", "exp_avg_sq has the shape"),
    ],
)
def test_a_forged_state_changes_nothing(run, saved, name, change, ending, message):
    forge(saved, name, lambda tensors: change(tensors, ending))
    assert resume_point(run, saved) == saved  # its digests fit
    before = {key: param.clone() for key, param in running.trained_parameters(run)}
    with pytest.raises(ValueError, match=f"checkpoint-4' does not hold .*({message})"):
        checkpoint.load(run, saved)
    assert all(torch.equal(param, before[key]) for key, param in running.trained_parameters(run))


def seal(folder: Path, **changed) -> None:
    """Make all digests fit. changed: what else trainer.json is to say; None takes a key out."""
    content = json.loads((folder / folders.STATE).read_text()) | changed
    content.pop(digests.SEAL)
    content["files"] = digests.of(folder, (folder / name for name in content["files"]))
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / folders.STATE).write_text(json.dumps(digests.sealed(kept)))


@pytest.mark.parametrize("key", folders.COUNTERS)
@pytest.mark.parametrize("value", [None, -1, 2**53, 1.0, True, "3", [1], float("nan")])
def test_counters_that_no_run_wrote_are_refused_whatever_the_digest_says(run, saved, key, value):
    seal(saved, **{key: value})
    with pytest.raises(ValueError, match=f"checkpoint-4'.*trainer.json is damaged .*{key}"):
        resume_point(run, saved)
    with pytest.raises(ValueError, match=key):  # and before anything is loaded
        checkpoint.load(run, saved)


@pytest.mark.parametrize("odd", [{"train": 3}, {"train": [1]}, [], "x", {"sample": None}])
def test_an_odd_config_in_it_is_no_more_than_a_note(run, saved, odd):
    seal(saved, config=odd)
    note = provenance.differences(run.config, run.plan, resume_point(run, saved))
    assert bool(note) == bool(odd) and "config.train.beta" in note or not odd


def reindexed(change):
    def forged(folder: Path) -> str:
        path = folder / state.INDEX
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index)))
        return state.INDEX

    return forged


def rewritten(name: str, change):
    def forged(folder: Path) -> str:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return name

    return forged


def without_a_moment(index: dict) -> dict:
    index["parts"][0]["moments"].popitem()
    return index


FORGED = [
    reindexed(lambda index: []),
    reindexed(lambda index: index | {"parts": {}}),
    reindexed(lambda index: index | {"parts": [None]}),
    reindexed(lambda index: index | {"parts": [{"layout": {"a": 1}, "moments": {}}]}),
    reindexed(lambda index: {"parts": index["parts"]}),
    reindexed(lambda index: index | {"scale": {"scale": float("nan")}}),
    reindexed(lambda index: index | {"scale": {"scale": "1"}}),
    reindexed(without_a_moment),
    rewritten(state.INDEX, lambda data: b"\xff" + data),
    rewritten(state.INDEX, lambda data: b"[" * 10**5),
    rewritten(WEIGHTS, lambda data: data[:-4]),
    rewritten(WEIGHTS, lambda data: b"\xff" * 8 + data[8:]),
    rewritten(WEIGHTS, lambda data: pickle.dumps({"a": 1})),
    rewritten(OPTIMIZER, lambda data: data.replace(b"F32", b"F64", 1)),
    rewritten(OPTIMIZER, lambda data: data.replace(b"exp_avg", b"exp_abg", 1)),
]


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_forged_files_are_refused_by_name_and_change_nothing(run, saved, forged):
    name = forged(saved)
    seal(saved)
    masters = {key: value.clone() for key, value in run.engine.masters().items()}
    before = running.metrics(run.folder)
    copies = {key: value.clone() for key, value in run.snapshots.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name}.*Resume from another"):
        checkpoint.load(run, resume_point(run, saved))
    assert running.metrics(run.folder) == before
    assert all(torch.equal(v, masters[k]) for k, v in run.engine.masters().items())
    assert all(torch.equal(v, copies[k]) for k, v in run.snapshots.state_dict().items())


def test_what_is_not_finite_is_never_written(run):
    kept = {path.name: path.stat().st_mtime_ns for path in folders.checkpoints(run.folder)}
    name, param = next(iter(running.trained_parameters(run)))
    honest, run.saved = param.detach().clone(), None
    with torch.no_grad():
        param.view(-1)[0] = torch.inf
    with pytest.raises(FloatingPointError, match="is not finite, and 0 more: nothing is saved"):
        checkpoint.save(run, 0)
    param.data.copy_(honest)
    assert kept == {p.name: p.stat().st_mtime_ns for p in folders.checkpoints(run.folder)}
