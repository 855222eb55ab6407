"""An objective and a rollout written here run through the loop: nothing else had to be changed.

Pairs trains on the best and the worst image of each group, in one micro-batch; its rest costs no
forward. Branches draws each group's images as branches of one trunk.
"""

from pathlib import Path

import numpy as np
import pytest
import running
import torch
from forking import ON_CPU, on_ranks

from flow_grpo import rollouts
from flow_grpo.launch import entry
from flow_grpo.objectives.base import Objective
from flow_grpo.objectives.ratio.grpo import GRPO
from flow_grpo.records import Arranged, Loss, Point
from flow_grpo.report.output import read_metrics
from flow_grpo.training.snapshots import Snapshots

GROUPS = GROUP_SIZE = 4


class Pairs(Objective):
    """Pull the velocity of the best towards the target at one noise level; push the worst's."""

    selects = draws_points = True
    snapshots = ("reference",)

    def arrange(self, scores, rows, plan, epoch):
        pairs = [[] for _ in range(plan.world_size)]
        weights = torch.zeros_like(scores)
        advantages = torch.zeros_like(scores)
        for group in rows.group.unique():
            mine = torch.nonzero((rows.group == group) & rows.leaf).flatten()
            best, worst = mine[scores[mine].argmax()], mine[scores[mine].argmin()]
            advantages[best], advantages[worst] = 1, -1
            weights[best] = weights[worst] = 1
            pairs[rows.rank[best]].append(np.array([best, worst]))
        of_ranks = [rows.of_rank(rank) for rank in range(plan.world_size)]
        return Arranged(plan.in_sets(pairs, of_ranks, epoch), advantages, weights)

    def points(self, rows, randomness):
        names = [(row.group, row.member) for row in rows.batch.owners]
        noise = randomness.normal("noising", names, rows.final.shape[1:])
        step = torch.ones(len(rows), dtype=torch.int64)
        sigma = self.schedule.sigmas[step]
        wide = sigma.reshape(-1, 1, 1, 1)
        return [Point((1 - wide) * rows.final + wide * noise, sigma, step, noise=noise)]

    def freeze(self, micros, predict):
        return {"reference": predict(micros, "reference")}

    def loss(self, velocity, known, rows, point):
        target = point.noise - rows.final
        error = ((velocity - target) ** 2).flatten(1).mean(1)
        error = error - ((known["reference"] - target) ** 2).flatten(1).mean(1)
        return Loss(rows.advantages * error, {"error": error.detach()})


class Branches(GRPO):
    def rollout(self, calls, steps_of):
        return rollouts.branches(calls, steps_of, self.schedule.num_steps)


def prepared(files, objective_class, use_lora, name, **settings):
    chosen = running.lora(files) if use_lora else {}
    settings = {"num_epochs": 1, "sample__num_steps": 5, **settings}
    run = running.prepare(running.arguments(files, run_name=name, **chosen, **settings))
    objective = objective_class(run.config, run.schedule)
    run.objective = objective
    run.snapshots = Snapshots(run.engine, objective.snapshots, use_lora)
    return run


def counted(run):
    """Count the rows that pass through the model, with a gradient and without."""
    seen = {True: 0, False: 0}

    def note(module, args, inputs):
        seen[torch.is_grad_enabled()] += len(inputs["hidden_states"])

    run.pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.usefixtures("fresh_logs")
@pytest.mark.parametrize("use_lora", [True, False])
def test_pairs_train_on_two_images_of_a_group_and_the_rest_costs_no_forward(files, use_lora):
    run = prepared(files, Pairs, use_lora, "pairs", eval_max_samples=1)
    before = {name: param.clone() for name, param in running.trained_parameters(run)}
    seen = counted(run)
    entry.execute(run)
    trained = 2 * GROUPS
    sampled = GROUPS * GROUP_SIZE * 5 + 2 * 3  # and two evaluations of an image, 3 steps
    assert seen == {True: trained, False: sampled + trained}  # the reference's
    rows = read_metrics(run.folder, "update")
    assert len(rows) == 2 and rows[0]["error"] == 0 if not use_lora else rows[0]["error"] != 0
    assert any(
        not torch.equal(param, before[name]) for name, param in running.trained_parameters(run)
    )


@pytest.mark.usefixtures("fresh_logs")
@pytest.mark.parametrize("use_lora", [True, False])
def test_branches_of_a_trunk_train_from_a_log_ratio_of_zero(files, use_lora):
    run = prepared(
        files,
        Branches,
        use_lora,
        "branches",
        eval_max_samples=1,
        seed=3,
        sample__sde_window_size=2,
        sample__sde_window_range=(1, 4),
    )
    starts = run.trained_steps(range(GROUPS), 0)[:, 0]
    assert len(set(starts.tolist())) > 1
    seen = counted(run)
    entry.execute(run)
    assert set(running.gate(run.folder).values()) == {0.0}
    # A call is a group: its trunk's steps once (trunks share a call, and wait), then its branches.
    trunks, branches = GROUPS * max(starts), sum(GROUP_SIZE * (5 - start) for start in starts)
    gate, trained, evaluated = 2 * GROUP_SIZE, 2 * GROUPS * GROUP_SIZE, 2 * 3
    assert seen == {True: trained, False: trunks + branches + gate + evaluated}
    first, second = read_metrics(run.folder, "update")
    assert first["ratio"] == 1.0 and second["ratio_std"] > 0


def as_rank(files, folder, objective_class):
    run = prepared(
        files,
        objective_class,
        True,
        "ranks",
        logdir=folder,
        eval_max_samples=2,
        train__adam_epsilon=1.0,  # steps like SGD's, which rounding can't turn around
        train__learning_rate=1.0,
        sample__num_batches_per_epoch=2,
        train__gradient_accumulation_steps=1,
        sample__sde_window_range=(1, 4),
    )
    seen = counted(run)
    entry.execute(run)
    weights = {name: param.detach() for name, param in running.trained_parameters(run)}
    torch.save({"weights": weights, "seen": seen}, Path(folder) / f"{run.ranks.rank}.pt")
    entry.leave(0)


@pytest.mark.parametrize("objective_class", [Pairs, Branches])
def test_two_ranks_train_as_one_does(files, tmp_path, objective_class):
    on_ranks(2, ON_CPU, as_rank, files, tmp_path, objective_class)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert found[0]["seen"] == found[1]["seen"]  # equally many forwards
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name])
    one = prepared(
        files,
        objective_class,
        True,
        "one",
        logdir=tmp_path / "one",
        eval_max_samples=2,
        train__adam_epsilon=1.0,  # steps like SGD's, which rounding can't turn around
        train__learning_rate=1.0,
        sample__sde_window_range=(1, 4),
    )
    before = {name: param.clone() for name, param in running.trained_parameters(one)}
    entry.execute(one)
    moved = [
        (param - before[name]).abs().max().item() for name, param in running.trained_parameters(one)
    ]
    for name, param in running.trained_parameters(one):
        close = {"rtol": 0, "atol": 2e-2 * max(moved)}
        torch.testing.assert_close(param.detach(), found[0]["weights"][name], **close)
