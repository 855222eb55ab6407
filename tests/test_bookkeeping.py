"""What a run keeps beside its policy: snapshots, learning rate, statistics, a report."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model

from config.base import base
from flow_grpo.parallel.plain import Plain
from flow_grpo.report import output
from flow_grpo.training.optimizer import learning_rate
from flow_grpo.training.snapshots import Snapshots, ema_decay
from flow_grpo.training.tracking import Statistics, Timer, contact_sheet


def test_the_averages_decay_forgets_its_start():
    decays = [ema_decay(0.9, n) for n in (0, 7, 15, 79, 80, 10_000)]
    assert decays == pytest.approx([0.1, 8 / 17, 0.64, 80 / 89, 0.9, 0.9])


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def snapshots_of(module, names, use_lora=False):
    engine = Plain("no", cpu=True)
    trained = [param for param in module.parameters() if param.requires_grad]
    engine.wrap(module, torch.optim.SGD(trained), max_grad_norm=0)
    return Snapshots(engine, names, use_lora)


def weights(module):
    return torch.cat([param.detach().flatten().clone() for param in module.parameters()])


def test_an_average_of_one_two_three_is_as_computed_by_hand():
    module = layer()
    torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    snapshots = snapshots_of(module, ["ema"])
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
    snapshots = snapshots_of(module, ["old", "reference"])
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
    snapshots = snapshots_of(module, ["old"])
    state = {name: tensor.clone() for name, tensor in snapshots.state_dict().items()}
    assert list(state) == ["old/weight"] and state["old/weight"].dtype == torch.float32
    with torch.no_grad():
        module.weight += 1
    snapshots.update("old", 0.999)  # less than bf16 can tell
    assert not torch.equal(snapshots.state_dict()["old/weight"], state["old/weight"])
    snapshots.load_state_dict(state)
    assert torch.equal(snapshots.state_dict()["old/weight"], state["old/weight"])


def test_the_reference_of_a_lora_is_the_module_without_it():
    rows, module = torch.ones(1, 3), torch.nn.Sequential(layer())
    base = module(rows)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), module)
    policy = module(rows)
    snapshots = snapshots_of(module, ["reference"], use_lora=True)
    assert snapshots.state_dict() == {} and not torch.equal(policy, base)
    with pytest.raises(KeyError, match="inside"), snapshots.using("reference"):
        assert torch.equal(module(rows), base)
        raise KeyError("inside")
    assert torch.equal(module(rows), policy)


def test_a_weight_that_did_not_train_does_not_train_after_a_snapshot_was_asked():
    """peft lets every adapter train that it switches on again."""
    module = tiny.patched("qwenimage").transformer
    module.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q", "attn.add_q_proj"]))
    for name, param in module.named_parameters():
        param.requires_grad_("lora_" in name and "add_q_proj" not in name)
    before = [name for name, param in module.named_parameters() if param.requires_grad]
    snapshots = snapshots_of(module, ["old", "reference"], use_lora=True)
    for name in ("reference", "old", "policy"):
        with snapshots.using(name):
            pass
        after = [name for name, param in module.named_parameters() if param.requires_grad]
        assert after == before and 0 < len(before)


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
    metrics = statistics.metrics(statistics.sums().tolist())
    for suffix, rows in {"": bins >= 0, "/0": bins == 0, "/2": bins == 2, "/4": bins == 4}.items():
        mean = np.average(ratio[rows], weights=weight[rows])
        variance = np.average((ratio[rows] - mean) ** 2, weights=weight[rows])
        assert metrics[f"ratio{suffix}"] == pytest.approx(mean, rel=1e-9)
        assert metrics[f"ratio{suffix}_std"] == pytest.approx(math.sqrt(variance), rel=1e-6)
        expected = np.average(loss[rows], weights=weight[rows])
        assert metrics[f"loss{suffix}"] == pytest.approx(expected, rel=1e-9)
    assert len(metrics) == 4 * 3
    nothing = Statistics(6, torch.device("cpu"))
    assert nothing.metrics(nothing.sums().tolist()) == {}


def test_the_timer_adds_up_phases_and_starts_again():
    moments = iter([0.0, 2.0, 10.0, 11.0, 20.0, 25.0])
    timer = Timer(clock=lambda: next(moments))
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
    lines = [line.split("  ") for line in output.table(tmp_path).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["step 0 -> 6", "all", "count", "two"],
        ["avg", "0.125 -> 0.750", "0.000 -> 0.500", "-"],
        ["shapes", "0.250 -> 0.500", "-", "-"],
    ]
    assert len({len(line) for line in output.table(tmp_path).splitlines()}) == 1
