"""What updates leave behind, on a tiny pipeline: weights, their average, rates, checkpoints."""

import pytest
import running
import torch

from flow_grpo.launch import entry
from flow_grpo.report.output import read_metrics

pytestmark = pytest.mark.usefixtures("fresh_logs")


def test_a_learning_rate_of_zero_changes_no_weight_and_no_evaluation(files):
    run = running.prepare(running.arguments(files, run_name="still", train__learning_rate=0.0))
    before = {name: param.clone() for name, param in running.trained_parameters(run)}
    entry.execute(run)
    assert run.updater.num_updates == 4
    assert all(torch.equal(param, before[name]) for name, param in running.trained_parameters(run))
    first, last = read_metrics(run.folder, "eval")
    assert first["avg"] == last["avg"]


def test_the_ema_follows_every_update_by_its_schedule(files):
    argv = running.arguments(
        files,
        run_name="ema",
        train__ema=True,
        train__ema_decay=0.5,
        train__ema_update_every=2,
        num_epochs=3,
    )
    run = running.prepare(argv)
    name, param = next(iter(running.trained_parameters(run)))
    expected, done = param.detach().clone(), []
    step = run.engine.step

    def watch(norm):
        step(norm)
        done.append(param.detach().clone())

    run.engine.step = watch
    entry.execute(run)
    for n, value in enumerate(done):
        if (n + 1) % 2 == 0:
            decay = min(0.5, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value
    assert len(done) == 6
    torch.testing.assert_close(run.snapshots.state_dict()[f"ema/{name}"], expected)


def test_warm_up_and_decay_reach_the_optimizer(files):
    argv = running.arguments(
        files,
        run_name="warm",
        num_epochs=3,
        train__lr_warmup_steps=2,
        train__lr_scheduler="linear",
        train__learning_rate=1.0e-3,
    )
    rates = [row["learning_rate"] for row in read_metrics(running.train(argv).folder, "update")]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_old_checkpoints_are_pruned_and_nothing_half_written_stays(files):
    argv = running.arguments(files, run_name="prune", num_epochs=4, num_checkpoint_limit=2)
    run = running.prepare(argv)
    (run.folder / "checkpoints" / ".writing-checkpoint-1").mkdir(parents=True)
    entry.execute(run)
    left = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert left == ["checkpoint-6", "checkpoint-8"]
