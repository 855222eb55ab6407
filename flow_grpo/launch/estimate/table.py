"""What a run needs under each engine: GPU and host memory, disk, passes, bytes sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ml_collections import ConfigDict

from config.base import keys_of
from flow_grpo import keys, plan, windows
from flow_grpo.conditioning import guidances
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.launch.encoders import DTYPES
from flow_grpo.launch.estimate.model import Fake, Peaks, describe
from flow_grpo.objectives.registry import copies, find
from flow_grpo.parallel.holds import FP32, KINDS, Calls, Kind, Training
from flow_grpo.sampling import Schedule
from flow_grpo.training import run

GIB = 2**30
LASTS = ("frozen weights", "trained weights", "optimizer", "snapshots", "gathered weights")
PHASES = ("sampling", "decoding", "update")
MARGIN, CONTEXT = 1.08, 1.0  # of gaps between tensors; GiB of CUDA's own
PROCESS = 0.8 * GIB  # of a run on a CPU without its model, measured; CUDA comes on top
CONDITIONINGS = 2**31  # that a Conditioner keeps at most
OCR = 0.4 * GIB  # of each of its processes
MODELS = {  # parameters of the rewards' published models, and bytes of each
    "clip": (427_616_513, 4),
    "dinov2": (86_580_480, 4),
    "deqa": (8_200_000_000, 2),
    "hpsv2": (986_109_441, 4),
    "hpsv3": (8_291_000_000, 2),
    "imagereward": (447_000_000, 4),
    "mask2former": (69_000_000, 4),
    "pickscore": (986_109_441, 4),
    "siglip": (428_225_600, 4),
}
USES = (
    {  # which of them a reward loads; a judge in rewards.vlm and rewards of one's own are left out
        "aesthetic": ("clip",),
        "aesthetic_v2_5": ("siglip",),
        "clipscore": ("clip",),
        "dino_diversity": ("dinov2",),
        "geneval": ("clip", "mask2former"),
        "image_similarity": ("clip",),
    }
    | {name: (name,) for name in ("deqa", "hpsv2", "hpsv3", "imagereward", "pickscore")}
)


class Row(NamedTuple):
    """One engine's bytes on a rank: on its device by part, there at most, on the host, sent."""

    kind: Kind
    parts: dict[str, float]
    device: float
    host: float
    sent: float  # an epoch


@dataclass(frozen=True)
class Estimate:
    """Bytes, if nothing else is said."""

    model: str  # of which family, described where
    plan: plan.Plan
    passes: dict[str, int]  # an epoch, of all ranks
    training: Training
    encoders: float
    vae: float
    rewards: float
    checkpoint: float
    on_gpu: bool
    rows: list[Row]

    def first_that_fits(self, memory: float) -> Row | None:
        """Return the fastest engine whose ranks need no more bytes than this."""
        return next((row for row in self.rows if needed(row, self.on_gpu) <= memory), None)


def needed(row: Row, on_gpu: bool) -> float:
    """Return what a device, or the host where there is none, must have."""
    return row.device * MARGIN + CONTEXT * GIB if on_gpu else row.host


def estimate(config: ConfigDict, num_ranks: int, on_gpu: bool) -> Estimate:
    """Count before anything loads. Raises ValueError for a config that can't run."""
    keys.check(config, keys_of(config))
    windows.check(config.sample)
    found = plan.make(config, num_ranks)
    described, where = describe(config)
    family = FAMILIES[described.pipeline]
    find(config.objective).check(config, family)
    prompts = found.train_prompts + found.eval_prompts
    family.check_prompts(prompts)
    fakes = {casts: Fake(config, described, found, casts) for casts in (False, True)}
    fake, width = fakes[False], DTYPES[config.mixed_precision].itemsize
    objective, guided, passes = _epoch(config, found, fake)
    training = Training(
        frozen=fake.count(trained=False),
        trained=fake.count(trained=True),
        block=fake.largest_block(),
        width=width,
        copies=len(copies(objective, config)),
        is_lora=config.use_lora,
        holds_start=config.use_lora or config.train.hold_start,
        copies_wait="snapshots" in config.offload,
    )
    keeps = config.encoders != "precompute"
    result = Estimate(
        model=f"{family.stock_name()}, {where}",
        plan=found,
        passes=passes,
        training=training,
        encoders=width * sum(described.encoders.values()) * keeps,
        vae=FP32 * sum(param.numel() for param in fake.pipeline.modules()[1].parameters()),
        rewards=_rewards(config),
        checkpoint=FP32 * training.trained * (4 + training.copies),
        on_gpu=on_gpu,
        rows=[],
    )
    peaks: dict[tuple[bool, bool], Peaks] = {}
    for kind in KINDS:
        if kind.alone not in (None, num_ranks == 1):
            continue
        way = kind.casts_trained(training), kind.autocasts
        if way not in peaks:
            peaks[way] = fakes[way[0]].peaks(way[1], on_gpu)
        result.rows.append(_row(config, result, kind, peaks[way], guided))
    return result


def _epoch(config: ConfigDict, found: plan.Plan, fake: Fake) -> tuple:
    sample, pipeline = config.sample, fake.pipeline
    sigmas = pipeline.sigmas(sample.num_steps, fake.size)
    schedule = Schedule(
        sigmas, kind=sample.sde_type, noise_level=sample.noise_level, solver=sample.solver
    )
    objective = find(config.objective)(config, schedule)
    guided = pipeline.needs_negative(guidances(config).training)
    return objective, guided, run.passes(config, found, objective, pipeline, epoch=0)


def _row(config: ConfigDict, of: Estimate, kind: Kind, peaks: Peaks, guided: bool) -> Row:
    num_ranks = of.plan.world_size
    parts = kind.device(of.training, num_ranks) | {name: getattr(peaks, name) for name in PHASES}
    kept = of.encoders if config.encoders == "keep" else 0.0
    lasts = sum(parts[name] for name in LASTS) + kept + of.vae + of.rewards
    phases = parts["sampling"], parts["decoding"], parts["update"] + parts["gradients"]
    device = lasts + max(*phases, of.encoders - kept)  # encoders come while nothing is drawn
    host = sum(kind.host(of.training, num_ranks).values()) + of.encoders - kept
    host += PROCESS + _processes(config)
    if of.on_gpu:
        whole = of.training.frozen + of.training.trained
        loading = of.training.width * whole + of.encoders + of.vae  # all of it comes through it
        host = max(host + CONDITIONINGS, PROCESS + loading)
    else:
        host, device = (host + device) * MARGIN, 0.0
    sent = kind.sent(of.training, _calls(of, config, peaks, guided), num_ranks)
    return Row(kind, parts, device, host, sent)


def _calls(of: Estimate, config: ConfigDict, peaks: Peaks, guided: bool) -> Calls:
    joined = 2 / peaks.calls if guided else 1  # passes of an image in a call
    sample, train = config.sample, config.train
    sampled = of.plan.world_size * sample.train_batch_size * joined
    micro = of.plan.world_size * of.plan.micro_batch_size * train.stacked_points * joined
    passes = of.passes
    frozen = passes["frozen predictions"] + passes["before the first update"]
    return Calls(
        forwards=passes["sampling"] / sampled + frozen / micro,
        backwards=passes["forward and backward"] / micro,
        updates=of.plan.num_updates * of.plan.num_inner_epochs,
    )


def _rewards(config: ConfigDict) -> float:
    """Add up the models that a rank loads for its rewards."""
    models = {model for name in _local(config) for model in USES.get(name, ())}
    return float(sum(MODELS[model][0] * MODELS[model][1] for model in models))


def _processes(config: ConfigDict) -> float:
    """Add up what processes of a rank's rewards take on the host."""
    return OCR * config.rewards.ocr_processes * any("ocr" in name for name in _local(config))


def _local(config: ConfigDict) -> set[str]:
    return {*config.reward_fn, *config.eval_reward_fn} - set(config.reward_urls)
