"""The contract of an engine (parallel/engine.py), on every engine alike: see engines.py."""

import json
import pickle
from itertools import pairwise

import engines
import pytest
import torch
from engines import MAX_GRAD_NORM, NUM_POINTS, SETTINGS, Net, data, losses, with_lora
from forking import FSDP, ON_CPU, on_ranks, zero

from flow_grpo.launch.encoders import DTYPES
from flow_grpo.parallel import choose
from flow_grpo.parallel.holds import KINDS, Training

ENGINES = {  # ranks, environment, precision
    "plain": (1, ON_CPU, "no"),
    "ddp": (2, ON_CPU, "no"),
    "zero1": (2, zero(1), "no"),
    "zero2": (2, zero(2), "no"),
    "zero2-bf16": (2, zero(2), "bf16"),
    "zero2-fp16": (2, zero(2), "fp16"),
    "fsdp2": (2, FSDP, "no"),
    "fsdp2-bf16": (2, FSDP, "bf16"),
    "zero3": (2, zero(3), "no"),
    "zero3-bf16": (2, zero(3), "bf16"),
    "zero3-fp16": (2, zero(3), "fp16"),
}
CUTS_WEIGHTS = ("fsdp2", "fsdp2-bf16", "zero3", "zero3-bf16", "zero3-fp16")
SLOW = {"zero1", "zero2-bf16", *CUTS_WEIGHTS[1:]}
FP32 = [name for name, (*_, precision) in ENGINES.items() if precision == "no"]


def params(names) -> list:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow) if n in SLOW else n for n in names]


on_every_engine = pytest.mark.parametrize("name", params(ENGINES))
on_every_fp32_engine = pytest.mark.parametrize("name", params(FP32))
made = {}


@pytest.fixture
def seen(name, tmp_path_factory):
    """Return a function that loads what each rank of an engine wrote."""
    for each in ("plain", name):  # whose state the others read too
        if each not in made:
            num_ranks, environment, precision = ENGINES[each]
            made[each] = folder = tmp_path_factory.mktemp(each)
            for run in ("calm", "troubled"):
                (folder / run).mkdir()
            arguments = folder, precision, made["plain"]
            on_ranks(num_ranks, environment, engines.everything, *arguments)
    return loader(name)


def loader(name: str):
    def load(what: str) -> list[dict]:
        return [torch.load(made[name] / f"{what}-{rank}.pt") for rank in range(ENGINES[name][0])]

    load.folder = made[name]
    return load


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def by_hand(num_updates: int) -> list[tuple[float, dict]]:
    """The norm of each update's gradient and the weights after it, of all rows in one batch."""
    net = Net()
    params = {name: param for name, param in net.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), **SETTINGS)
    rows, wanted = data()
    found = []
    for number in range(num_updates):
        loss = sum(losses(net, rows, wanted[k], number).mean() for k in range(NUM_POINTS))
        optimizer.zero_grad()
        (loss / NUM_POINTS).backward()
        norm = torch.cat([param.grad.flatten() for param in params.values()]).norm()
        for param in params.values():
            param.grad *= min(1.0, MAX_GRAD_NORM / norm)
        optimizer.param_groups[0]["lr"] = SETTINGS["lr"] / (1 + number)
        optimizer.step()
        found.append((norm.item(), {n: param.detach().clone() for n, param in params.items()}))
    return found


@on_every_fp32_engine
def test_updates_are_those_of_one_batch_computed_by_hand(seen):
    expected = by_hand(engines.UNTIL_SAVED + engines.AFTER)
    assert all(norm > MAX_GRAD_NORM for norm, _ in expected)
    for rank in seen("contract"):
        for update, (norm, weights) in zip(rank["updates"] + rank["rest"], expected, strict=True):
            assert update["norm"].item() == pytest.approx(norm, rel=1e-5)
            for key, value in weights.items():
                torch.testing.assert_close(update["after"][key], value, rtol=1e-4, atol=1e-6)


@on_every_engine
def test_ranks_agree_on_every_weight_and_norm_to_the_bit(seen):
    first, *others = seen("contract")
    assert all(value.dtype == torch.float32 for value in first["start"].values())
    for other in others:
        for ours, theirs in zip(first["updates"], other["updates"], strict=True):
            assert equal(ours["after"], theirs["after"])
            assert torch.equal(ours["norm"], theirs["norm"])


@on_every_fp32_engine
def test_ranks_hold_what_an_estimate_says_of_their_engine(name, seen):
    files = {"plain": "single", "ddp": "multi_gpu", "fsdp2": "fsdp2"}
    (kind,) = (kind for kind in KINDS if kind.name == files.get(name, f"deepspeed_{name}"))
    trained = sum(param.numel() for param in Net().parameters() if param.requires_grad)
    parts = kind.device(Training(0, trained, 0, 4, 0, False, False), ENGINES[name][0])
    masters = parts["trained weights"] if kind.autocasts else 0  # else among the optimizer's
    for rank in seen("contract"):
        assert rank["bytes"] == masters + parts["optimizer"]


@on_every_engine
def test_nothing_steps_inside_a_backward_pass(seen):
    for rank in seen("contract"):
        for update in rank["updates"]:
            assert equal(update["before"], update["between"])
        before, after = (rank["updates"][n]["before"] for n in (0, 1))
        assert not any(torch.equal(before[key], after[key]) for key in before)


@on_every_engine
def test_an_abandoned_update_leaves_the_weights_bits_alone_and_no_trace_in_the_next(seen):
    for rank in seen("contract"):
        abandoned = rank["abandoned"]
        assert len(abandoned["norms"]) == 3
        assert not any(torch.isfinite(norm) for norm in abandoned["norms"])
        assert equal(abandoned["before"], abandoned["after"])
        assert equal(rank["troubled"]["after"], rank["calm"]["after"])
        assert torch.equal(rank["troubled"]["norm"], rank["calm"]["norm"])


@on_every_engine
def test_masters_are_put_in_place_and_the_weights_follow(seen):
    for rank in seen("contract"):
        own = rank["calm"]["after"]
        masters, weights = rank["doubled"]
        assert equal(masters, {name: 2 * value for name, value in own.items()})
        assert equal(weights, {name: v.to(weights[name].dtype) for name, v in masters.items()})
        masters, weights = rank["put back"]
        assert equal(masters, own)
        assert equal(weights, {name: v.to(weights[name].dtype) for name, v in own.items()})


@on_every_engine
def test_a_saved_training_goes_on_bit_for_bit_in_an_engine_that_started_elsewhere(seen):
    for rank in seen("contract"):
        masters, weights = rank["loaded"]
        assert equal(masters, rank["updates"][-1]["after"])
        assert equal(weights, {name: v.to(weights[name].dtype) for name, v in masters.items()})
        assert rank["further"]
        for ours, theirs in zip(rank["rest again"], rank["rest"], strict=True):
            assert equal(ours["after"], theirs["after"])


@on_every_engine
def test_what_one_process_saved_goes_on_in_every_engine(name, seen):
    (one,) = loader("plain")("contract")
    for rank in seen("contract"):
        assert equal(rank["moved"], one["updates"][-1]["after"])
        assert equal(rank["further moved"], {n: 3 * value for n, value in rank["moved"].items()})
        if ENGINES[name][2] == "no":
            follow(rank["rest moved"], one["rest"])


@on_every_engine
def test_what_every_engine_saved_goes_on_in_one_process(name, seen, monkeypatch):
    (rank, *_), precision = seen("contract"), ENGINES[name][2]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    engine = engines.wrapped("no", Net(elsewhere=True))
    further = engine.load(seen.folder, ["old"])
    masters = engines.masters(engine)
    assert equal(masters, rank["updates"][-1]["after"])
    assert all(torch.equal(further[f"old/{key}"], 3 * value) for key, value in masters.items())
    if precision == "no":
        numbers = range(engines.UNTIL_SAVED, engines.UNTIL_SAVED + engines.AFTER)
        follow([engines.take(engine, number) for number in numbers], rank["rest"])


def follow(updates: list[dict], others: list[dict]) -> None:
    """Updates are others', but for how sums are rounded."""
    for ours, theirs in zip(updates, others, strict=True):
        assert ours["norm"].item() == pytest.approx(theirs["norm"].item(), rel=1e-5)
        for key, value in theirs["after"].items():
            torch.testing.assert_close(ours["after"][key], value, rtol=1e-4, atol=1e-6)


@on_every_engine
def test_a_saved_training_is_safetensors_and_json(name, seen):
    seen("contract")
    parts = range(ENGINES[name][0] if name not in ("plain", "ddp") else 1)
    ours = {*seen.folder.glob("*.pt"), *seen.folder.glob("scales-*"), *seen.folder.glob("planted*")}
    saved = {path.name for path in seen.folder.iterdir() if path.is_file() and path not in ours}
    files = {f"{kind}-{part}.safetensors" for kind in ("weights", "optimizer") for part in parts}
    assert saved == files | {"index.json"}
    index = json.loads((seen.folder / "index.json").read_text())
    assert len(index["parts"]) == len(parts)
    shapes = {n: list(p.shape) for n, p in Net().named_parameters() if p.requires_grad}
    for weight, shape in shapes.items():
        held = [part["layout"][weight]["held"] for part in index["parts"]]
        assert all(part["layout"][weight]["shape"] == shape for part in index["parts"])
        size = torch.Size(shape).numel()
        assert sorted(i for start, stop in held for i in range(start, stop)) == list(range(size))


@on_every_engine
def test_a_forged_state_is_refused_on_every_rank_and_changes_no_weight(seen):
    for of_rank in seen("forged"):
        assert len(of_rank) == len(engines.FORGED)
        for said, before, after in of_rank:
            assert "does not hold the state of this run" in said or "does not fit" in said, said
            assert equal(before, after)


@on_every_engine
def test_a_payload_in_any_file_is_refused_on_every_rank_and_never_runs(name, seen):
    seen("forged")
    for rank in range(ENGINES[name][0]):
        said, executed = json.loads((seen.folder / f"planted-{rank}.json").read_text())
        assert not executed and len(said) == 3
        assert all("can't be read" in each or "is damaged" in each for each in said), said


@pytest.mark.parametrize("name", ["plain"])
def test_the_state_of_other_weights_is_refused(seen):
    seen("contract")
    for module in (with_lora(Net()), torch.nn.Linear(5, 8)):
        engine = engines.wrapped("no", module)
        with pytest.raises(
            ValueError, match="state of 3 weights in 1 part.*Resume with the weights"
        ):
            engine.load(seen.folder)


def predicted(net: Net, weights: dict, precision: str) -> torch.Tensor:
    """What a fresh Net with these weights gives."""
    params = dict(net.named_parameters())
    net.to(DTYPES[precision])
    with torch.no_grad():
        for key, value in weights.items():
            params[key].copy_(value)
        return net(data()[0])


def without_frozen_lora(net: Net) -> Net:
    """As a reference is, which starts without any of the adapter."""
    net.middle.lora_B.default.weight.data.zero_()
    return net


@pytest.mark.parametrize("name", ["zero2-fp16"])
def test_an_overflow_lowers_the_loss_scale_and_a_loss_that_is_not_finite_does_not(name, seen):
    seen("contract")
    for rank in range(2):
        scales = json.loads((seen.folder / f"scales-{rank}.json").read_text())
        values = [scale["cur_scale"] for scale in scales]
        assert values == [2**16, 2**16, 2**16, 2**15]  # DeepSpeed's gives the first one away
        assert scales[1] == scales[0]


with_and_without_lora = pytest.mark.parametrize("lora", [False, True])


@with_and_without_lora
@on_every_engine
def test_a_snapshot_predicts_as_a_module_with_its_weights_and_the_policy_as_itself(
    name, seen, lora
):
    precision = ENGINES[name][2]
    for rank in seen(f"anchored-{lora}"):
        for step in rank["steps"]:
            for key, weights in step["weights"].items():
                net = with_lora(Net(), name in CUTS_WEIGHTS) if lora else Net()
                net = without_frozen_lora(net) if lora and key == "reference" else net
                expected = predicted(net, weights, precision)
                assert torch.equal(step["predictions"][key], expected), key
        old, policy = (rank["steps"][0]["predictions"][key] for key in ("old", "policy"))
        assert not torch.equal(old, policy)


@with_and_without_lora
@on_every_engine
def test_a_reference_stays_where_training_began_until_it_is_moved(name, seen, lora):
    base = predicted(Net(), {}, ENGINES[name][2])
    for rank in seen(f"anchored-{lora}"):
        at = [step["predictions"]["reference"] for step in rank["steps"]]
        assert torch.equal(at[0], base) and torch.equal(at[1], base)
        assert torch.equal(at[2], base)  # moved, but by nothing
        assert not torch.equal(at[3], base) and torch.equal(at[4], at[3])


@with_and_without_lora
@on_every_engine
def test_copies_move_by_their_decay(seen, lora):
    for rank in seen(f"anchored-{lora}"):
        steps = [step["weights"] for step in rank["steps"]]
        for move, (before, after) in zip(engines.MOVES[1:], pairwise(steps), strict=True):
            for snapshot in before.keys() - {"policy"}:
                decay = move.get(snapshot, 1.0)
                for key, value in before[snapshot].items():
                    expected = decay * value + (1 - decay) * after["policy"][key]
                    torch.testing.assert_close(after[snapshot][key], expected)


@with_and_without_lora
@on_every_engine
def test_a_moved_copy_survives_a_file(seen, lora):
    for rank in seen(f"anchored-{lora}"):
        assert equal(rank["resumed"], rank["steps"][-1]["predictions"])


@on_every_engine
def test_a_prediction_by_an_adapter_writes_no_weight_and_lets_none_train(seen):
    module = with_lora(Net())
    train = [name for name, param in module.named_parameters() if param.requires_grad]
    assert not any("middle" in name for name in train)
    for rank in seen("anchored-True"):
        for step in rank["steps"]:
            assert not step["written"] and step["train"] == train


@on_every_fp32_engine
def test_the_loop_abandons_an_update_for_a_loss_or_a_gradient_on_one_rank(seen):
    for rank in seen("updates"):
        assert rank["counts"] == (0, 3)
        for spoiled in rank["spoiled"]:
            assert equal(spoiled, rank["before"])
        assert equal(rank["after"], rank["calm"]) and not equal(rank["calm"], rank["before"])
    calm, troubled = (
        (seen.folder / run / "metrics.jsonl").read_text() for run in ("calm", "troubled")
    )
    assert calm == troubled and len(calm.splitlines()) == 1


@on_every_fp32_engine
def test_the_loop_reads_no_number_before_all_gradients_are_there(seen):
    assert all(rank["reads"] == [0] for rank in seen("updates"))


class Counting(torch.optim.SGD):
    """Keeps what optimizers of 8 bits do: tensors of several dtypes, one shared, and numbers."""

    table = torch.arange(4.0)

    @torch.no_grad()
    def step(self):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state |= {"step": 0, "rate": 0.1, "seen": None, "table": self.table}
                state["bits"] = torch.zeros(len(param), 2, dtype=torch.uint8)
            state["step"] += 1
            state["rate"] *= 0.7
            state["bits"] += state["step"]
            param -= state["rate"] * state["table"][state["step"] % 4] * state["bits"].sum()


def counting(folder):
    engine, net = choose.start("no"), Net()
    params = [param for param in net.parameters() if param.requires_grad]
    engine.wrap(net, Counting(params), MAX_GRAD_NORM)
    if folder is not None:
        engine.load(folder)
    return engine


def test_an_optimizer_s_state_of_any_dtype_and_its_numbers_survive(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    engine = counting(None)
    for number in range(2):
        engines.take(engine, number)
    for module in (torch, pickle):
        monkeypatch.setattr(module, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    engine.save(tmp_path, {})
    again = counting(tmp_path)
    states = (each.optimizer.state.values() for each in (again, engine))
    for ours, theirs in zip(*states, strict=True):
        assert list(ours) == list(theirs) and ours["bits"].dtype == torch.uint8
        assert all(type(ours[key]) is type(theirs[key]) for key in theirs)
    for number in range(2, 5):
        assert equal(engines.take(again, number)["after"], engines.take(engine, number)["after"])


def test_a_stage_that_is_not_there_is_refused():
    on_ranks(2, zero(0), refused, "stage 0: 1, 2 or 3 is needed")


def refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose.start("no")


@pytest.mark.parametrize(
    "name, value, needed", [("FSDP_VERSION", "1", "2"), ("FSDP_RESHARD_AFTER_FORWARD", "False", "")]
)
def test_an_fsdp_that_is_not_there_is_refused(monkeypatch, name, value, needed):
    for key, given in (FSDP | {name: value}).items():
        monkeypatch.setenv(key, given)
    refused(f"{name}={value}: {needed}.*fsdp2.yaml")
