"""The epoch loop, the same for every model and objective: sample, score, update, save."""

from __future__ import annotations

import torch
from tqdm import tqdm

from flow_grpo.cli import progress
from flow_grpo.parallel.stop import Stopped
from flow_grpo.prompts import epoch_prompts, micro_batch_order, rollout_rows
from flow_grpo.randomness import Randomness
from flow_grpo.records import Rollout
from flow_grpo.report.output import redraw
from flow_grpo.rewards.batch import Batch
from flow_grpo.sampling import sample
from flow_grpo.training.checkpoint import save
from flow_grpo.training.evaluate import evaluate
from flow_grpo.training.gate import gate
from flow_grpo.training.run import Run
from flow_grpo.training.scoring import weigh
from flow_grpo.training.tracking import Statistics, memory


def train(run: Run) -> None:
    """Train up to config.num_epochs.

    Raises Stopped where a signal or failing rewards end it, once the finished epochs are saved.
    """
    config = run.config
    finished = run.tracker.num_bytes  # of metrics.jsonl
    shown = run.accelerator.is_main_process
    bar = progress(config.num_epochs, "epochs", shown=shown, initial=run.epoch)
    gate_open = False
    try:
        while run.epoch < config.num_epochs:
            if run.epoch % config.eval_freq == 0:
                _evaluate(run)
            rollout, metrics = collect(run)
            if not gate_open:
                gate(run, rollout)
                gate_open = True
            update(run, rollout)
            run.objective.after_epoch(run.snapshots, run.updater.num_updates)
            run.log("epoch", metrics := metrics | _epoch_metrics(run))
            run.epoch += 1
            finished = run.tracker.num_bytes
            if run.epoch % config.save_freq == 0 or run.epoch == config.num_epochs:
                save(run, finished)
            run.stop.check()
            bar.update()
            if run.accelerator.is_main_process:
                tqdm.write(f"epoch {run.epoch}: {_summary(metrics)}")
        _evaluate(run)
    except Stopped:
        save(run, finished)
        raise


def collect(run: Run) -> tuple[Rollout, dict[str, float]]:
    """Sample this rank's pictures of the epoch, score them and give each its advantage."""
    config, plan, objective = run.config, run.plan, run.objective
    slots = epoch_prompts(len(plan.train_prompts), plan.num_groups, config.seed, run.epoch)
    calls = list(
        rollout_rows(
            run.accelerator.process_index,
            config.sample.num_batches_per_epoch,
            config.sample.train_batch_size,
            plan.group_size,
        )
    )
    randomness, parts, scoring = Randomness(config.seed, (run.epoch,)), [], run.scorer.start()
    bar = progress(
        len(calls) * run.schedule.num_steps, "sample", shown=run.accelerator.is_main_process
    )
    with run.timer("sample"), run.snapshots.using(objective.samples_with):
        for rows in calls:
            prompts = [plan.train_prompts[slots[group]] for group, _ in rows]
            batch = run.prompt_batch(prompts, rows, run.schedule.guidance_scale)
            part = sample(
                run.pipeline,
                run.model,
                batch,
                run.schedule,
                randomness,
                steps=run.trained_steps([group for group, _ in rows]),
                keep_steps=objective.keeps == "steps",
                on_step=bar.update,
            )
            scoring.add(
                Batch(
                    part.images,
                    batch.prompts,
                    batch.metadata,
                    batch.references,
                    batch.group.numpy(),
                )
            )
            parts.append(part)
            run.stop.check()
    bar.close()
    with run.timer("reward"):
        scores = run.scores(scoring)
    rollout = Rollout.cat(parts)
    run.check_masked(scores["avg"])
    metrics = weigh(run, rollout, scores)
    if run.epoch % config.eval_freq == 0:
        name = f"rollout-{run.updater.num_updates:06d}"
        run.tracker.save_images(name, rollout.images[: 4 * plan.group_size], plan.group_size)
    rollout.images = []
    return rollout, metrics


def update(run: Run, rollout: Rollout) -> None:
    """Take the epoch's optimizer steps."""
    config, plan, objective = run.config, run.plan, run.objective
    size = plan.micro_batch_size
    micros = [rollout.rows(slice(i * size, (i + 1) * size)) for i in range(plan.num_micro_batches)]
    rank, seed = run.accelerator.process_index, config.seed
    with run.timer("update"):
        for micro in micros:
            with torch.no_grad():
                objective.prepare(micro, run.predictor(micro))
        bar = progress(
            len(micros) * config.train.num_inner_epochs,
            "update",
            shown=run.accelerator.is_main_process,
        )
        for inner in range(config.train.num_inner_epochs):
            randomness = Randomness(seed, (run.epoch, inner))
            for chosen in micro_batch_order(
                len(micros), plan.num_updates, rank, seed, run.epoch, inner
            ):
                take_step(run, [micros[i] for i in chosen], randomness)
                bar.update(len(chosen))
        bar.close()


def take_step(run: Run, micros: list[Rollout], randomness: Randomness) -> None:
    """Make one optimizer step: the weighted mean over all rows of all ranks and all points."""
    objective, updater = run.objective, run.updater
    statistics = Statistics(run.schedule.num_steps, run.accelerator.device)
    total = run.total(sum(micro.weights.sum() for micro in micros)).clamp(min=1e-8)
    loss_sum = torch.zeros((), device=run.accelerator.device)
    for i, micro in enumerate(micros):
        predict, points = run.predictor(micro), objective.points(micro, randomness)
        for k, point in enumerate(points):
            anchors = {name: run.frozen(name, predict, point) for name in objective.anchors}
            last = i == len(micros) - 1 and k == len(points) - 1
            with updater.accumulate(last):
                loss = objective.loss(predict(point), anchors, micro, point, run.total)
                share = (loss.value * micro.weights).sum() / (total * len(points))
                if not updater.all_finite(share.detach()):
                    updater.skip()
                    return
                updater.backward(share)
            loss_sum += share.detach()
            statistics.add(loss.stats, point.step, micro.weights)
    norm = updater.step()
    if norm is None:
        return
    run.move_snapshots()
    metrics = {"loss": run.total(loss_sum).item(), "grad_norm": norm}
    metrics |= {"learning_rate": updater.optimizer.param_groups[0]["lr"]}
    run.log("update", metrics | statistics.collect(run.accelerator))


def _evaluate(run: Run) -> None:
    """Evaluate; once there is something to tell, draw report.html anew."""
    evaluate(run)
    if run.epoch and run.accelerator.is_main_process:
        redraw(run.folder)


def _epoch_metrics(run: Run) -> dict[str, float]:
    seconds = run.timer.report()
    spent = sum(value for phase, value in seconds.items() if phase != "seconds/eval")
    pictures = run.plan.num_groups * run.plan.group_size
    skipped = {"skipped_updates": run.updater.num_skipped}
    return seconds | memory() | {"images_per_second": pictures / spent} | skipped


def _summary(metrics: dict[str, float]) -> str:
    named = ("reward/avg", "reward/zero_std_fraction", "images_per_second")
    return ", ".join(f"{name.split('/')[-1]} {metrics[name]:.3g}" for name in named)
