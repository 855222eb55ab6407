"""The epoch loop of all models and objectives: plan -> roll out -> score -> arrange -> update."""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flow_grpo.cli import progress
from flow_grpo.objectives.base import Micro, Objective
from flow_grpo.parallel.faults.stop import Stopped
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, Point
from flow_grpo.report.output import redraw
from flow_grpo.training import arrange, collect
from flow_grpo.training.arrange import Sampled
from flow_grpo.training.checkpoint import save
from flow_grpo.training.evaluate import evaluate
from flow_grpo.training.gate import gate
from flow_grpo.training.run import Run
from flow_grpo.training.snapshots import Held
from flow_grpo.training.tracking import Statistics, memory

BACKWARD = 3.0  # forwards that a forward and its backward take as long as
SHOWN = ("reward/avg", "reward/zero_std_fraction", "images_per_second")


def train(run: Run) -> None:
    """Train up to num_epochs. Whatever ends it before, finished epochs are saved if they can be."""
    config, main_process = run.config, run.ranks.is_main
    finished = run.tracker.num_bytes  # of metrics.jsonl
    bar = progress(config.num_epochs, "epochs", shown=main_process, initial=run.epoch)
    gate_open = False
    try:
        while run.epoch < config.num_epochs:
            if run.epoch % config.eval_freq == 0:
                _evaluate(run)
            sampled, scores = collect.collect(run, run.epoch, for_gate=not gate_open)
            arranged, metrics = collect.weigh(run, sampled, scores, run.epoch)
            if run.epoch % config.eval_freq == 0:
                size = run.plan.group_size  # of a sheet's rows
                name = f"rollout-{run.updater.num_updates:06d}"
                run.tracker.save_images(name, sampled.images[: 4 * size], size)
            sampled.images = []
            if not gate_open:
                gate(run, sampled.for_gate, run.epoch)
                gate_open = True
            update(run, sampled, arranged, run.epoch)
            run.objective.after_epoch(run.snapshots, run.updater.num_updates)
            run.log("epoch", metrics := metrics | _epoch_metrics(run, metrics["images"]))
            run.ranks.barrier()  # an epoch is finished on all ranks, or on none
            run.epoch += 1
            run.in_update, run.held = False, None
            finished = run.tracker.num_bytes
            if run.epoch % config.save_freq == 0 or run.epoch == config.num_epochs:
                _save(run, finished)
            run.evaluator.stop.check()
            bar.update()
            if main_process:
                shown = (f"{name.split('/')[-1]} {metrics[name]:.3g}" for name in SHOWN)
                tqdm.write(f"epoch {run.epoch}: {', '.join(shown)}")
        _evaluate(run)
    except Exception as error:
        outcome = rescue(run, error, finished)
        if outcome is error:
            raise
        raise outcome from None


class Unwritten(Stopped):
    """No checkpoint can be written."""


def _save(run: Run, metrics_bytes: int) -> None:
    try:
        save(run, metrics_bytes)
    except OSError as error:
        told = f"no checkpoint could be written ({error})"
        if run.config.on_save_error == "stop" or run.epoch == run.config.num_epochs:
            raise Unwritten(told) from None
        if run.ranks.is_main:
            tqdm.write(f"warning: {told}; the next one is tried (config.on_save_error=continue)")


def rescue(run: Run, error: Exception, metrics_bytes: int) -> Exception:
    """Save the finished epochs of a run that an error ends, if they can be.

    metrics_bytes: of these epochs. Returns the error to raise, with a note of what came of it: the
    first one's where it had one, elsewhere Stopped. All ranks have Stopped, or one's error.
    """
    problem, lost = "", run.epoch - (run.saved[0] if run.saved else 0)
    if not isinstance(error, Stopped):
        first, words, problem = run.engine.regroup(error, lambda: run.evaluator.stop.asked)
        if first != run.ranks.rank:
            error = Stopped(f"rank {first} failed: {words}")
        if not lost:
            if problem:
                error.add_note(problem)
            return error
    if isinstance(error, Unwritten):
        problem = "see above"
    problem = problem or _save_start(run, metrics_bytes)
    if problem:
        error.add_note(f"{lost} finished epoch(s) could not be saved in {run.folder}: {problem}")
    else:
        error.add_note(f"saved in {run.folder}")
    return error


def _save_start(run: Run, metrics_bytes: int) -> str:
    """Save the state in which this epoch began; return why that did not work, or ""."""
    problem = ""
    try:
        if run.in_update and run.held is None:
            problem = (
                "the error came among its updates (config.train.hold_start=True allows for that)"
            )
        elif run.in_update:
            run.held.restore()
        world = run.ranks.gather_objects((problem, run.epoch))
        if problem := next((each for each, _ in world if each), ""):
            return problem
        if len({epoch for _, epoch in world}) > 1:
            return "the ranks were in different epochs"
        save(run, metrics_bytes)
    except Exception as second:  # whatever it is, the first one is to be seen
        return str(second)
    return ""


def update(run: Run, sampled: Sampled, arranged: Arranged, epoch: int) -> None:
    objective, rank = run.objective, run.ranks.rank
    micro_batch = partial(_micro_batch, run, sampled, arranged, epoch)
    num_calls = sum(len(of_ranks[rank]) for inner in arranged.updates for of_ranks in inner)
    with run.timer("update"):
        run.evaluator.stop.pace(BACKWARD * sampled.seconds_a_step)
        known = prepare(objective, arranged, rank, micro_batch, run.predict)
        if run.config.use_lora or run.config.train.hold_start:
            run.held = Held(run.engine, run.snapshots, run.updater)
        run.in_update = True
        bar = progress(num_calls, "update", shown=run.ranks.is_main)
        for inner, updates in enumerate(arranged.updates):
            for of_ranks in updates:
                micros = [micro_batch(numbers, inner) for numbers in of_ranks[rank]]
                for micro, numbers in zip(micros, of_ranks[rank], strict=True):
                    micro.known = known.get(_key(objective, numbers, inner))
                num_points = len(micros[0].points) if micros else 0
                weight = arrange.total_weight(arranged, of_ranks, num_points)
                if weight and take_step(run, micros, weight):
                    run.evaluator.stop.check()
                bar.update(len(micros))
        bar.close()


def prepare(objective: Objective, arranged: Arranged, rank: int, micro_batch, predict) -> dict:
    """Let the objective compute what belongs to the epoch's first weights; by micro-batch."""
    if type(objective).prepare is Objective.prepare:
        return {}
    micros = {}
    for inner, updates in enumerate(arranged.updates):
        for numbers in (numbers for of_ranks in updates for numbers in of_ranks[rank]):
            key = _key(objective, numbers, inner)
            if key not in micros:
                micros[key] = micro_batch(numbers, inner)
    with torch.no_grad():
        values = objective.prepare(list(micros.values()), predict)
    return {
        key: [{name: of[i][k] for name, of in values.items()} for k in range(len(micro.points))]
        for i, (key, micro) in enumerate(micros.items())
    }


def _key(objective: Objective, numbers: np.ndarray, inner: int) -> tuple:
    """What a micro-batch's prepared values depend on."""
    return numbers.tobytes(), inner if objective.draws_points else 0


def _micro_batch(
    run: Run, sampled: Sampled, arranged: Arranged, epoch: int, numbers: np.ndarray, inner: int
) -> Micro:
    rows = sampled.rows(numbers).to(run.ranks.device)
    points = run.objective.points(rows, Randomness(run.config.seed, (epoch, inner)))
    trained = [arrange.trained_rows(arranged, numbers, point.column) for point in points]
    return Micro(rows, points, run.predictor(rows), trained)


def take_step(run: Run, micros: list[Micro], total_weight: float) -> bool:
    """Make one optimizer step: the weighted mean over all rows of all ranks and all points.

    Returns whether any rank was asked to end.

    Nothing waits for the device before all gradients are there. Then one sum over ranks holds the
    loss, which is finite only if every part of it is, and the statistics, and is read once.
    """
    objective, engine, ranks = run.objective, run.engine, run.ranks
    with torch.no_grad():
        frozen = objective.freeze(micros, run.predict)
    statistics = Statistics(run.schedule.num_steps, ranks.device)
    total = torch.full((), total_weight, device=ranks.device)
    loss_sum = torch.zeros((), device=ranks.device)
    for i, micro in enumerate(micros):
        known = [
            (micro.known[k] if micro.known else {}) | {n: of[i][k] for n, of in frozen.items()}
            for k in range(len(micro.points))
        ]
        for ks in run.stacks(len(micro.points)):
            run.evaluator.stop.poll()
            last = i == len(micros) - 1 and ks[-1] == len(micro.points) - 1
            with engine.accumulate(last):
                stacked = Point.stacked([micro.points[k] for k in ks])
                velocities = micro.velocity(stacked).chunk(len(ks))
                shares = [
                    _share(objective, velocity, known[k], micro, k, statistics) / total
                    for velocity, k in zip(velocities, ks, strict=True)
                ]
                share = sum(shares[1:], shares[0])
                engine.backward(share)
            loss_sum += share.detach()
    asked = torch.tensor([float(run.evaluator.stop.asked)], device=ranks.device)
    sums = ranks.total(torch.cat([loss_sum.double()[None], asked.double(), statistics.sums()]))
    mean, asked, *moments, norm = torch.cat([sums, engine.norm().double()[None]]).tolist()
    if run.updater.finish(mean, norm):
        metrics = {"loss": mean, "grad_norm": norm, "learning_rate": run.updater.rate}
        run.move_snapshots(metrics := metrics | statistics.metrics(moments))
        run.log("update", metrics)
    return asked > 0


def _share(
    objective: Objective,
    velocity: Tensor,
    known: dict[str, Tensor],
    micro: Micro,
    k: int,
    statistics: Statistics,
) -> Tensor:
    """Return the weighted sum of the losses at one point, of the rows that train there."""
    rows, point = micro.rows, micro.points[k]
    if (trained := micro.trained[k]) is not None:
        velocity, rows, point = velocity[trained], rows.rows(trained), point.rows(trained)
        known = {name: value[trained] for name, value in known.items()}
    loss = objective.loss(velocity, known, rows, point)
    weights = rows.at("weights", point.column)
    statistics.add(loss.stats, point.step, weights)
    return (loss.value * weights).sum()


def _evaluate(run: Run) -> None:
    """Evaluate; once there is something to tell, draw report.html anew."""
    evaluate(run)
    if run.epoch and run.ranks.is_main:
        redraw(run.folder)


def _epoch_metrics(run: Run, num_images: float) -> dict[str, float]:
    seconds = run.timer.report()
    spent = sum(value for phase, value in seconds.items() if phase != "seconds/eval")
    skipped = {"skipped_updates": run.updater.num_skipped}
    return seconds | memory() | {"images_per_second": num_images / spent} | skipped
