"""Whole runs of train_sd3.py's own code on a tiny pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import running
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from fixtures import sample

from flow_grpo.launch import entry
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance
from flow_grpo.report.output import read_metrics

pytestmark = pytest.mark.usefixtures("fresh_logs")


@pytest.mark.parametrize("kind", ["sde", "cps", "dance"])
@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize("window", [0, 2])
def test_the_log_ratio_before_the_first_update_is_exactly_zero(files, kind, use_lora, window):
    chosen = running.lora(files) if use_lora else {}
    argv = running.arguments(
        files,
        run_name="gate",
        num_epochs=1,
        sample__sde_type=kind,
        sample__noise_level=0.7,
        sample__sde_window_size=window,
        sample__guidance_scale=3.0,
        train__cfg=True,
        **chosen,
    )
    run = running.train(argv)
    found = running.gate(run.folder)
    assert len(found) == (window or 4)  # 5 steps, the last one is not trained
    assert set(found.values()) == {0.0}
    first = read_metrics(run.folder, "update")[0]
    assert first["ratio"] == 1.0 and first["ratio_std"] == 0.0
    later = read_metrics(run.folder, "update")[1]
    assert later["ratio_std"] > 0  # so the weights did move


def test_a_random_adapter_changes_the_velocity_and_disabling_it_restores_the_base(files):
    run = running.prepare(running.arguments(files, **running.lora(files)))
    base = running.prepare(running.arguments(files))
    batch = run.evaluator.prompt_batch(run.plan.train_prompts[:2], [(0, 0), (1, 0)], Guidance(1.0))

    def final(which, name):
        with which.snapshots.using(name):
            return sample(
                which.pipeline, which.model, batch, which.evaluator.schedule, Randomness(0, ())
            ).final

    policy, reference = final(run, "policy"), final(run, "reference")
    assert (policy - reference).abs().max() > 1e-3
    torch.testing.assert_close(reference, final(base, "policy"), rtol=0, atol=0)
    torch.testing.assert_close(final(run, "policy"), policy, rtol=0, atol=0)


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize("mode", ["kl_dt", "kl_true", "x", "v"])
def test_the_kl_is_taken_against_the_reference(files, use_lora, mode):
    """A LoRA whose B is random is off its reference at once; a full fine-tune starts at its own."""
    argv = running.arguments(
        files,
        run_name="kl",
        num_epochs=1,
        train__beta=0.1,
        train__kl_mode=mode,
        train__learning_rate=1e-2,
        **(running.lora(files) if use_lora else {}),
    )
    first, second = read_metrics(running.train(argv).folder, "update")
    assert (first["kl"] > 0) == use_lora
    assert second["kl"] > 0


def test_a_large_kl_coefficient_holds_the_policy_at_the_reference(files):
    def distance(beta: float) -> float:
        argv = running.arguments(
            files, run_name=f"beta{beta}", train__beta=beta, train__kl_mode="v", num_epochs=4
        )
        run = running.train(argv)
        start = run.snapshots.state_dict() or running.prepare(argv[:-1]).snapshots.state_dict()
        held = {key.removeprefix("reference/"): value for key, value in start.items()}
        return sum(
            (p - held[name]).abs().sum().item() for name, p in running.trained_parameters(run)
        )

    assert distance(1e4) < 0.9 * distance(1e-9)


def test_the_exported_lora_gives_our_evaluation_in_a_stock_pipeline(files):
    argv = running.arguments(
        files,
        run_name="export",
        train__ema=True,
        train__ema_update_every=1,
        train__learning_rate=1e-2,
        sample__eval_guidance_scale=3.0,
        **running.lora(files),
    )
    run = running.train(argv)
    prompts = run.plan.eval_prompts
    batch = run.evaluator.prompt_batch(prompts[:1], [(0, -1)], run.evaluator.guidance)
    randomness = Randomness(run.config.seed, ())
    with run.snapshots.using("ema"):
        ours = sample(run.pipeline, run.model, batch, run.evaluator.schedule, randomness).images[0]
    policy = sample(run.pipeline, run.model, batch, run.evaluator.schedule, randomness).images[0]

    stock = StableDiffusion3Pipeline.from_pretrained(files / "sd3")

    def picture():
        return np.asarray(
            stock(
                prompts[0].text,
                height=32,
                width=32,
                num_inference_steps=3,
                guidance_scale=3.0,
                max_sequence_length=16,
                latents=randomness.normal(
                    "init", [(0, -1)], run.pipeline.noise_shape(run.evaluator.size)
                ),
            ).images[0]
        )

    base = picture()
    stock.load_lora_weights(run.folder / "checkpoints" / "checkpoint-4" / "lora")
    assert np.array_equal(picture(), ours)
    assert not np.array_equal(base, ours) and not np.array_equal(policy, ours)


def test_the_exported_transformer_is_the_trained_one(files):
    run = running.train(running.arguments(files, run_name="full"))
    folder = run.folder / "checkpoints" / "checkpoint-4" / "transformer"
    exported = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    trained = run.pipeline.transformer.state_dict()
    assert all(torch.equal(exported[key], trained[key]) for key in trained)
    start = running.prepare(running.arguments(files)).pipeline.transformer.state_dict()
    changed = [key for key in trained if not torch.equal(start[key], trained[key])]
    assert any("attn" in key for key in changed) and any("ff" in key for key in changed)


def test_a_lora_trains_every_target_module_and_nothing_else(files):
    run = running.prepare(running.arguments(files, run_name="targets", **running.lora(files)))
    before = {k: v.clone() for k, v in run.pipeline.transformer.state_dict().items()}
    entry.execute(run)
    after = run.pipeline.transformer.state_dict()
    for key, value in after.items():
        if "transformer_blocks.1.attn.add_q" not in key:  # the last ones reach no output
            assert torch.equal(value, before[key]) == ("lora_" not in key), key


def test_bf16_trains_within_the_gate_and_differs_from_fp32(files):
    settings = running.lora(files) | {"num_epochs": 1}
    low = running.train(
        running.arguments(files, run_name="bf16", mixed_precision="bf16", **settings)
    )
    full = running.train(running.arguments(files, run_name="fp32", **settings))
    assert max(running.gate(low.folder).values()) <= low.objective.gate_limits()["log_ratio"]
    assert low.pipeline.input_dtype == torch.bfloat16
    assert {p.dtype for _, p in running.trained_parameters(low)} == {torch.float32}
    low_loss, full_loss = (read_metrics(r.folder, "update")[1]["loss"] for r in (low, full))
    assert low_loss != full_loss


def test_shuffled_advantages_keep_their_values_and_lose_their_rows(files):
    runs = {}
    for shuffled in (False, True):
        name = f"shuffle{shuffled}"
        argv = running.arguments(
            files, run_name=name, num_epochs=1, train__shuffle_advantages=shuffled
        )
        run = running.prepare(argv)
        seen, points = [], run.objective.points
        run.objective.points = lambda micro, randomness, s=seen, p=points: (
            s.append(micro.advantages),
            p(micro, randomness),
        )[1]
        entry.execute(run)
        runs[shuffled] = torch.cat(seen[1:])  # the first one is the gate's
    assert not torch.equal(runs[True], runs[False])
    assert torch.equal(runs[True].sort().values, runs[False].sort().values)


def test_the_reward_is_called_once_for_every_picture(files):
    run = running.prepare(running.arguments(files, run_name="calls", eval_max_samples=3))
    scored = running.watch_scores(run)
    entry.execute(run)
    training = 2 * 4 * 4  # epochs x batches x images
    assert sum(count for count, held_out in scored if not held_out) == training
    assert sum(count for count, held_out in scored if held_out) == 2 * 3  # 3 prompts, twice
    assert run.evaluator.conditioner.num_encoded == len(set(running.PROMPTS))


def test_a_missing_score_takes_its_row_out_of_the_loss(files):
    def losses(poison: bool):
        run = running.prepare(running.arguments(files, run_name=f"hole{poison}", num_epochs=1))

        def holed(scores, held_out):
            if poison:
                scores["avg"][::4] = np.nan
            return scores

        running.watch_scores(run, holed)
        entry.execute(run)
        return read_metrics(run.folder, "epoch")[0]["reward/missing"], running.weights(run.folder)

    none, whole = losses(False)
    some, holed = losses(True)
    assert (none, some) == (0, 4)  # one a call
    assert all(torch.isfinite(value).all() for value in holed.values())
    assert any(not torch.equal(whole[key], holed[key]) for key in whole)


def test_replayed_log_probs_allow_another_micro_batch(files):
    argv = running.arguments(
        files, run_name="replay", train__batch_size=8, train__old_log_prob="replay", num_epochs=1
    )
    run = running.train(argv)
    assert set(running.gate(run.folder).values()) == {0.0}
    assert run.plan.num_micro_batches == 2


def test_nft_runs_through_the_same_loop_with_its_old_policy(files):
    argv = running.arguments(
        files,
        run_name="nft",
        objective="nft",
        sample__noise_level=0.0,
        train__learning_rate=1e-2,
        nft__num_times=2,
        **running.lora(files),
    )
    run = running.prepare(argv)
    start = {k: v.clone() for k, v in run.snapshots.state_dict().items()}
    entry.execute(run)
    name, param = next(iter(running.trained_parameters(run)))
    old = run.snapshots.state_dict()[f"old/{name}"]
    decays = [min(0.001 * n, 0.5) for n in (2, 4)]
    assert not torch.equal(old, start[f"old/{name}"]) and not torch.equal(old, param)
    assert (old - param).abs().max() <= decays[-1] * 4 * 1e-2 * 1.5
    first = read_metrics(run.folder, "update")[0]
    assert first["drift"] == 0.0 and first["kl"] > 0  # the LoRA's B is random


def test_tracker_files_are_written(files):
    run = running.train(running.arguments(files, run_name="board", tracker="tensorboard"))
    assert list((run.folder / "tensorboard").glob("events.*"))
    assert json.loads((run.folder / "config.json").read_text())["run_name"] == "board"
    assert {p.name for p in (run.folder / "images").iterdir()} >= {"eval-000000.png"}
