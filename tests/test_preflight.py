"""From a config to the plan of a run, or a refusal; where a run resumes."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from config.base import base
from flow_grpo.launch import model_files, preflight
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.plan import Passes
from flow_grpo.training import digests, folders


@pytest.fixture
def config(tmp_path):
    """A config that passes: 2 rank(s) x 4 images x 6 calls are 6 groups of 8."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "data" / "test.txt").write_text("d\ne\n")
    config = base()
    config.pretrained.model = str(tmp_path / "model")
    config.dataset = str(tmp_path / "data")
    config.logdir = str(tmp_path / "logs")
    config.sample.train_batch_size = 4
    config.sample.num_batches_per_epoch = 6
    config.sample.num_image_per_prompt = 8
    config.train.gradient_accumulation_steps = 3
    return config


def test_the_plan_is_the_epochs_arithmetic(config):
    config.eval_max_samples = 1
    plan = preflight.check(config, 2)
    assert (plan.num_groups, plan.group_size) == (6, 8)
    assert (plan.num_micro_batches, plan.micro_batch_size, plan.num_updates) == (6, 4, 2)
    assert [prompt.text for prompt in plan.train_prompts] == ["a", "b", "c"]
    assert [prompt.text for prompt in plan.eval_prompts] == ["d"]
    assert str(plan) == (
        "2 rank(s), 3 prompts; an epoch: 6 groups x 8 = 48 images, 2 optimizer step(s) a pass"
    )
    config.train.batch_size, config.eval_max_samples = 8, 0
    plan = preflight.check(config, 2)
    assert (plan.num_micro_batches, plan.micro_batch_size, plan.num_updates) == (3, 8, 1)
    assert len(plan.eval_prompts) == 2


def test_the_plan_is_compared_with_the_published_48_groups_of_24(config):
    few = preflight.check(config, 2).beside_published(6)
    assert "48 groups of 24" in few and "smaller groups" in few
    assert "sample.num_batches_per_epoch=48 gives 48 on these ranks" in few
    config.sample.num_batches_per_epoch = 48  # as it was told
    assert preflight.check(config, 2).num_groups == 48
    config.sample.num_image_per_prompt, config.sample.num_batches_per_epoch = 24, 144
    assert preflight.check(config, 2).beside_published(144).startswith("at least the 48 groups")


def test_passes_through_the_transformer_are_counted(config):
    plan = preflight.check(config, 2)  # 48 images an epoch
    drawn = {"guided": False, "num_sampled": 480}
    assert plan.passes(config, Passes(9, 0, 0), **drawn) == {
        "sampling": 48 * 10,
        "forward and backward": 48 * 9,
        "frozen predictions": 0,
        "before the first update": 0,
    }
    config.train.num_inner_epochs = 3
    drawn["guided"] = True
    assert plan.passes(config, Passes(9, 9, 9), **drawn) == {
        "sampling": 48 * 10 * 2,
        "forward and backward": 48 * 9 * 2 * 3,
        "frozen predictions": 48 * 9 * 2 * 3,
        "before the first update": 48 * 9 * 2,
    }
    config.train.cfg = False
    assert plan.passes(config, Passes(9, 0, 0), **drawn)["forward and backward"] == 48 * 9 * 3


@pytest.mark.parametrize(
    "changed",
    [
        {"sample__guidance_scale": 4.0, "train__cfg": True, "train__beta": 0.1},
        {"train__old_log_prob": "replay", "train__num_inner_epochs": 2},
        {"objective": "nft"},
        {"objective": "nft", "nft__steps": (0, 2), "nft__decay": "on_policy"},
        {"objective": "vgrpo"},
        {"objective": "dgpo", "forward__num_times": 2, "forward__antithetic": True},
        {"objective": "crd", "train__reference_guidance": 3.0},
        {"train__beta": 0.1, "train__reward_kl": 1.0, "train__reference_guidance": 3.0},
        {
            "sample__guidance_scale": 4.0,
            "train__cfg": True,
            "train__beta": 0.1,
            "train__reference_guidance": 1.0,
        },
    ],
)
def test_the_counted_passes_are_those_that_an_epoch_makes(files, tmp_path, changed):
    import running
    import torch

    from flow_grpo.training import collect, loop

    run = running.prepare(running.arguments(files, logdir=tmp_path, **changed))
    rows = {"sampling": 0, "with gradient": 0, "without": 0}
    phase = "sampling"

    def count(module, inputs, kwargs):
        kind = "with gradient" if torch.is_grad_enabled() else "without"
        rows[phase or kind] += len(kwargs["hidden_states"])

    run.pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    sampled = collect.roll_out(run, 0)
    phase = ""
    arranged, _ = collect.weigh(run, sampled, collect.score(run, sampled), 0)
    loop.update(run, sampled, arranged, 0)
    counted = run.passes()
    assert rows["sampling"] == counted["sampling"] > 0
    assert rows["with gradient"] == counted["forward and backward"] > 0
    assert rows["without"] == counted["frozen predictions"] + counted["before the first update"] > 0


REFUSED = [
    (
        "objective",
        "other",
        f"one of {', '.join(OBJECTIVES)} is needed, or module:Class of one's own",
    ),
    ("objective", "grop", "Did you mean 'grpo'?"),
    ("tracker", "wand", "one of tensorboard, wandb, none is needed"),
    ("tracker", "wand", "Did you mean 'wandb'?"),
    ("save_freq", 0, "a whole number of at least 1 and at most 1,000,000,000 is needed (epochs;"),
    ("save_freq", 0, "The default is 20."),
    ("train.max_grad_norm", math.inf, "is needed (0: no clipping). The default is 1.0."),
    ("train.clip_range", -1.0, "at least 0 and at most 1 is needed"),
    ("train.clip_range", math.nan, "at least 0 and at most 1 is needed"),
    ("train.adv_clip_max", 0.0, "a number above 0 and at most 1,000 is needed"),
    ("max_masked_fraction", 1.0, "at least 0 and below 1 is needed"),
    ("reward_timeout", 0.0, "above 0 and at most 1,000,000 is needed (seconds"),
    ("sample.sde_steps", (0, -1), "a tuple of whole numbers of at least 0 and at most 1,000"),
    ("train.batch_size", -4, "None or a whole number of at least 1"),
    ("train.batch_size", 5, "does not divide the 24 images"),
    ("train.gradient_accumulation_steps", 4, "config.sample.num_batches_per_epoch"),
    ("pretrained.model", "a/b/c", "no such folder, and it is no hub id (owner/name)"),
    ("pretrained.model", "./model", "no such folder"),
    ("dataset", "/nowhere", "exactly one of train.txt and train_metadata.jsonl"),
]


@pytest.mark.parametrize("key, value, remedy", REFUSED)
def test_a_value_that_cannot_work_is_refused_with_its_key_and_what_is_needed(
    config, key, value, remedy
):
    preflight.check(config, 2)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError) as error:
        preflight.check(config, 2)
    assert f"config.{key}={value!r}" in str(error.value) and remedy in str(error.value)


def refusal(config, world_size=2):
    with pytest.raises(ValueError) as error:
        preflight.check(config, world_size)
    return str(error.value)


def test_groups_that_do_not_fill_an_epoch_are_refused_with_the_arithmetic(config):
    config.sample.num_image_per_prompt = 7
    message = refusal(config)
    assert "2 rank(s) x sample.train_batch_size 4 x sample.num_batches_per_epoch 6 = 48" in message
    assert "not a multiple of sample.num_image_per_prompt 7" in message


def test_an_impossible_window_is_refused(config):
    config.sample.sde_window_size = 6
    assert "config.sample.sde_window_range" in refusal(config)


@pytest.mark.parametrize(
    "rewards, complaint",
    [
        ({"jpeg_compresibility": 1.0}, "Did you mean 'jpeg_compressibility'?"),
        ({"beauty": 1.0}, "no reward 'beauty'; there are "),
        ({"shapes": 0.0}, "non-zero weight is needed, for example --config.reward_fn="),
        ({"shapes": "1"}, "a dict of numbers of at least -1,000 and at most 1,000"),
        ({"shapes": math.nan}, "a dict of numbers of at least -1,000 and at most 1,000"),
    ],
)
def test_a_wrong_reward_is_refused(config, rewards, complaint):
    with config.unlocked():
        config.reward_fn = rewards
    message = refusal(config)
    assert f"config.reward_fn={rewards}" in message and complaint in message


def test_a_model_that_is_no_pipeline_folder_is_refused(config):
    config.pretrained.model = config.dataset
    assert "has no model_index.json" in refusal(config)
    config.pretrained.model = ""
    assert "config.pretrained.model is empty" in refusal(config)


def on_the_hub(config, monkeypatch, tmp_path, *, offline):
    monkeypatch.setattr(model_files.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    config.pretrained.model = "black-forest-labs/FLUX.1-dev"


def test_a_model_of_the_hub_comes_with_the_command_that_downloads_it(config, monkeypatch, tmp_path):
    on_the_hub(config, monkeypatch, tmp_path, offline=False)
    preflight.check(config, 2)
    note = model_files.to_download(config)
    assert "If that is refused, the model is gated: accept its licence on https://hugg" in note
    assert "huggingface.co/black-forest-labs/FLUX.1-dev, then `hf auth login`" in note
    assert "hf download black-forest-labs/FLUX.1-dev --include model_index.json" in note
    config.pretrained.model, config.pretrained.revision = "owner/name", "v2"
    note = model_files.to_download(config)
    assert "https://huggingface.co/owner/name, then" in note
    assert "hf download owner/name --revision v2 --include" in note


def test_offline_a_model_that_is_not_in_the_hubs_cache_is_refused(config, monkeypatch, tmp_path):
    on_the_hub(config, monkeypatch, tmp_path, offline=True)
    message = refusal(config)
    assert "config.pretrained.model='black-forest-labs/FLUX.1-dev' is not on this" in message
    assert "HF_HUB_OFFLINE forbids" in message
    cached = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "model_index.json").write_text("{}")
    preflight.check(config, 2)
    assert model_files.to_download(config) == ""


@pytest.fixture
def sd3(config):
    """What a folder of SD3.5 Medium says about sizes."""
    parts = {
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]},
        "transformer": {"patch_size": 2, "pos_embed_max_size": 384},
    }
    for part, values in parts.items():
        folder = Path(config.pretrained.model) / part
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
    return config


@pytest.mark.parametrize(
    "key, value, remedy",
    [
        ("resolution", 500, "multiples of 16 pixels. The nearest is 496"),
        ("resolution", 8192, "at most 6144. The nearest is 6144"),
        ("height", 1000, "multiples of 16 pixels. The nearest is 992"),
        ("width", 7, "multiples of 16 pixels. The nearest is 16"),
    ],
)
def test_a_size_that_the_models_files_rule_out_is_refused(sd3, key, value, remedy):
    preflight.check(sd3, 2)
    sd3[key] = value
    message = refusal(sd3)
    assert f"config.{key}={value}: " in message and remedy in message


def test_calls_that_would_mix_sizes_of_reference_pictures_are_refused(config):
    data = Path(config.dataset)
    (data / "train.txt").unlink()
    for size in (16, 32):
        Image.new("RGB", (size, size)).save(data / f"{size}.png")
    rows = [{"prompt": "p", "image": f"{size}.png"} for size in (16, 32)]
    (data / "train_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preflight.check(config, 2)
    config.train.batch_size = 12
    config.train.gradient_accumulation_steps = 1
    message = refusal(config)
    assert "config.train.batch_size=12: the prompts' pictures or reference images have 2" in message
    assert "A divisor of sample.num_image_per_prompt 8 is needed" in message


def test_a_run_is_not_written_over(config):
    config.run_name = "mine"
    preflight.check(config, 2)
    folder = Path(config.logdir) / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    message = refusal(config)
    assert "config.run_name='mine'" in message and "--config.resume_from=latest" in message
    config.resume_from = "latest"
    preflight.check(config, 2)


def make_checkpoint(config, step, identity=None, *, complete=True):
    folder = Path(config.logdir) / config.run_name / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    weights = folder / "weights-0.safetensors"
    weights.write_bytes(b"x" * 100)
    files = digests.of(folder, [weights])
    state = dict.fromkeys(folders.COUNTERS, 0)
    state |= {"files": files, "identity": identity or {"config.seed": 42}}
    if complete:
        (folder / folders.STATE).write_text(json.dumps(digests.sealed(state)))
    return folder


@pytest.fixture
def resuming(config):
    config.run_name, config.resume_from = "mine", "latest"
    return config


def test_latest_is_the_complete_checkpoint_of_the_most_steps(resuming):
    made = [make_checkpoint(resuming, step) for step in (9, 100, 20)]
    make_checkpoint(resuming, 300, complete=False)
    assert folders.resume_point(resuming, {"config.seed": 42}) == made[1]
    assert folders.checkpoints(made[0].parents[1]) == [made[0], made[2], made[1]]
    resuming.resume_from = "auto"
    assert folders.resume_point(resuming, {}) == made[1]
    resuming.resume_from = str(made[0])
    assert folders.resume_point(resuming, {}) == made[0]


def test_where_there_is_no_checkpoint_auto_starts_anew_and_latest_is_refused(resuming):
    with pytest.raises(ValueError, match="has no checkpoint. Give a .* path, or 'auto' to start"):
        folders.resume_point(resuming, {})
    resuming.resume_from = "auto"
    assert folders.resume_point(resuming, {}) is None
    resuming.run_name = ""
    with pytest.raises(ValueError, match="config.run_name must name the run to continue"):
        folders.resume_point(resuming, {})
    resuming.resume_from = ""
    assert folders.resume_point(resuming, {}) is None
    resuming.resume_from = str(make_checkpoint(resuming, 3, complete=False))
    with pytest.raises(ValueError, match="no complete checkpoint .trainer.json is missing"):
        folders.resume_point(resuming, {})


def test_a_checkpoint_of_an_older_format_is_refused(resuming):
    path = make_checkpoint(resuming, 3) / folders.STATE
    state = json.loads(path.read_text())
    del state[digests.SEAL]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="is of an older version.* lora/ can be carried over"):
        folders.resume_point(resuming, {})


@pytest.mark.parametrize(
    "key, value",
    [
        ("pretrained.model", "elsewhere/other"),
        ("objective", "nft"),
        ("use_lora", False),
        ("train.lora_rank", 8),
        ("train.lora_alpha", 8),
        ("train.lora_targets", ("to_q",)),
        ("train.ema", True),
        ("seed", 1),
        ("sample.train_batch_size", 2),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(resuming, key, value):
    identity = folders.identity(resuming, "SD3", 2)
    make_checkpoint(resuming, 3, json.loads(json.dumps(identity)))
    assert folders.resume_point(resuming, identity) is not None
    resuming.update_from_flattened_dict({key: value})
    other = folders.identity(resuming, "SD3", 2)
    name = "images an epoch" if key.startswith("sample") else f"config.{key}"
    with pytest.raises(ValueError, match=f"with {name}=.* this run has .*start a new run"):
        folders.resume_point(resuming, other)


def test_a_checkpoint_of_another_script_is_refused_and_other_world_sizes_may_make_up(resuming):
    make_checkpoint(resuming, 3, folders.identity(resuming, "SD3", 2))
    with pytest.raises(ValueError, match="with script's pipeline='SD3', this run has 'Flux'"):
        folders.resume_point(resuming, folders.identity(resuming, "Flux", 2))
    resuming.sample.num_batches_per_epoch *= 2
    assert folders.resume_point(resuming, folders.identity(resuming, "SD3", 1)) is not None
