"""The first half of an epoch: roll out, score, and weigh the rows of all ranks."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import zip_longest

import ml_collections
import numpy as np
import torch
from torch import Tensor

from flow_grpo import advantages
from flow_grpo.cli import progress
from flow_grpo.evaluation import diversity
from flow_grpo.objectives import credit
from flow_grpo.objectives.base import Micro
from flow_grpo.parallel import speed
from flow_grpo.plan import Part
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, PromptBatch, Rollout, RowTable
from flow_grpo.rewards.batch import Batch
from flow_grpo.rollouts import states_to_save
from flow_grpo.sampling import Denoised, decode, denoise, keep_up, parents
from flow_grpo.training.arrange import Drawn, Sampled, arrange
from flow_grpo.training.run import Run


class Ranked:
    """The scores of a prompt's own answers: the earlier is the better."""

    def __init__(self, members: list[int]):
        self._scores = -np.array(members, dtype=np.float64)

    def result(self, patience_s: float) -> dict[str, np.ndarray]:
        return {"avg": self._scores}


def collect(run: Run, epoch: int, for_gate: bool = False) -> tuple[Sampled, dict[str, np.ndarray]]:
    """Roll out and score; where groups teach nothing, again with further prompts."""
    config, plan = run.config, run.plan
    sampled = roll_out(run, epoch, for_gate)
    scores, num_groups = score(run, sampled), plan.num_groups
    for _ in range(config.sample.max_refills):
        rows = table_of(run, sampled.parts)
        cells, world = credit.peers(rows)[rows.leaf], run.ranks.gather_objects(scores["avg"])
        taught = advantages.num_unequal(torch.from_numpy(np.concatenate(world)), cells)
        of_group = len(cells.unique()) // num_groups  # sets of rows that are compared
        if taught >= plan.num_groups * of_group:
            break
        wanted = plan.num_groups - taught // of_group
        part = plan.refill(config.sample, num_groups, wanted)
        more = roll_out(run, epoch, part=part)
        scores = {name: np.append(scores[name], each) for name, each in score(run, more).items()}
        sampled, num_groups = sampled.with_more(more), num_groups + part.num_groups
    return sampled, scores


def roll_out(run: Run, epoch: int, for_gate: bool = False, part: Part | None = None) -> Sampled:
    """Draw this rank's images, and start to score them; or take those of the data.

    part: None: what every epoch draws.
    """
    part = part or run.plan.whole(run.config.sample)
    from_data = run.config.sample.source == "data"
    sampled = read(run, epoch, part) if from_data else draw(run, epoch, part, for_gate)
    if "rollouts" in run.config.offload:
        waiting = [part._replace(rollout=part.rollout.on_host()) for part in sampled.parts]
        sampled = replace(sampled, parts=waiting)
    return sampled


def read(run: Run, epoch: int, part: Part) -> Sampled:
    """Encode what the data set answers its prompts with, a row an answer."""
    parts, images = [], []
    prompts = run.plan.asked(part.groups, epoch)
    with run.timer("sample"):
        for call in run.calls(run.ranks.rank, epoch, part):
            asked = [prompts[row.group] for row in call.rows]
            batch = run.prompt_batch(asked, call.rows)
            size = batch.size
            answers = [
                prompt.load_answer(row.member, size.width, size.height)
                for prompt, row in zip(asked, call.rows, strict=True)
            ]
            parts.append(unsampled(batch, run.pipeline.latents(answers, size)))
            images += answers
            run.evaluator.stop.check()
    members = [row.member for part in parts for row in part.batch.owners]
    return Sampled(Drawn.in_turn(parts), images, Ranked(members), for_gate=[])


def unsampled(batch: PromptBatch, final: Tensor) -> Rollout:
    """Return final latents (N, ...) as rows without a step."""
    nothing = final.new_empty(len(final), 0)
    return Rollout(
        batch=batch,
        steps=nothing.long(),
        next_steps=nothing.long(),
        latents=nothing,
        next_latents=nothing,
        log_probs=nothing,
        final=final,
        leaf=torch.ones(len(final), dtype=torch.bool),
        parent=torch.full((len(final), 2), -1),
    )


def draw(run: Run, epoch: int, part: Part, for_gate: bool = False) -> Sampled:
    config, plan, objective = run.config, run.plan, run.objective
    asked = plan.asked(part.groups, epoch)
    world = [run.calls(rank, epoch, part) for rank in range(plan.world_size)]
    calls = world[run.ranks.rank]
    save, randomness = states_to_save(calls), Randomness(config.seed, (epoch,))
    done: list[Denoised] = []
    images, gated, scoring = [], {}, run.evaluator.scorer.start()
    steps = [[call.segment.grid.shape[1] - 1 for call in of_rank] for of_rank in world]
    num_steps = sum(steps[run.ranks.rank])
    bar = progress(num_steps, "sample", shown=run.ranks.is_main)
    weights = objective.samples_with(epoch, run.updater.num_updates)
    started = time.monotonic()
    with run.timer("sample"), run.snapshots.using(weights), _merged(run):
        for number, steps_of in enumerate(zip_longest(*steps, fillvalue=0)):
            if number < len(calls):
                call, keep = calls[number], list(objective.keeps)
                prompts = [asked[row.group] for row in call.rows]
                batch = run.prompt_batch(prompts, call.rows)
                of_size = gated.setdefault(batch.size, [])
                checked = for_gate and keep and sum(map(len, of_size)) < plan.micro_batch_size
                checked = checked and call.segment.stochastic.any()
                if checked and "velocities" not in keep:
                    keep.append("velocities")
                drawn = denoise(
                    run.pipeline,
                    run.model,
                    batch,
                    run.schedule,
                    randomness,
                    call.segment,
                    leaf=call.leaf,
                    keep=keep,
                    start=parents(done, call.segment),
                    save=save[number],
                    on_step=bar.update,
                )
                if checked:
                    of_size.append(drawn.rollout)
                if "velocities" not in objective.keeps:
                    drawn.rollout = replace(drawn.rollout, velocities=None)
                done.append(drawn)
                if call.leaf:
                    decoded = decode(run.pipeline, drawn.rollout)
                    known = batch.prompts, batch.metadata, batch.references
                    scoring.add(Batch(decoded, *known, batch.group.numpy()))
                    images += decoded
            if run.engine.cuts_weights:
                missing = max(steps_of) - steps_of[run.ranks.rank]
                keep_up(run.pipeline, run.model, done[-1].rollout, run.schedule, missing)
            run.evaluator.stop.check()  # of as many calls as the rank with the most makes
    bar.close()
    return Sampled(
        parts=Drawn.in_turn(drawn.rollout for drawn in done),
        images=images,
        scoring=scoring,
        for_gate=[Rollout.cat(of_size) for of_size in gated.values() if of_size],
        seconds_a_step=(time.monotonic() - started) / max(num_steps, 1),
    )


def _merged(run: Run) -> AbstractContextManager[None]:
    wanted = run.config.sample.merged_lora
    return speed.merged(run.pipeline.transformer) if wanted else nullcontext()


def score(run: Run, sampled: Sampled) -> dict[str, np.ndarray]:
    """Wait for the scores of this rank's leaves, (L,) each. Raises Stopped if too few have one."""
    with run.timer("reward"):
        scores = run.evaluator.scores(sampled.scoring)
    run.evaluator.check_masked(scores["avg"])
    if run.objective.reward_kl:
        with run.timer("reward"):
            scores["reference_kl"] = reference_kl(run, sampled.parts)
        for part in sampled.parts:
            part.rollout.velocities = None
    return scores


def reference_kl(run: Run, parts: list[Drawn]) -> np.ndarray:
    """Let the objective measure how far this rank's leaves are from the reference, (L,)."""
    micros, leaves = [], []
    for rollout, held in parts:
        for numbers in torch.nonzero(rollout.leaf).flatten().split(run.plan.micro_batch_size):
            rows = rollout.rows(numbers).to(run.ranks.device)
            points = run.objective.points(rows, Randomness(run.config.seed, (run.epoch,)))
            micros.append(Micro(rows, points, run.predictor(rows), [None] * len(points)))
            leaves.append(held[numbers.numpy()])
    num_calls = max(run.ranks.gather_objects(len(micros)))  # sizes cut ranks' rows differently
    with torch.no_grad():
        padded = micros + micros[-1:] * (num_calls - len(micros))
        found = run.objective.reference_kl(padded, run.predict)[: len(micros)]
    in_turn = np.argsort(np.concatenate(leaves))
    return torch.cat(found).double().cpu().numpy()[in_turn]


def weigh(
    run: Run, sampled: Sampled, scores: dict[str, np.ndarray], epoch: int
) -> tuple[Arranged, dict[str, float]]:
    """Turn the scores of all ranks into what trains when; give this rank's rows their share."""
    config = run.config
    rows, ranks = table_of(run, sampled.parts), run.ranks.gather_objects(scores)
    world = {n: torch.from_numpy(np.concatenate([each[n] for each in ranks])) for n in scores}
    leaf_scores = combine(config, world, credit.peers(rows)[rows.leaf])
    if weight := run.objective.reward_kl:
        leaf_scores = leaf_scores - weight * world["reference_kl"]
    nothing = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    rows.scores = {name: nothing.masked_scatter(rows.leaf, v.double()) for name, v in world.items()}
    all_scores = nothing.masked_scatter(rows.leaf, leaf_scores)
    shuffle = config.train.shuffle_advantages
    arranged = arrange(run.objective, all_scores, rows, run.plan, epoch, shuffle)
    rank, device = run.ranks.rank, run.ranks.device
    mine, sampled.first_row = rows.rank == rank, int((rows.rank < rank).sum())
    for rollout, numbers in sampled.parts:
        rollout.advantages = arranged.advantages[mine][numbers].float().to(device)
        rollout.weights = arranged.weights[mine][numbers].float().to(device)
        if arranged.uncertain is not None:
            rollout.uncertain = arranged.uncertain[mine][numbers].float().to(device)
    group = rows.group[rows.leaf]
    metrics = {f"reward/{name}": values.nanmean().item() for name, values in world.items()}
    small = np.concatenate(run.ranks.gather_objects(diversity.thumbnails(sampled.images)))
    spread = diversity.diversity(small, group.numpy())
    if not math.isnan(spread):  # a group has more than one image
        metrics["diversity"] = spread
    trained = arranged.advantages[arranged.weights.reshape(len(rows), -1).gt(0).any(1)]
    average = world["avg"]
    present = average[~average.isnan()]
    return arranged, metrics | {
        "images": float(len(average)),
        "reward/avg_std": present.std(correction=0).item(),
        "reward/missing": average.isnan().sum().item(),
        "reward/zero_std_fraction": advantages.zero_std_fraction(average, group),
        "advantage/abs_mean": trained.abs().mean().item() if len(trained) else 0.0,
    }


def table_of(run: Run, parts: list[Drawn]) -> RowTable:
    in_turn = np.argsort(np.concatenate([part.numbers for part in parts]))
    of_parts = [_columns(part.rollout) for part in parts]
    columns = {n: torch.cat([each[n] for each in of_parts])[in_turn] for n in of_parts[0]}
    columns["rank"] = torch.full_like(columns["group"], run.ranks.rank)
    columns["sizes"] = torch.tensor(run.plan.sizes_of(columns["group"].tolist(), run.epoch))
    ranks = run.ranks.gather_objects(columns)
    first = 0
    for each in ranks:  # a parent's number among all rows
        each["parent"] = torch.where(each["parent"] < 0, -1, each["parent"] + first)
        first += len(each["parent"])
    return RowTable(**{name: torch.cat([each[name] for each in ranks]) for name in columns})


def _columns(rollout: Rollout) -> dict[str, Tensor]:
    return {
        "group": rollout.batch.group,
        "member": rollout.batch.member,
        "leaf": rollout.leaf,
        "parent": rollout.parent[:, 0],
        "steps": rollout.steps.cpu(),
        "branch": torch.tensor([(-1, *row.branch)[-1] for row in rollout.batch.owners]),
    }


def combine(config: ml_collections.ConfigDict, scores: dict[str, Tensor], group: Tensor) -> Tensor:
    """Return the one score (N,) that is trained; NaN where a reward is missing.

    gdpo: each reward normalised in its groups first; the objective then only centres it.
    """
    average = scores["avg"]
    if config.reward_aggregation == "sum":
        return average
    weights = {name: weight for name, weight in config.reward_fn.items() if weight}
    combined = advantages.gdpo_advantages({name: scores[name] for name in weights}, weights, group)
    return torch.where(average.isnan(), average, combined)
