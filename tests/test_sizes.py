"""Prompts that name the size of their pictures: several sizes in an epoch, each by its own grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import running
import tiny
import torch
from forking import FSDP, ON_CPU, on_ranks, zero
from toy import plan_of

from flow_grpo import prompts
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.evaluation import protocol
from flow_grpo.evaluation.evaluate import at_sizes, score_prompts
from flow_grpo.launch import provenance, settings
from flow_grpo.launch.estimate.model import Fake, describe
from flow_grpo.plan import make
from flow_grpo.records import Size
from flow_grpo.report.images import read_sheet
from flow_grpo.sampling import decode
from flow_grpo.training import collect, folders, loop
from flow_grpo.training.gate import gate

NAMED = (None, "32x64", None, "32x64", "64x32", None)  # of the prompts, height x width
SQUARE, WIDE, TALL = Size(32, 32), Size(32, 64), Size(64, 32)


def write(folder: Path, named=NAMED) -> Path:
    """Write a data set of running.PROMPTS, some of which name a size."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"prompt": text} | ({"size": size} if size else {})
        for text, size in zip(running.PROMPTS, named, strict=True)
    ]
    for split in ("train", "test"):
        path = folder / f"{split}_metadata.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sized")
    tiny.save("flux", folder / "flux")
    for name, named in {"mixed": NAMED, "wide": ["32x64"] * 6, "plain": [None] * 6}.items():
        write(folder / name, named)
    return folder


def arguments(files: Path, data: Path, name: str, model: str = "sd3", **keys) -> list[str]:
    keys = {"dataset": data / name, "train__learning_rate": 1e-3, "mixed_precision": "no"} | keys
    if model == "flux":
        keys = {"pretrained__model": data / "flux", "sample__guidance_scale": 2.5} | keys
    return running.arguments(files, **keys)


def updates(run) -> list[dict]:
    return [row for row in running.metrics(run.folder) if row["kind"] == "update"]


def columns(sampled: collect.Sampled) -> dict:
    """By row, (group, member): its picture's size, and what is stored of its path."""
    found = {}
    for rollout, _ in sampled.parts:
        for n, row in enumerate(rollout.batch.owners):
            stored = rollout.final[n], rollout.latents[n], rollout.log_probs[n], rollout.steps[n]
            found[row] = rollout.batch.size, stored
    return found


def test_each_picture_of_an_epoch_is_that_of_a_run_of_its_size_alone(files, data, tmp_path):
    keys = {"model": "flux", "logdir": tmp_path, "sample__num_batches_per_epoch": 6}
    keys["train__gradient_accumulation_steps"] = 3
    sides = {SQUARE: (32, 32), WIDE: (32, 64), TALL: (64, 32)}
    mixed = running.prepare(arguments(files, data, "mixed", **keys), Flux)
    sampled = collect.roll_out(mixed, 0, for_gate=True)
    assert sorted(len(rows) for rows in sampled.for_gate) == [4, 4, 4]
    gate(mixed, sampled.for_gate, 0)
    assert {*running.gate(mixed.folder).values(), *running.gate(mixed.folder, "step").values()} == {
        0.0
    }
    rows, seen = columns(sampled), set()
    _, pictures = score_prompts(mixed.evaluator, mixed.plan.eval_prompts, range(6))
    grids = set()
    for size, (height, width) in sides.items():
        own = arguments(files, data, "plain", height=height, width=width, **keys)
        alone = running.prepare(own, Flux)
        expected = columns(collect.roll_out(alone, 0))
        assert torch.equal(mixed.schedule.at(size).sigmas, alone.schedule.sigmas)
        grids.add(tuple(alone.schedule.sigmas.tolist()))
        for row, (its, stored) in rows.items():
            if its == size:
                seen.add(row)
                assert all(map(torch.equal, stored, expected[row][1]))
        _, theirs = score_prompts(alone.evaluator, alone.plan.eval_prompts, range(6))
        for n, prompt in enumerate(mixed.plan.eval_prompts):
            if prompt.size == size:
                assert np.array_equal(pictures[n], theirs[n])
    assert seen == set(rows) and len(rows) == 24
    assert len(grids) == 2  # the shift is by the number of tokens
    assert mixed.schedule.sigmas.isnan().all()  # so that a loss of one's own can't take the wrong


def test_an_advantage_stays_beside_its_picture(files, data, tmp_path):
    keys = {"logdir": tmp_path, "sample__num_batches_per_epoch": 6}
    run = running.prepare(arguments(files, data, "mixed", **keys))
    sampled = collect.roll_out(run, 0)
    table, calls = collect.table_of(run, sampled.parts), run.calls(0, 0)
    assert table.group.tolist() == [row.group for call in calls for row in call.rows]
    assert len(table.sizes.diff().nonzero()) > 2  # they come in turns
    scores = collect.score(run, sampled)
    collect.weigh(run, sampled, scores, 0)
    images = [image.astype(float) for image in sampled.images]
    found = {}  # by the place of its picture in the order of scores
    for rollout, _ in sampled.parts:
        for n, drawn in enumerate(decode(run.pipeline, rollout)):
            apart = [
                np.abs(image - drawn).mean() if image.shape == drawn.shape else np.inf
                for image in images
            ]
            found[int(np.argmin(apart))] = rollout.advantages[n].item()
    assert len(sampled.parts) > 1 and sorted(found) == list(range(24))
    groups = scores["avg"].reshape(6, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    ours = [found[n] for n in range(24)]
    np.testing.assert_allclose(ours, expected.ravel(), rtol=1e-2, atol=1e-9)  # 1e-4 more std


@pytest.fixture(scope="module")
def trained(files, data, tmp_path_factory):
    keys = {"logdir": tmp_path_factory.mktemp("logs"), "train__gradient_accumulation_steps": 4}
    return running.train(arguments(files, data, "mixed", **keys))


def test_a_run_of_several_sizes_trains_and_shows_them(trained):
    assert [row["approx_kl"] for row in updates(trained)] == [0, 0]  # of all rows, exactly
    assert str(trained.plan).startswith("1 rank(s), 6 prompts of 32x32, 32x64, 64x32; an epoch: 4")
    texts, tiles = read_sheet(trained.folder / "images" / "eval-000000.png")
    assert texts == running.PROMPTS and {tile.size for tile in tiles} == {(64, 64)}


def test_a_run_that_goes_on_with_other_sizes_says_so(trained, tmp_path):
    saved = folders.checkpoints(trained.folder)[-1]
    assert provenance.differences(trained.config, trained.plan, saved) == ""
    write(tmp_path / "other", ("64x64", *NAMED[1:]))
    other = prompts.read(str(tmp_path / "other"), "train", SQUARE)
    plan = replace(trained.plan, train_prompts=other)
    assert "other training prompts" in provenance.differences(trained.config, plan, saved)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_prompts_of_one_size_train_as_a_config_of_that_size(files, data, tmp_path, model):
    family = (Flux,) if model == "flux" else ()
    named = arguments(files, data, "wide", model, logdir=tmp_path / "named")
    given = arguments(files, data, "plain", model, logdir=tmp_path / "given", width=64)
    found, expected = (running.train(argv, *family) for argv in (named, given))
    assert running.metrics(found.folder) == running.metrics(expected.folder)
    ours, theirs = running.weights(found.folder), running.weights(expected.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_resumed_run_of_several_sizes_is_the_whole_one(files, data, tmp_path):
    keys = running.lora(files) | {"logdir": tmp_path, "num_epochs": 4}
    whole = running.train(arguments(files, data, "mixed", run_name="whole", **keys))
    running.train(arguments(files, data, "mixed", run_name="part", **keys | {"num_epochs": 2}))
    again = keys | {"run_name": "part", "resume_from": "latest"}
    resumed = running.train(arguments(files, data, "mixed", **again))
    ours, theirs = running.weights(resumed.folder), running.weights(whole.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    rows = [
        [r for r in running.metrics(x.folder) if r["kind"] == "update"] for x in (whole, resumed)
    ]
    assert rows[0] == rows[1]


WAYS = {
    "dropped": {
        "train__drop_equal_groups": True,
        "train__best_and_worst": 1,
        "sample__max_refills": 2,
        "train__reward_kl": 0.1,
    },
    "trunk": {"sample__branching": "trunk", "sample__sde_window_range": (1, 4)},
    "shared": {"sample__branching": "shared_prefix", "sample__same_latent": True},
    "tree": {"sample__branching": "tree"},
    "strides": {
        "sample__branching": "strides",
        "sample__num_image_per_prompt": 8,
        "sample__num_batches_per_epoch": 8,
    },
    "replayed": {"train__old_log_prob": "replay", "train__step_weight": "std", "train__beta": 0.1},
    "guarded": {"objective": "grpo_guard", "train__num_inner_epochs": 2},
    "nft": {"objective": "nft"},
    "dgpo": {"objective": "dgpo"},
    "crd": {"objective": "crd"},
    "dpo": {"objective": "dpo"},
    "sft": {"objective": "sft"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_chosen_of_a_group_trains_at_several_sizes(files, data, tmp_path, way):
    keys = {"model": "flux", "logdir": tmp_path, "num_epochs": 1} | WAYS[way]
    run = running.train(arguments(files, data, "mixed", **keys), Flux)
    rows = updates(run)
    assert rows and all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    if "approx_kl" in rows[0] and way != "dgpo":
        assert rows[0]["approx_kl"] == 0


def as_rank(files: Path, data: Path, logs: Path, num_batches: int, **keys) -> None:
    """Train an epoch on these ranks, and keep what each drew and what came of it."""
    keys |= {"sample__num_batches_per_epoch": num_batches, "logdir": logs, "run_name": "run"}
    keys |= {"num_epochs": 1, "model": "flux"}
    accumulate = {"train__gradient_accumulation_steps": num_batches}
    run = running.prepare(arguments(files, data, "mixed", **keys, **accumulate), Flux)
    honest = collect.weigh

    def weigh(run, sampled, scores, epoch):
        torch.save(columns(sampled), logs / f"{run.ranks.rank}.pt")
        return honest(run, sampled, scores, epoch)

    collect.weigh = weigh
    try:
        loop.train(run)
    finally:
        collect.weigh = honest
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [ON_CPU, zero(3), FSDP], ids=["ddp", "zero3", "fsdp2"])
def test_two_ranks_draw_and_train_what_one_does(files, data, tmp_path, engine):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    as_rank(files, data, tmp_path / "one", 8)
    on_ranks(2, engine, as_rank, files, data, tmp_path / "two", 4)
    whole = torch.load(tmp_path / "one" / "0.pt", weights_only=False)
    halves = [torch.load(tmp_path / "two" / f"{n}.pt", weights_only=False) for n in (0, 1)]
    assert {size for size, _ in halves[0].values()} != {size for size, _ in halves[1].values()}
    assert whole.keys() == halves[0].keys() | halves[1].keys()
    for row, (size, stored) in (halves[0] | halves[1]).items():
        assert size == whole[row][0] and all(map(torch.equal, stored, whole[row][1]))
    one, two = (running.metrics(tmp_path / name / "run") for name in ("one", "two"))
    (ours,), (theirs,) = ([row for row in rows if row["kind"] == "update"] for rows in (two, one))
    assert ours["approx_kl"] == theirs["approx_kl"] == 0
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert running.gate(tmp_path / "two" / "run") == running.gate(tmp_path / "one" / "run")


def test_a_micro_batch_holds_rows_of_one_size_and_is_filled_up_by_its_own():
    sizes = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    plan = replace(plan_of(2, 4), num_updates=1, micro_batch_size=2, row_sizes=sizes)
    alone = [[np.array([n]) for n in (0, 2, 4, 5, 6)]]
    (((micros,),),) = plan.in_sets(alone, [np.arange(8)], epoch=0)
    found = [micro.tolist() for micro in micros]
    assert found == [[0, 4], [2, 5], [6, ~6]]
    uneven = replace(plan, world_size=2)
    rows = [np.arange(4), np.arange(4, 8)]
    sets = [[np.array([0]), np.array([2])], [np.array([5])]]
    (((first, second),),) = uneven.in_sets(sets, rows, epoch=0)
    assert [micro.tolist() for micro in first] == [[0, ~0], [2, ~2]]
    assert [micro.tolist() for micro in second] == [[5, ~5], [~4, ~4]]


def test_evaluations_share_no_call_among_sizes_and_eval_sizes_hold_for_all(files, data, tmp_path):
    named = prompts.read(str(data / "mixed"), "test", SQUARE)
    for batch in prompts.eval_batches(named, 4):
        assert len({named[n].size for n in batch}) == 1
    keys = {"logdir": tmp_path, "sample__eval_sizes": ("32x64",)}
    run = running.prepare(arguments(files, data, "mixed", **keys))
    (evaluator,) = at_sizes(run.evaluator)
    _, images = score_prompts(evaluator, run.plan.eval_prompts, range(6))
    assert {image.shape for image in images.values()} == {(32, 64, 3)}
    assert {prompt.size for prompt in run.plan.train_prompts} == {SQUARE, WIDE, TALL}


def test_a_size_is_read_height_first_and_frames_may_be_left_to_the_config(tmp_path):
    write(tmp_path, ["64x32", "64x32x9", None, None, None, None])
    found = prompts.read(str(tmp_path), "train", Size(8, 8, 5))
    assert [each.size for each in found[:3]] == [Size(64, 32, 5), Size(64, 32, 9), Size(8, 8, 5)]
    assert found[1].where == f"{tmp_path / 'train_metadata.jsonl'}, line 2"
    assert "train sizes, height x width: 64x32 1, 64x32x9 1" in prompts.check(str(tmp_path))


BAD = {
    "30x32": r'line 2: "size"=30: this model draws sides that are multiples of 16',
    "64": "line 2: '64': a size such as 1024x768 or 480x832x81 is needed",
    "32x32x5": r'line 2: "size" is 32x32x5: config.num_frames=5: SD3 draws images',
}


@pytest.mark.parametrize("size", BAD)
def test_a_size_that_can_not_be_drawn_is_refused_with_its_line(files, tmp_path, size):
    write(tmp_path / "data", (None, size, None, None, None, None))
    with pytest.raises(ValueError, match=BAD[size]):
        running.prepare(arguments(files, tmp_path, "data"))


def test_an_estimate_takes_the_largest_size(files, data):
    config, _ = settings.load(arguments(files, data, "mixed", resolution=16), "")
    fake = Fake(config, describe(config)[0], make(config, 1), casts_trained=False)
    assert fake.size in (WIDE, TALL) and fake.drawn == {Size(16, 16), WIDE, TALL}


def test_calls_that_would_mix_sizes_are_refused(files, data):
    with pytest.raises(ValueError, match=r"train_batch_size=8: the prompts' pictures .* 3 sizes"):
        running.prepare(arguments(files, data, "mixed", sample__train_batch_size=8))


def test_a_protocol_refuses_prompts_of_their_own_size(data):
    named = prompts.read(str(data / "mixed"), "test", SQUARE)
    shapes = replace(protocol.load("shapes"), rows=6, per_prompt=1, others=True)
    with pytest.raises(ValueError, match='line 2 has a "size" of its own'):
        shapes.check(named)
    shapes.check([replace(each, size=None) for each in named])
