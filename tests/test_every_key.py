"""Every key of the config is read: a value other than its default changes what this sees.

every_key.py names a test for each key; a key without one fails here.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import every_key
import pytest
import running
import torch

from config.base import base
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.launch import encoders
from flow_grpo.rewards import loading
from flow_grpo.rewards.judges import chat, local
from flow_grpo.rewards.remote import servers
from flow_grpo.rewards.rules import ocr
from flow_grpo.training import optimizer, tracking
from flow_grpo.training.snapshots import POLICY


def lora(run):
    return getattr(run.pipeline.transformer, "peft_config", {}).get(POLICY)


def ema_decay(run) -> float | None:
    """Measure the average's decay late in a run: it and the policy are one number apart."""
    if not run.config.train.ema:
        return None
    name, param = next(iter(running.trained_parameters(run)))
    param.data.fill_(0.0)
    run.snapshots.update("ema", 0.0)
    param.data.fill_(1.0)
    run.updater.num_updates = 10_000
    run.move_snapshots({})
    return round(1 - run.snapshots.values("ema")[name].mean().item(), 6)


def group(run) -> dict:
    return run.engine.optimizer.param_groups[0]


def compiled(run) -> bool:
    return "forward" in vars(run.pipeline.transformer.transformer_blocks[0])


# What is set, where a built run shows it, and what it shows then.
SEEN = {
    "seed": (7, lambda run: run.plan.seed, 7),
    "run_name": ("another", lambda run: run.folder.name, "another"),
    "num_epochs": (6, lambda run: run.updater.total_updates, 6 * 2 * 2),
    "train.num_inner_epochs": (2, lambda run: len(run.plan.in_order([[]], 0)), 2),
    "eval_split": ("dev", lambda run: [p.text for p in run.plan.eval_prompts][0], "dev 1"),
    "eval_max_samples": (2, lambda run: len(run.plan.eval_prompts), 2),
    "objective": ("nft", lambda run: type(run.objective).__name__, "NFT"),
    "reward_fn": (
        {"jpeg_compressibility": 0.5},
        lambda run: dict(run.evaluator.scorer.weights),
        {"jpeg_compressibility": 0.5},
    ),
    "height": (64, lambda run: run.evaluator.size.height, 64),
    "width": (48, lambda run: run.evaluator.size.width, 48),
    "max_sequence_length": (12, lambda run: run.schedule.pad_to, 12),
    "mixed_precision": ("bf16", lambda run: run.pipeline.input_dtype, torch.bfloat16),
    "allow_tf32": (False, lambda run: run.tf32, False),
    "use_lora": (True, lambda run: lora(run) is not None, True),
    "compile": (True, compiled, True),
    "sample.num_steps": (6, lambda run: run.schedule.num_steps, 6),
    "sample.eval_num_steps": (4, lambda run: run.evaluator.schedule.num_steps, 4),
    "sample.guidance_scale": (3.0, lambda run: run.guidance.scale, 3.0),
    "sample.eval_guidance_scale": (2.0, lambda run: run.evaluator.guidance.scale, 2.0),
    "sample.noise_level": (0.55, lambda run: run.schedule.noise_level, 0.55),
    "sample.sde_type": ("cps", lambda run: run.schedule.kind, "cps"),
    "sample.same_latent": (True, lambda run: run.schedule.same_latent, True),
    "sample.train_batch_size": (2, lambda run: len(run.calls(0, 0)[0].rows), 2),
    "sample.num_batches_per_epoch": (8, lambda run: len(run.calls(0, 0)), 8),
    "sample.num_image_per_prompt": (8, lambda run: run.plan.group_size, 8),
    "sample.solver": ("dpm2", lambda run: run.schedule.solver, "dpm2"),
    "sample.clean_grid": (True, lambda run: run.pipeline.clean_grid, True),
    "train.batch_size": (1, lambda run: run.plan.micro_batch_size, 1),
    "train.gradient_accumulation_steps": (
        8,
        lambda run: run.plan.num_micro_batches / run.plan.num_updates,
        8,
    ),
    "train.learning_rate": (1e-3, lambda run: group(run)["lr"], 1e-3),
    "train.adam_beta1": (0.8, lambda run: group(run)["betas"][0], 0.8),
    "train.adam_beta2": (0.95, lambda run: group(run)["betas"][1], 0.95),
    "train.adam_epsilon": (1e-6, lambda run: group(run)["eps"], 1e-6),
    "train.adam_weight_decay": (0.03, lambda run: group(run)["weight_decay"], 0.03),
    "train.ema": (True, lambda run: any("ema/" in key for key in run.snapshots.state_dict()), True),
    "train.ema_decay": (0.75, ema_decay, 0.75),
    "train.lora_rank": (3, lambda run: lora(run) and lora(run).r, 3),
    "train.lora_alpha": (5, lambda run: lora(run) and lora(run).lora_alpha, 5),
    "train.lora_targets": (
        ("to_q",),
        lambda run: lora(run) and {*lora(run).target_modules},
        {"to_q"},
    ),
}


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """A run as it comes, and one in which every key of SEEN is set; neither trains."""
    (files / "prompts" / "dev.txt").write_text("dev 1\ndev 2\ndev 3\n")
    changes = {key.replace(".", "__"): value for key, (value, _, _) in SEEN.items()}
    found = []
    for more in ({"run_name": "usual"}, changes):
        logdir = tmp_path_factory.mktemp("logs")
        run = running.prepare(running.arguments(files, logdir=logdir, **more))
        run.tf32 = torch.backends.cuda.matmul.allow_tf32
        found.append(run)
    return found


@pytest.mark.parametrize("key", SEEN)
def test_a_key_is_seen_where_it_belongs(runs, key):
    _, see, expected = SEEN[key]
    usual, changed = runs
    assert see(changed) == expected and see(usual) != expected


class Recorded:
    """Stands for a package that is not installed; keeps what it was given."""

    def __init__(self, *arguments, **keywords):
        self.arguments, self.keywords = arguments, keywords
        Recorded.last = self

    def start(self) -> None:
        pass


def test_eight_bits_are_those_of_bitsandbytes(monkeypatch):
    module = ModuleType("bitsandbytes")
    module.optim = SimpleNamespace(AdamW8bit=Recorded)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    train, params = base().train, [torch.nn.Parameter(torch.zeros(1))]
    assert isinstance(optimizer.build(params, train), torch.optim.AdamW)
    train.use_8bit_adam, train.adam_beta2 = True, 0.9
    assert isinstance(found := optimizer.build(params, train), Recorded)
    assert found.arguments == (params,) and found.keywords["betas"] == (0.9, 0.9)


def test_wandb_gets_the_project_s_name(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "WandBTracker", Recorded)
    config = base()
    config.tracker, config.project_name = "wandb", "of mine"
    tracking.Tracker(SimpleNamespace(is_main=True), tmp_path / "x").start(config)
    assert Recorded.last.arguments == ("of mine",) and Recorded.last.keywords["name"] == "x"


def test_a_server_is_called_as_it_is_told(tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef\n")
    config, urls = base(), ["http://127.0.0.1:9"]
    config.reward_timeout, config.reward_token_file = 7.5, str(tmp_path / "token")
    config.reward_encoding = "jpeg"
    with config.unlocked():
        config.reward_urls = {"jpeg_compressibility": urls}
    wanted = servers.Servers(
        {"jpeg_compressibility": urls}, timeout_s=7.5, token="0123456789abcdef", encoding="jpeg"
    )
    assert servers.of(config) == wanted


@pytest.mark.parametrize("name", ["unifiedreward", "qwenvl", "vlm"])
def test_a_judge_is_asked_as_it_is_told(name, monkeypatch):
    monkeypatch.setattr(chat, "Chat", Recorded)
    config = base()
    config.rewards[f"{name}_url"], config.rewards[f"{name}_model"] = "http://h:1/v1", "mine"
    config.rewards.judge_concurrency, config.rewards.judge_timeout_s = 3, 9.0
    reward = {"vlm": "vqascore"}.get(name, name)
    loading.load(reward, loading.settings(config), "cpu")
    assert Recorded.last.arguments == ("http://h:1/v1", "mine", 3, 9.0)


def test_a_judge_of_the_process_is_the_one_that_it_is_told(monkeypatch):
    config = base()
    config.rewards.vlm, config.rewards.vlm_revision = "owner/name", "abc"
    config.rewards.vlm_batch_size = 3
    monkeypatch.setattr(local, "LocalJudge", Recorded)
    loading.load("vqascore", loading.settings(config), "cpu")
    assert Recorded.last.arguments == ("owner/name", "abc", "cpu", 3)
    local.load.cache_clear()


def test_processes_read_as_they_are_told(monkeypatch):
    monkeypatch.setattr(ocr, "ProcessPoolExecutor", Recorded)
    config = base()
    config.ocr_engine, config.rewards.ocr_processes, config.rewards.ocr_side = "paddleocr", 2, 64
    loading.load("ocr", loading.settings(config), "cpu")
    assert Recorded.last.arguments[0] == 2
    assert Recorded.last.keywords["initargs"] == ("paddleocr", 64)


def test_embeddings_are_kept_where_it_is_told(tmp_path):
    config = base()
    config.logdir = str(tmp_path)
    assert encoders.store(config, SD3).folder == tmp_path / "conditionings"
    config.encoder_cache = str(tmp_path / "cache")
    assert encoders.store(config, SD3).folder == tmp_path / "cache"


LOADED_FROM = {  # the rewards that load these first of all
    "rewards.clip": "clipscore",
    "rewards.pickscore": "pickscore",
    "rewards.hpsv2": "hpsv2",
    "rewards.imagereward": "imagereward",
    "rewards.geneval_detector": "geneval",
    "rewards.siglip": "aesthetic_v2_5",
}


@pytest.mark.parametrize("key", LOADED_FROM)
def test_a_reward_loads_from_where_it_is_told(key, tmp_path):
    config, last = base(), key.partition(".")[2]
    config.rewards[last] = str(tmp_path / "not here")
    with pytest.raises((OSError, ValueError)) as error:
        loading.check(LOADED_FROM[key], loading.settings(config), ["a"], [{}])
        loading.load(LOADED_FROM[key], loading.settings(config), "cpu")
    assert "not here" in str(error.value)


def test_every_key_has_a_test_and_the_test_is_there():
    assert every_key.FOUND_BY.keys() == every_key.DECLARED.keys()
    for key, test in every_key.FOUND_BY.items():
        file, function = test.split("[")[0].split("::")
        assert f"\ndef {function}(" in (every_key.TESTS / file).read_text(), (key, test)
