"""From the command line to a run: settings, preflight, folders; and its bookkeeping."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from config import testbed
from config.base import base
from flow_grpo.training import folders, preflight, report, settings
from flow_grpo.training.optimizer import learning_rate
from flow_grpo.training.snapshots import Snapshots, ema_decay
from flow_grpo.training.tracking import Statistics, Timer, contact_sheet

ROOT = Path(__file__).parents[1]
RUN = "config/testbed.py:shapes_sd3"


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(*arguments):
    return settings.load(["train.py", *arguments], RUN)


def test_without_arguments_the_default_run_is_loaded_and_locked():
    config, name = load()
    assert name == "shapes_sd3" and config == testbed.shapes_sd3() and config.is_locked
    with pytest.raises(AttributeError):
        config.train.learning_rat = 1.0


@pytest.mark.parametrize("form", [[f"--config={RUN}_nft"], ["--config", f"{RUN}_nft"]])
def test_a_named_run_takes_overrides_of_every_type(form):
    config, name = load(
        *form,
        "--config.num_epochs=3",
        "--config.train.learning_rate=1e-5",
        "--config.train.beta=1",
        "--config.sample.sde_window_range=(1, 4)",
        "--config.sample.sde_steps=(2,)",
        "--config.train.ema=False",
        "--config.run_name=7",
        "--config.height=64",
        "--config.sample.eval_guidance_scale=2.5",
        "--config.reward_fn={'jpeg_compressibility': 0.5, 'shapes': 0}",
    )
    expected = testbed.shapes_sd3_nft()
    assert name == "shapes_sd3_nft" and config.objective == "nft"
    changed = {
        "num_epochs": 3,
        "height": 64,
        "run_name": "7",
        "train": {"learning_rate": 1e-5, "beta": 1.0, "ema": False},
        "sample": {"sde_window_range": (1, 4), "sde_steps": (2,), "eval_guidance_scale": 2.5},
    }
    expected.update(changed)
    expected.reward_fn = {"jpeg_compressibility": 0.5, "shapes": 0}
    assert config == expected and config.is_locked


def test_one_reward_can_be_reweighted_alone():
    assert load("--config.reward_fn.shapes=0.25")[0].reward_fn.to_dict() == {"shapes": 0.25}


@pytest.mark.parametrize(
    "argument, found, remedy",
    [
        ("--config.num_epoch=3", "no key config.num_epoch.", "mean --config.num_epochs?"),
        (
            "--config.train.learnin_rate=1",
            "no key config.train.learnin_rate.",
            "mean --config.train.learning_rate?",
        ),
        (
            "--config.trian.learning_rate=1",
            "no key config.trian.learning_rate.",
            "mean --config.train.learning_rate?",
        ),
        ("--config.zzzzzzzz=1", "no key config.zzzzzzzz.", "All keys are in config/base.py"),
        ("--config.reward_fn.shape=1", "no key config.reward_fn.shape.", "config/base.py"),
        ("--config.num_epochs=many", "--config.num_epochs=many", "A value like 60 (int)"),
        ("--config.num_epochs=1.5", "--config.num_epochs=1.5", "A value like 60 (int)"),
        ("--config.train.beta=x", "--config.train.beta=x", "A value like 0.0 (float)"),
        ("--config.train.ema=perhaps", "--config.train.ema=perhaps", "like True (bool)"),
        ("--config.height=tall", "--config.height=tall", "A value like None (int)"),
        ("--config.reward_fn=shapes", "--config.reward_fn=shapes", "A value like {'shapes': 1.0}"),
        (
            "--config=config/none.py:x",
            "no file 'config/none.py' below",
            "from the project's folder",
        ),
        ("--config=config/base.py:x", "--config=config/base.py", "no function get_config(name)"),
        ("--config=config/testbed.py:shape_sd3", "no run 'shape_sd3'", "mean 'shapes_sd3'?"),
        ("shapes_sd3", "'shapes_sd3' is not an option", "usage: SCRIPT [--config FILE.py:RUN]"),
        ("--epochs=3", "flag 'epochs'", "usage: SCRIPT [--config FILE.py:RUN]"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_its_remedy(argument, found, remedy):
    with pytest.raises(ValueError) as error:
        load(argument)
    assert found in str(error.value) and remedy in str(error.value)
    with pytest.raises(ValueError):  # nor does it pass among others
        load("--config.seed=3", argument)


def test_help_shows_the_usage_and_where_the_keys_are():
    with pytest.raises(SystemExit, match="usage: SCRIPT(.|\n)*config/base.py"):
        load("--help")


RUNS = [
    f"{path.relative_to(ROOT)}:{name}"
    for path in sorted((ROOT / "config").glob("*.py"))
    if path.name not in ("base.py", "__init__.py")
    for name, run in vars(__import__(f"config.{path.stem}", fromlist=["x"])).items()
    if callable(run) and name not in ("base", "select", "get_config") and name[0] != "_"
]


@pytest.mark.parametrize("run", RUNS)
def test_every_run_has_a_docstring_loads_and_has_the_keys_of_the_base(run):
    config, name = settings.load(["train.py"], run)
    assert name == run.split(":")[1] and config.is_locked
    keys = set(settings._keys(config)) - {key for key in settings._keys(config) if "fn." in key}
    assert keys == {key for key in settings._keys(base()) if "fn." not in key}


@pytest.fixture
def config(tmp_path):
    """A config that passes: 2 rank(s) x 4 pictures x 6 calls are 6 groups of 8."""
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
    assert "2 rank(s), 3 prompts; an epoch: 6 groups x 8 pictures, 2 optimizer" in str(plan)
    config.train.batch_size, config.eval_max_samples = 8, 0
    plan = preflight.check(config, 2)
    assert (plan.num_micro_batches, plan.micro_batch_size, plan.num_updates) == (3, 8, 1)
    assert len(plan.eval_prompts) == 2


REFUSED = [(key, "other", "is needed") for key in preflight.CHOICES]
REFUSED += [(key, 0, "at least 1 is needed") for key in preflight.AT_LEAST_ONE]
REFUSED += [(key, -1, "at least 0 is needed") for key in preflight.NOT_NEGATIVE]
REFUSED += [("train.clip_range", x, "at least 0 is needed") for x in (math.nan, math.inf)]
REFUSED += [(key, x, "above 0 is needed") for key in preflight.POSITIVE for x in (0.0, math.inf)]
REFUSED += [
    ("train.batch_size", 5, "does not divide the 24 pictures"),
    ("train.batch_size", -4, "does not divide the 24 pictures"),
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
        ({"beauty": 1.0}, "no reward 'beauty'; there are jpeg_compressibility, jpeg_"),
        ({"shapes": 0.0}, "non-zero weight is needed, for example --config.reward_fn="),
        ({"shapes": "1"}, "the weight of 'shapes' must be a finite number"),
        ({"shapes": math.nan}, "the weight of 'shapes' must be a finite number"),
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
    config.pretrained.model = "owner/name"  # on the hub, or not: only the download can tell
    preflight.check(config, 2)


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
    assert "config.train.batch_size=12: the reference pictures have 2 sizes" in message
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


@pytest.mark.parametrize("module", ["preflight", "settings", "folders", "prompts"])
def test_what_runs_before_torch_does_not_import_it(module):
    code = f"import sys, flow_grpo.training.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def make_checkpoint(config, step, identity=None, *, complete=True):
    folder = Path(config.logdir) / config.run_name / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"x" * 100)
    state = {"files": {"weights.safetensors": 100}, "identity": identity or {"config.seed": 42}}
    if complete:
        (folder / folders.STATE).write_text(json.dumps(state))
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


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"x" * 99), Path.unlink])
def test_a_damaged_checkpoint_is_refused(resuming, damage):
    damage(make_checkpoint(resuming, 3) / "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors is missing or cut short. Resume fro"):
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
    name = "pictures an epoch" if key.startswith("sample") else f"config.{key}"
    with pytest.raises(ValueError, match=f"with {name}=.* this run has .*start a new run"):
        folders.resume_point(resuming, other)


def test_a_checkpoint_of_another_script_is_refused_and_other_world_sizes_may_make_up(resuming):
    make_checkpoint(resuming, 3, folders.identity(resuming, "SD3", 2))
    with pytest.raises(ValueError, match="with script's pipeline='SD3', this run has 'Flux'"):
        folders.resume_point(resuming, folders.identity(resuming, "Flux", 2))
    resuming.sample.num_batches_per_epoch *= 2
    assert folders.resume_point(resuming, folders.identity(resuming, "SD3", 1)) is not None


def test_the_averages_decay_forgets_its_start():
    decays = [ema_decay(0.9, n) for n in (0, 7, 15, 79, 80, 10_000)]
    assert decays == pytest.approx([0.1, 8 / 17, 0.64, 80 / 89, 0.9, 0.9])


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def weights(module):
    return torch.cat([param.detach().flatten().clone() for param in module.parameters()])


def test_an_average_of_one_two_three_is_as_computed_by_hand():
    module = layer()
    torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    snapshots = Snapshots(module, ["ema"], use_lora=False)
    for update, expected in enumerate([0.9, 1.8, 2.7]):
        for param in module.parameters():
            param.data += 1
        snapshots.update("ema", ema_decay(0.9, update))
        with snapshots.using("ema"):
            torch.testing.assert_close(weights(module), torch.full((8,), expected))
    snapshots.update("ema", 0.0)
    assert all((tensor == 3).all() for tensor in snapshots.state_dict().values())


def test_a_snapshot_is_swapped_in_and_the_policy_comes_back_bit_for_bit():
    module = layer()
    held = weights(module)
    snapshots = Snapshots(module, ["old", "reference"], use_lora=False)
    with torch.no_grad():
        module.weight += 1 / 3
    own = weights(module)
    with snapshots.using("policy"):
        assert torch.equal(weights(module), own)
    for name in ("old", "reference", "old"):
        with snapshots.using(name):
            assert torch.equal(weights(module), held)
        assert torch.equal(weights(module), own)
    with pytest.raises(KeyError, match="inside"), snapshots.using("old"):
        raise KeyError("inside")
    assert torch.equal(weights(module), own)


def test_snapshots_hold_trained_weights_alone_in_fp32_and_survive_a_file():
    module = layer().bfloat16()
    module.bias.requires_grad_(False)
    snapshots = Snapshots(module, ["old"], use_lora=False)
    state = {name: tensor.clone() for name, tensor in snapshots.state_dict().items()}
    assert list(state) == ["old/weight"] and state["old/weight"].dtype == torch.float32
    with torch.no_grad():
        module.weight += 1
    snapshots.update("old", 0.999)  # less than bf16 can tell
    assert not torch.equal(snapshots.state_dict()["old/weight"], state["old/weight"])
    snapshots.load_state_dict(state)
    assert torch.equal(snapshots.state_dict()["old/weight"], state["old/weight"])


def test_the_reference_of_a_lora_is_the_module_without_it():
    module, calls = layer(), []
    module.disable_adapters = lambda: calls.append("off")
    module.enable_adapters = lambda: calls.append("on")
    snapshots = Snapshots(module, ["reference"], use_lora=True)
    assert snapshots.state_dict() == {}
    with pytest.raises(KeyError, match="inside"), snapshots.using("reference"):
        assert calls == ["off"]
        raise KeyError("inside")
    assert calls == ["off", "on"]


@pytest.mark.parametrize(
    "shape, warm_up, expected",
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0]),
        ("linear", 4, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("cosine", 0, [1, None, 0.5 + 0.125**0.5, None, 0.5, None, 0.5 - 0.125**0.5, None, 0, 0]),
    ],
)
def test_the_learning_rate_of_eight_updates(shape, warm_up, expected):
    train = base().train
    train.learning_rate, train.lr_scheduler, train.lr_warmup_steps = 2e-4, shape, warm_up
    for update, rate in enumerate(expected):
        if rate is not None:
            assert learning_rate(train, update, 8) == pytest.approx(2e-4 * rate, abs=1e-12)


def test_statistics_are_weighted_moments_in_all_and_per_step():
    rng = np.random.default_rng(0)
    ratio, loss = rng.normal(1, 0.1, (2, 60)).astype(np.float32)
    bins, weight = rng.integers(0, 3, 60) * 2, rng.uniform(0.5, 2, 60)
    weight[::7] = 0
    statistics = Statistics(6, torch.device("cpu"))
    for part in (slice(0, 10), slice(10, 60)):
        statistics.add(
            {"ratio": torch.from_numpy(ratio[part]), "loss": torch.from_numpy(loss[part])},
            torch.from_numpy(bins[part]),
            torch.from_numpy(weight[part]),
        )
    accelerator = Accelerator(cpu=True)
    metrics = statistics.collect(accelerator)
    for suffix, rows in {"": bins >= 0, "/0": bins == 0, "/2": bins == 2, "/4": bins == 4}.items():
        mean = np.average(ratio[rows], weights=weight[rows])
        variance = np.average((ratio[rows] - mean) ** 2, weights=weight[rows])
        assert metrics[f"ratio{suffix}"] == pytest.approx(mean, rel=1e-9)
        assert metrics[f"ratio{suffix}_std"] == pytest.approx(math.sqrt(variance), rel=1e-6)
        expected = np.average(loss[rows], weights=weight[rows])
        assert metrics[f"loss{suffix}"] == pytest.approx(expected, rel=1e-9)
    assert len(metrics) == 4 * 3 and statistics.collect(accelerator) == {}


def test_the_timer_adds_up_phases_and_starts_again(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 25.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = Timer()
    for phase in ("sample", "update", "sample"):
        with timer(phase):
            pass
    assert timer.report() == {"seconds/sample": 7, "seconds/update": 1} and timer.report() == {}


def test_a_contact_sheet_shows_pictures_in_rows():
    red, blue = (np.full((48, 96, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = np.asarray(contact_sheet([red, red, blue], num_columns=2))
    assert sheet.shape == (2 * 50 + 2, 2 * 98 + 2, 3)
    assert (sheet[2:50, 2:98] == red).all() and (sheet[2:50, 100:196] == red).all()
    assert (sheet[52:100, 2:98] == blue).all() and (sheet[52:100, 100:196] == 128).all()


def test_the_table_compares_the_first_evaluation_with_the_last(tmp_path):
    rows = [
        {"kind": "eval", "epoch": 0, "step": 0, "avg": 0.125, "avg/count": 0.0, "shapes": 0.25},
        {"kind": "update", "epoch": 0, "step": 1, "loss": 9.0},
        {"kind": "eval", "epoch": 1, "step": 3, "avg": 9.0},
        {"kind": "eval", "epoch": 2, "step": 6, "avg": 0.75, "avg/count": 0.5, "avg/two": 1.0},
    ]
    rows[-1] |= {"shapes": 0.5, "shapes_missing": 2}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line.split("  ") for line in report.table(tmp_path).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["step 0 -> 6", "all", "count", "two"],
        ["avg", "0.125 -> 0.750", "0.000 -> 0.500", "-"],
        ["shapes", "0.250 -> 0.500", "-", "-"],
    ]
    assert len({len(line) for line in report.table(tmp_path).splitlines()}) == 1


def test_the_last_of_repeated_overrides_wins():
    spans = [f"--config.sample.sde_window_range={span}" for span in ((0, 4), (1, 3))]
    config, _ = settings.load(["train.py", *spans], "config/testbed.py:shapes_sd3")
    assert config.sample.sde_window_range == (1, 3)
