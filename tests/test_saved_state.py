"""Every field of a saved state: altered in the files, it is seen in the run that resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import running
import torch
from safetensors.torch import load_file, save_file

from flow_grpo.launch import provenance
from flow_grpo.parallel import state
from flow_grpo.training import checkpoint, digests, folders
from flow_grpo.training.snapshots import Held

WEIGHTS, OPTIMIZER = state.WEIGHTS.format(0), state.OPTIMIZER.format(0)
KEYS = {  # a full fine-tune, so that the reference is a copy too
    "objective": "nft",
    "use_lora": False,
    "train__ema": True,
    "num_epochs": 1,
    "seed": 7,
}


def prepare(files, logdir, **keys):
    run = running.prepare(running.arguments(files, logdir=logdir, **KEYS, **keys))
    # As on a GPU in fp16; nothing overflows.
    run.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return run


@pytest.fixture(scope="module")
def written(files, tmp_path_factory) -> Path:
    """A checkpoint after some updates, of which some were skipped."""
    run = prepare(files, tmp_path_factory.mktemp("logs"), run_name="written")
    running.break_losses(run, {0})
    running.entry.execute(run)
    run.updater.num_skipped_in_a_row = 2
    run.saved = None
    checkpoint.save(run, run.tracker.num_bytes)
    return folders.checkpoints(run.folder)[-1]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    return prepare(files, tmp_path_factory.mktemp("logs"), run_name="resumed")


@pytest.fixture
def saved(written, run) -> Path:
    """A copy of the checkpoint, in the folder of the run that resumes."""
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    (run.folder / "metrics.jsonl").write_bytes(b"x" * 10_000)
    return Path(shutil.copytree(written, run.folder / "checkpoints" / written.name))


def in_json(file: str, *path):
    """Return what reads a value of a JSON file, and what replaces it."""

    def parent(content):
        for name in path[:-1]:
            content = content[name]
        return content

    def read(folder):
        return parent(json.loads((folder / file).read_text()))[path[-1]]

    def write(folder, value):
        content = json.loads((folder / file).read_text())
        parent(content)[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return read, write


def in_tensors(file: str, belongs):
    """Return what reads those tensors of a file whose names belong, and what replaces them."""

    def read(folder):
        return {n: t for n, t in load_file(folder / file).items() if belongs(n)}

    def write(folder, tensors):
        save_file(load_file(folder / file) | tensors, folder / file)

    return read, write


def seal(folder: Path) -> None:
    """Let the digests fit what was altered."""
    state = json.loads((folder / folders.STATE).read_text())
    content = {key: value for key, value in state.items() if key != digests.SEAL}
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != folders.STATE]
    content["files"] = digests.of(folder, names)
    (folder / folders.STATE).write_text(json.dumps(digests.sealed(content)))


def moments(run, kind: str) -> dict[str, torch.Tensor]:
    return {f"{n}/{kind}": m[kind] for n, m in run.engine.get_state()[1].items()}


def snapshot(run, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for key, value in run.snapshots.values(name).items()}


def note(run, folder: Path) -> str:
    return provenance.differences(run.config, run.plan, folder)


TRAINER, INDEX = folders.STATE, state.INDEX
NUMBERS = {  # where it stands, another value, where the run has it
    "epoch": (in_json(TRAINER, "epoch"), 5, lambda run: run.epoch),
    "num_updates": (in_json(TRAINER, "num_updates"), 9, lambda run: run.updater.num_updates),
    "num_skipped": (in_json(TRAINER, "num_skipped"), 6, lambda run: run.updater.num_skipped),
    "num_skipped_in_a_row": (
        in_json(TRAINER, "num_skipped_in_a_row"),
        3,
        lambda run: run.updater.num_skipped_in_a_row,
    ),
    "metrics_bytes": (in_json(TRAINER, "metrics_bytes"), 77, lambda run: run.tracker.num_bytes),
} | {
    f"scale {name}": (
        in_json(INDEX, "scale", name),
        value,
        lambda run, name=name: run.engine.scaler.state_dict()[name],
    )
    for name, value in {
        "scale": 64.0,
        "growth_factor": 3.0,
        "backoff_factor": 0.25,
        "growth_interval": 11,
        "_growth_tracker": 4,
    }.items()
}
COPIES = ("policy", "ema", "old", "reference")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
TENSORS = {
    name: (
        in_tensors(WEIGHTS, lambda key, name=name: key.startswith(f"{name}/")),
        lambda run, name=name: snapshot(run, name),
    )
    for name in COPIES
} | {
    kind: (
        in_tensors(OPTIMIZER, lambda key, kind=kind: key.endswith(f"/{kind}")),
        lambda run, kind=kind: moments(run, kind),
    )
    for kind in MOMENTS
}
REFUSED = {  # another value of it, and the words of the refusal
    "layout": (in_json(INDEX, "parts", 0, "layout"), {}, "holds the state of 0 weights"),
    "moments": (in_json(INDEX, "parts", 0, "moments"), {}, "does not fit index.json"),
    "parts": (
        in_json(INDEX, "parts"),
        [{"layout": {}, "moments": {}}] * 2,
        r"in 2 part\(s\); this run",
    ),
}
TOLD = {
    "config": (in_json(TRAINER, "config", "seed"), 8, "config.seed=7 (was 8)"),
    "cut": (
        in_json(TRAINER, "cut", "optimizer step(s) a pass"),
        3,
        "2 optimizer step(s) a pass (was 3)",
    ),
    "prompts": (in_json(TRAINER, "prompts"), "0" * 64, "other training prompts"),
    "versions": (in_json(TRAINER, "versions", "peft"), "0.0.1", "(was 0.0.1)"),
}
IN_DIGESTS = {"files", digests.SEAL}  # see test_digests.py


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_was_altered_is_the_resumed_run_s(run, saved, name):
    (read, write), other, found = NUMBERS[name]
    honest = read(saved)
    checkpoint.load(run, saved)
    assert found(run) == honest != other
    write(saved, other)
    seal(saved)
    checkpoint.load(run, saved)
    assert found(run) == other


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_were_altered_are_the_resumed_run_s(run, saved, name):
    (read, write), found = TENSORS[name]
    altered = {key: value + 1 for key, value in read(saved).items()}
    write(saved, altered)
    seal(saved)
    checkpoint.load(run, saved)
    seen = found(run)
    assert altered.keys() == seen.keys() and altered
    assert all(torch.equal(value, seen[key]) for key, value in altered.items())


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_of_another_make_is_refused(run, saved, name):
    (_, write), other, words = REFUSED[name]
    write(saved, other)
    seal(saved)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(run, saved)


@pytest.mark.parametrize("name", TOLD)
def test_what_only_a_note_needs_is_told(run, saved, name):
    (_, write), other, words = TOLD[name]
    assert note(run, saved) == ""
    write(saved, other)
    seal(saved)
    assert words in note(run, saved)


def test_each_part_of_the_identity_that_was_altered_is_refused(run, saved):
    config = run.config.copy_and_resolve_references()
    config.resume_from = str(saved)
    assert folders.resume_point(config, run.identity) == saved
    for name, honest in run.identity.items():
        _, write = in_json(TRAINER, "identity", name)
        write(saved, "another")
        seal(saved)
        with pytest.raises(ValueError, match=f"was written with {name.split('(')[0]}.*'another'"):
            folders.resume_point(config, run.identity)
        write(saved, honest)


def test_no_field_is_left_out_here(written, run):
    trainer = json.loads((written / TRAINER).read_text())
    index = json.loads((written / INDEX).read_text())
    plain = {name for name in NUMBERS if not name.startswith("scale ")}
    assert trainer.keys() == plain | TOLD.keys() | IN_DIGESTS | {"identity"}
    assert trainer["identity"].keys() == run.identity.keys()
    assert index.keys() == {"scale", "parts"} and index["parts"][0].keys() == {"layout", "moments"}
    assert {f"scale {name}" for name in index["scale"]} == NUMBERS.keys() - plain
    assert {name.split("/")[0] for name in load_file(written / WEIGHTS)} == set(COPIES)
    assert {name.split("/")[-1] for name in load_file(written / OPTIMIZER)} == set(MOMENTS)
    assert {kind for each in index["parts"][0]["moments"].values() for kind in each} == set(MOMENTS)


def test_a_held_start_has_every_field_too(run, saved):
    checkpoint.load(run, saved)
    seen = {name: found(run) for name, (_, _, found) in NUMBERS.items()}
    tensors = {
        name: {k: v.clone() for k, v in found(run).items()} for name, (_, found) in TENSORS.items()
    }
    held = Held(run.engine, run.snapshots, run.updater)
    for name, ((_, write), other, _) in NUMBERS.items():
        write(saved, other if name not in ("epoch", "metrics_bytes") else seen[name])
    for (read, write), _ in TENSORS.values():
        write(saved, {key: value + 1 for key, value in read(saved).items()})
    seal(saved)
    checkpoint.load(run, saved)
    assert run.updater.num_skipped == 6 != seen["num_skipped"]
    held.restore()
    assert {name: found(run) for name, (_, _, found) in NUMBERS.items()} == seen
    for name, (_, found) in TENSORS.items():
        again = found(run)
        assert all(torch.equal(value, again[key]) for key, value in tensors[name].items()), name
