"""The gate: what differs between sampling and training stops a run before its first update."""

from dataclasses import replace

import pytest
import running
from torch.nn.functional import pad

from flow_grpo.launch import entry
from flow_grpo.training import run as training_run

pytestmark = pytest.mark.usefixtures("fresh_logs")

SETTINGS = pytest.mark.parametrize("old_log_prob", ["rollout", "replay"])


def scaled_velocity(run, monkeypatch):
    honest = run.predictor
    run.predictor = lambda rows: lambda point: 1.05 * honest(rows)(point)


def wrong_sigma(run, monkeypatch):
    honest = run.predictor
    run.predictor = lambda rows: lambda point: honest(rows)(replace(point, sigma=0.9 * point.sigma))


def wrong_guidance(run, monkeypatch):
    run.config.train.cfg = False


def wrong_padding(run, monkeypatch):
    """Train with a token more than was sampled with, that no mask hides."""

    def padded(*given):
        conditioning = honest(*given)
        branches = {
            name: rows | {"embeds": pad(rows["embeds"], (0, 0, 0, 1))}
            for name, rows in conditioning.branches.items()
        }
        return replace(conditioning, branches=branches)

    honest = training_run.collate
    monkeypatch.setattr(training_run, "collate", padded)


def wrong_kernel(run, monkeypatch):
    """Score with another kernel than the rollout's."""
    run.objective.schedule = replace(run.objective.schedule, kind="dance")


def wrong_next_sigma(run, monkeypatch):
    sigmas = run.objective.schedule.sigmas.clone()
    sigmas[2] *= 0.99
    run.objective.schedule = replace(run.objective.schedule, sigmas=sigmas)


@SETTINGS
@pytest.mark.parametrize(
    "fault",
    [
        scaled_velocity,
        wrong_sigma,
        wrong_guidance,
        wrong_padding,
        wrong_kernel,
        wrong_next_sigma,
    ],
)
def test_a_fault_between_sampling_and_training_stops_the_run(
    files, monkeypatch, old_log_prob, fault
):
    run = running.prepare(
        running.arguments(
            files,
            run_name="fault",
            sample__guidance_scale=3.0,
            train__cfg=True,
            sample__sde_window_size=0,
            train__old_log_prob=old_log_prob,
        )
    )
    with run.config.unlocked():
        fault(run, monkeypatch)
    with pytest.raises(RuntimeError, match="before the first update"):
        entry.execute(run)
    assert run.updater.num_updates == 0 and not (run.folder / "checkpoints").exists()


@SETTINGS
def test_an_honest_run_passes_with_every_figure_zero(files, old_log_prob):
    argv = running.arguments(
        files, run_name="honest", num_epochs=1, train__old_log_prob=old_log_prob
    )
    run = running.train(argv)
    for figure in ("step", "log_ratio", "velocity"):
        assert set(running.gate(run.folder, figure).values()) == {0.0}, figure


def test_replay_allows_another_micro_batch_and_low_precision(files):
    argv = running.arguments(
        files,
        run_name="low",
        num_epochs=1,
        mixed_precision="bf16",
        train__batch_size=8,
        train__old_log_prob="replay",
        **running.lora(files),
    )
    run = running.train(argv)
    errors = running.gate(run.folder, "velocity").values()
    assert max(errors) < run.objective.gate_limits()["velocity"]
    assert max(running.gate(run.folder, "step").values()) <= 1e-5
