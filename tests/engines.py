"""What every engine is put through on its ranks; test_engines.py judges what comes out."""

import json
import math
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from fuzzing import Payload
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import an_update, make_run, plan_of, roll_out, take_step

from flow_grpo.parallel import choose, state
from flow_grpo.records import Loss
from flow_grpo.training import loop
from flow_grpo.training.snapshots import Snapshots

SETTINGS = dict(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
MAX_GRAD_NORM = 0.5
NUM_ROWS, NUM_POINTS = 12, 3
UNTIL_SAVED, AFTER = 3, 2  # updates
DATA = (".safetensors", ".json")
MOVES = ({}, {"old": 0.5}, {"old": 0.9, "reference": 1.0}, {"reference": 0.25}, {"old": 0.0})


class Net(nn.Module):
    """40 + 8 + 16 trained numbers, so that one weight lies on two ranks, and frozen ones.

    elsewhere: what trains starts from other values.
    """

    def __init__(self, elsewhere: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.middle.requires_grad_(False)
        self.last.bias.requires_grad_(False)
        if elsewhere:
            for param in self.parameters():
                param.data *= 1 + param.requires_grad

    def forward(self, rows):
        hidden = torch.tanh(self.middle(torch.tanh(self.first(rows.to(self.first.weight.dtype)))))
        return self.last(hidden).float()


def with_lora(module: Net, blank: bool = False) -> Net:
    """Give it a LoRA whose B is not zero, one part of which does not train; blank: and is zero."""
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["first", "middle", "last"]), module)
    for name, param in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, generator=torch.Generator().manual_seed(2))
            param.data *= not (blank and "middle" in name)
        param.requires_grad_("lora_" in name and "middle" not in name)
    return module


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (NUM_ROWS, 5) and, at each point, what they should give (NUM_POINTS, NUM_ROWS, 2)."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(NUM_ROWS, 5, generator=generator)
    return rows, 3 * torch.randn(NUM_POINTS, NUM_ROWS, 2, generator=generator)


def losses(model, rows, wanted, number: int):
    """The loss of each row at a point of update `number`."""
    return (model(rows) - wanted * (1 + number)).square().mean(1)


def cut_small_weights(engine) -> None:
    """DeepSpeed would leave those of less than 100000 elements whole."""
    if config := getattr(engine, "_config", None):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


@contextmanager
def small_weights_cut():
    """Let runs that start here cut them."""
    start = choose.start

    def started(*arguments):
        cut_small_weights(engine := start(*arguments))
        engine.ranks.barrier()  # as where a process has one run, whose ranks meet here
        return engine

    choose.start = started
    try:
        yield
    finally:
        choose.start = start


def wrapped(precision: str, module: nn.Module):
    """An engine that trains a module."""
    engine = choose.start(precision)
    cut_small_weights(engine)
    params = [param for param in module.parameters() if param.requires_grad]
    engine.wrap(module, torch.optim.AdamW(params, **SETTINGS, fused=True), MAX_GRAD_NORM)
    return engine


def accumulate(engine, number: int, spoil=lambda k, loss: loss):
    """Make an update's forward and backward passes with this rank's rows."""
    rows, wanted = data()
    mine = slice(engine.ranks.rank, None, engine.ranks.num_ranks)
    for k in range(NUM_POINTS):
        with engine.accumulate(k == NUM_POINTS - 1):
            loss = losses(engine.model, rows[mine], wanted[k, mine], number).sum()
            engine.backward(spoil(k, loss / (NUM_ROWS * NUM_POINTS)))


def clones(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def masters(engine) -> dict[str, torch.Tensor]:
    return clones(dict(engine.full(engine.masters())))


def weights(engine) -> dict[str, torch.Tensor]:
    """What the module computes with."""
    whole = engine.whole()
    if engine.cuts_weights:
        whole = engine.ranks.broadcast_object(whole)
    return clones({n: whole[n] for n, p in engine.module.named_parameters() if p.requires_grad})


def take(engine, number: int) -> dict:
    """Take an update, once fp16 has found its loss scale; returns what was seen on the way."""
    before = weights(engine)
    accumulate(engine, number)
    while not torch.isfinite(norm := engine.norm()) and engine.looks_for_scale:
        engine.discard(overflow=True)
        accumulate(engine, number)
    between = weights(engine)
    for group in engine.optimizer.param_groups:
        group["lr"] = SETTINGS["lr"] / (1 + number)
    engine.step(norm.item())
    return {"before": before, "norm": norm, "between": between, "after": masters(engine)}


@contextmanager
def overflow(module: nn.Module, here: bool):
    """Let gradients behind the module's output overflow, if it is to happen here."""

    def spoil(module, inputs, output):
        if here and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    hook = module.register_forward_hook(spoil)
    yield
    hook.remove()


def abandon(engine, number: int) -> dict:
    """Abandon an update for each way in which one goes wrong, on the last rank alone."""
    last = engine.ranks.rank == engine.ranks.num_ranks - 1
    seen = {"before": weights(engine) | masters(engine), "norms": []}
    for point in (0, NUM_POINTS - 1, None):

        def spoil(k, loss, point=point):
            return loss * math.nan if last and k == point else loss

        with overflow(engine.module, last and point is None):
            accumulate(engine, number, spoil)
        seen["norms"].append(engine.norm())
        engine.discard(overflow=point is None)
    return seen | {"after": weights(engine) | masters(engine)}


def contract(folder: Path, precision: str, one: Path) -> None:
    """Train, abandon, put, save and load; writes what came of it. one: what one process saved."""
    engine = wrapped(precision, Net())
    seen = {"start": masters(engine), "updates": [take(engine, n) for n in range(UNTIL_SAVED)]}
    further = {"mine": torch.full((3,), engine.ranks.rank % engine.num_parts + 0.5)}
    further |= {f"old/{name}": 3 * part for name, part in engine.masters().items()}
    own, moments, _ = engine.get_state()
    parts = [*own.values(), *(v for each in moments.values() for v in each.values() if v.ndim)]
    seen["bytes"] = sum(part.nbytes for part in parts)
    engine.save(folder, further)
    engine.ranks.barrier()
    seen["rest"] = [take(engine, UNTIL_SAVED + n) for n in range(AFTER)]

    again = wrapped(precision, Net(elsewhere=True))
    seen["further"] = torch.equal(again.load(folder)["mine"], further["mine"])
    seen["loaded"] = masters(again), weights(again)
    seen["rest again"] = [take(again, UNTIL_SAVED + n) for n in range(AFTER)]

    moved = wrapped(precision, Net(elsewhere=True))
    old = {name.removeprefix("old/"): part for name, part in moved.load(one, ["old"]).items()}
    old.pop("mine", None)
    seen["moved"], seen["further moved"] = masters(moved), clones(dict(moved.full(old)))
    seen["rest moved"] = [take(moved, UNTIL_SAVED + n) for n in range(AFTER)]

    calm, troubled = wrapped(precision, Net()), wrapped(precision, Net())
    take(calm, 0), take(troubled, 0)
    seen["abandoned"] = abandon(troubled, 1)
    seen["calm"], seen["troubled"] = take(calm, 1), take(troubled, 1)

    own = clones(calm.masters())
    calm.put({name: 2 * part for name, part in own.items()})
    seen["doubled"] = masters(calm), weights(calm)
    calm.put(own)
    seen["put back"] = masters(calm), weights(calm)
    torch.save(seen, folder / f"contract-{engine.ranks.rank}.pt")


def overflowed(folder: Path, precision: str) -> None:
    """Let a loss be NaN, then gradients overflow twice; writes what the loss scale was."""
    engine = wrapped(precision, Net())
    scales = [engine._scale()]
    for kind in ("loss", "gradient", "gradient"):
        with overflow(engine.module, kind == "gradient"):
            accumulate(
                engine, 0, lambda k, loss, kind=kind: loss * math.nan if kind == "loss" else loss
            )
        assert not torch.isfinite(engine.norm())
        engine.discard(overflow=kind == "gradient")
        scales.append(engine._scale())
    (folder / f"scales-{engine.ranks.rank}.json").write_text(json.dumps(scales))


def predictions(engine, snapshots) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("policy", "old", "reference", "policy", "old"):
        with snapshots.using(name), torch.no_grad():
            found[name] = engine.model(data()[0]).clone()
    return found


def anchored(folder: Path, precision: str, lora: bool) -> None:
    """Move snapshots and predict with them; writes what they gave and what they hold."""
    # Where weights are swapped in, a reference keeps what does not train, as nothing depends on it.
    blank = choose.start(precision).cuts_weights
    module = with_lora(Net(), blank) if lora else Net()
    engine = wrapped(precision, module)
    snapshots = Snapshots(engine, ["old", "reference"], use_lora=lora)
    steps, held = [], {"policy", "old"} | (set() if lora else {"reference"})
    for number, move in enumerate(MOVES):
        take(engine, number)
        for name, decay in move.items():
            snapshots.update(name, decay)
            held.add(name)
        versions = [param._version for param in module.parameters()]
        found = predictions(engine, snapshots)
        steps.append(
            {
                "predictions": found,
                "weights": {name: clones(snapshots.values(name)) for name in held},
                "written": versions != [param._version for param in module.parameters()],
                "train": [n for n, param in module.named_parameters() if param.requires_grad],
            }
        )
    state = clones(snapshots.state_dict())
    other = wrapped(precision, with_lora(Net(), blank) if lora else Net())
    resumed = Snapshots(other, ["old", "reference"], use_lora=lora)
    resumed.load_state_dict(state)
    other.put(engine.masters())
    seen = {"steps": steps, "resumed": predictions(other, resumed)}
    torch.save(seen, folder / f"anchored-{lora}-{engine.ranks.rank}.pt")


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU would have to be idle."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def toy(folder: Path):
    """A run of the toy, and this rank's micro-batches of an epoch."""
    keys = {"sample__sde_window_size": 2, "train__learning_rate": 0.1, "train__ema": True}
    run = make_run(folder, plan_of(4, 6), torch.optim.SGD, engine=choose.start("no"), **keys)
    rollout = roll_out(run)
    rollout.advantages = torch.linspace(-1, 2, len(rollout))
    rollout.weights = torch.ones(len(rollout))
    mine = range(run.ranks.rank, 4, run.ranks.num_ranks)
    return run, [rollout.rows(slice(6 * i, 6 * i + 6)) for i in mine]


def whole(run) -> dict[str, torch.Tensor]:
    """All that an update may change: the weights, their masters, the average."""
    values = {name: clones(run.snapshots.values(name)) for name in ("ema", "policy")}
    held = {f"{name}/{key}": v for name, part in values.items() for key, v in part.items()}
    return held | weights(run.engine)


def updates(folder: Path) -> None:
    """Take the loop's update, once calmly, once after three that were spoiled."""
    calm, micros = toy(folder / "calm")
    take_step(calm, micros)

    run, micros = toy(folder / "troubled")
    last = run.ranks.rank == run.ranks.num_ranks - 1
    before, honest, seen = whole(run), run.objective.loss, []
    num_calls = len(micros) * micros[0].steps.shape[1]
    for broken in (0, num_calls - 1):
        calls = iter(range(num_calls))

        def loss(*arguments, broken=broken, calls=calls):
            found = honest(*arguments)
            return (
                Loss(found.value * math.nan, found.stats)
                if next(calls) == broken and last
                else found
            )

        run.objective.loss = loss
        take_step(run, micros)
        seen.append(whole(run))
    run.objective.loss = honest
    with overflow(run.engine.module, last):
        take_step(run, micros)
    seen.append(whole(run))
    counts = run.updater.num_updates, run.updater.num_skipped

    reads, finish, update = [], run.updater.finish, an_update(run, micros)
    with Reads() as counter:
        run.updater.finish = lambda *numbers: (reads.append(counter.count), finish(*numbers))[1]
        loop.take_step(run, *update)
    seen = {"before": before, "spoiled": seen, "counts": counts, "reads": reads}
    seen |= {"calm": whole(calm), "after": whole(run)}
    torch.save(seen, folder / f"updates-{run.ranks.rank}.pt")


def nan(tensors: dict) -> None:
    max(tensors.values(), key=torch.numel).view(-1)[0] = math.nan


def halve(tensors: dict) -> None:
    name = max(tensors)
    tensors[name] = tensors[name].half()


def rename(tensors: dict) -> None:
    tensors["policy/x"] = tensors.pop(max(tensors))


def widen(tensors: dict) -> None:
    tensors[max(tensors)] = torch.zeros(99)


FORGED = [(kind, act) for kind in ("weights", "optimizer") for act in (nan, halve, rename, widen)]


def forged(folder: Path, precision: str) -> None:
    """Load what each rank has changed in its part; writes what came of it."""
    engine, seen = wrapped(precision, Net()), []
    before = masters(engine)
    for number, (kind, act) in enumerate(FORGED):
        copy = folder / f"forged-{number}"
        if engine.ranks.is_main:
            copy.mkdir()
            for path in (path for path in folder.iterdir() if path.suffix in DATA):
                shutil.copy(path, copy)
        engine.ranks.barrier()
        path = copy / f"{kind}-{engine.ranks.rank}.safetensors"
        if path.exists():
            tensors = load_file(path)
            act(tensors)
            save_file(tensors, path)
        engine.ranks.barrier()
        try:
            engine.load(copy)
            said = "loaded"
        except ValueError as error:
            said = str(error)
        seen.append((said, before, masters(engine)))
    torch.save(seen, folder / f"forged-{engine.ranks.rank}.pt")


def planted(folder: Path, precision: str) -> None:
    """Load what would execute if it were unpickled; writes what each rank was told."""
    engine, said, mark = wrapped(precision, Net()), [], folder / "executed"
    names = state.WEIGHTS, state.OPTIMIZER, state.INDEX
    for number, name in enumerate(names):
        copy = folder / f"planted-{number}"
        if engine.ranks.is_main:
            copy.mkdir()
            for path in (path for path in folder.iterdir() if path.suffix in DATA):
                shutil.copy(path, copy)
            for part in range(engine.num_parts):
                (copy / name.format(part)).write_bytes(pickle.dumps(Payload(mark)))
        engine.ranks.barrier()
        try:
            engine.load(copy)
        except ValueError as error:
            said.append(str(error))
    (folder / f"planted-{engine.ranks.rank}.json").write_text(json.dumps([said, mark.exists()]))


def everything(folder: Path, precision: str, one: Path) -> None:
    """Called on every rank of an engine. one: the folder of one process, which may be this one."""
    if precision == "fp16":  # of which DeepSpeed says that a CPU lacks it
        get_accelerator().is_fp16_supported = lambda: True
        overflowed(folder, precision)
    contract(folder, precision, one)
    forged(folder, precision)
    planted(folder, precision)
    for lora in (False, True):
        anchored(folder, precision, lora)
    if precision == "no":
        updates(folder)
