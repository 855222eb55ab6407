"""Time a run's epochs: seconds, FLOPs, share of the matmul peak and memory of each phase.

    python scripts/benchmark/epoch.py --model sd3_5_medium --protocol fast64 --out logs/epoch.json

The run is a real one, by the loop's own stages; its model is one of true_size.py with random
weights, or any folder (--model FOLDER). --config.KEY=VALUE counts more than the protocol's. The
first epoch warms up, and its FLOPs are counted; the others are timed. What torch.compile compiled
can't be counted: --flops takes them from the same run without it. `accelerate launch --config_file`
before it times another engine. --profile profiles one epoch more: a table of its kernels, how many
were launched, and how often the host read a value of the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.diffusers_patch.registry import FAMILIES
from flow_grpo.launch import entry
from flow_grpo.training import collect, loop
from flow_grpo.training.gate import gate
from flow_grpo.training.run import Run

PHASES = ("sample", "reward", "update")
# What an epoch is, whatever the run; fast64: 64 images in calls of 16, two optimizer steps.
PROTOCOLS = {
    "fast64": (
        "config/grpo.py:pickscore_sd3_fast",
        {
            "mixed_precision": "bf16",
            "sample.sde_window_size": 3,
            "sample.train_batch_size": 16,
            "sample.num_image_per_prompt": 16,
            "sample.num_batches_per_epoch": 4,
            "train.gradient_accumulation_steps": 2,
        },
    ),
    "unirl": (  # the protocol that UniRL publishes, with its two updates of ten trained steps
        "config/grpo.py:pickscore_sd3",
        {
            "mixed_precision": "bf16",
            "sample.train_batch_size": 16,
            "sample.num_image_per_prompt": 16,
            "sample.num_batches_per_epoch": 48,
            "train.gradient_accumulation_steps": 24,
        },
    ),
    "flux_fast24": (
        "config/grpo.py:pickscore_flux_fast",
        {
            "sample.train_batch_size": 3,
            "sample.num_image_per_prompt": 12,
            "sample.num_batches_per_epoch": 8,
            "train.gradient_accumulation_steps": 4,
        },
    ),
    "tiny": (
        "config/grpo.py:pickscore_sd3_fast",
        {
            "mixed_precision": "no",
            "resolution": 32,
            "max_sequence_length": 16,
            "sample.num_steps": 4,
            "sample.sde_window_size": 2,
            "sample.sde_window_range": "(0, 3)",
            "sample.train_batch_size": 2,
            "sample.num_image_per_prompt": 4,
            "sample.num_batches_per_epoch": 4,
        },
    ),
}
COMMON = {  # no reward to wait for
    "reward_fn": "{'jpeg_compressibility': 1.0}",
    "dataset": "dataset/ocr",
    "tracker": "none",
    "eval_max_samples": 1,
}


class Meter:
    """Stands in for a run's timer: measures its phases, and counts the first epoch's FLOPs."""

    def __init__(self, device: torch.device, profiled_epoch: int, flops: dict[str, float] | None):
        self.device, self.profiled_epoch = device, profiled_epoch
        self.seconds: dict[str, list[float]] = {}
        self.peak_gib: dict[str, float] = {}
        self.counts = flops is None
        self.flops: dict[str, float] = flops or {}
        self.profile: torch.profiler.profile | None = None
        self.epoch = 0
        self._now: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        watched = phase in PHASES
        counts = watched and self.counts and self.epoch == 0
        counter = FlopCounterMode(display=False) if counts else None
        if watched and self.epoch == self.profiled_epoch and self.profile is None:
            self.profile = torch.profiler.profile()
            self.profile.start()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with counter or contextlib.nullcontext():
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.peak_gib[phase] = max(peak, self.peak_gib.get(phase, 0.0))
        self._now[phase] = self._now.get(phase, 0.0) + time.perf_counter() - start
        if counter:
            self.flops[phase] = self.flops.get(phase, 0) + counter.get_total_flops()

    def report(self) -> dict[str, float]:
        """End an epoch."""
        if self.profile is not None and self.epoch == self.profiled_epoch:
            self.profile.stop()
        if 0 < self.epoch != self.profiled_epoch:
            for phase, value in self._now.items():
                self.seconds.setdefault(phase, []).append(value)
        now, self._now = self._now, {}
        self.epoch += 1
        return {f"seconds/{phase}": value for phase, value in now.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large matrix products of random numbers, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[3:])


def family_of(script: str) -> type[PatchedPipeline]:
    """Return the class of the models that train_<script>.py trains."""
    known = FAMILIES.values()
    return next(each for each in known if each.__module__.split(".")[-1] == script)


def measure(
    name: str, argv: list[str], profiled_epoch: int, flops: dict[str, float] | None
) -> dict:
    """Train and return what was seen.

    name: the training script's, without "train_". flops: of each phase, None: they are counted.
    """
    start = time.perf_counter()
    run = entry.prepare(argv, family_of(name), "")
    loaded = time.perf_counter() - start
    run.timer = meter = Meter(run.ranks.device, profiled_epoch, flops)
    peak = matmul_peak(run.ranks.device, run.pipeline.input_dtype)
    passes = run.passes()
    try:
        for epoch in range(run.config.num_epochs):
            train_epoch(run, epoch)
    finally:
        run.close()
    pictures = run.plan.num_groups * run.plan.group_size
    epoch = [sum(each) for each in zip(*(meter.seconds[phase] for phase in PHASES), strict=True)]
    on_gpu = run.ranks.device.type == "cuda"
    trained = sum(math.prod(weight["shape"]) for weight in run.engine._layout().values())
    gate = run.folder / "gate.json"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "engine": type(run.engine).__name__,
        "ranks": run.ranks.num_ranks,
        "trained_parameters": trained,
        "images_an_epoch": pictures,
        "passes": passes,
        "load_seconds": loaded,
        "epoch_seconds": epoch,
        "images_per_second": pictures / statistics.median(epoch),
        "matmul_peak_tflops": peak / 1e12,
        "phases": {
            phase: {
                "seconds": seconds,
                "tflop": meter.flops[phase] / 1e12,
                "share_of_peak": meter.flops[phase] / statistics.median(seconds) / peak,
                "peak_gib": meter.peak_gib.get(phase),
            }
            for phase, seconds in meter.seconds.items()
        },
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gate": json.loads(gate.read_text()) if gate.exists() else None,
        "profiled": _counted(meter.profile),
        "kernels": _kernels(meter.profile),
    }


def train_epoch(run: Run, epoch: int) -> None:
    """Do what training/loop.py does in an epoch, but evaluate and save."""
    sampled = collect.roll_out(run, epoch, for_gate=epoch == 0)
    scores = collect.score(run, sampled)
    arranged, metrics = collect.weigh(run, sampled, scores, epoch)
    if epoch == 0:
        gate(run, sampled.for_gate, epoch)
    loop.update(run, sampled, arranged, epoch)
    run.objective.after_epoch(run.snapshots, run.updater.num_updates)
    run.log("epoch", metrics | run.timer.report())


def _counted(profile: torch.profiler.profile | None) -> dict[str, int] | None:
    """Count the launches and host reads of a profiled epoch."""
    if profile is None:
        return None
    events = {event.key: event.count for event in profile.key_averages()}
    launches = sum(count for key, count in events.items() if "LaunchKernel" in key)
    return {"launches": launches, "reads": events.get("aten::_local_scalar_dense", 0)}


def _kernels(profile: torch.profiler.profile | None) -> str:
    if profile is None:
        return ""
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=100)


def row(found: dict, label: str) -> str:
    """Return a line of a Markdown table."""
    cells = [label, found["device"], f"{found['images_per_second']:.3g}"]
    for phase in ("sample", "update"):
        part = found["phases"][phase]
        cells.append(
            f"{statistics.median(part['seconds']):.3g} s, {part['tflop']:.4g} TFLOP, "
            f"{part['share_of_peak']:.0%}"
        )
    peaks = [part["peak_gib"] for part in found["phases"].values() if part["peak_gib"]]
    peak = max(peaks, default=found["peak_host_gib"])
    return f"| {' | '.join([*cells, f'{peak:.1f} GiB'])} |"


def main(argv: list[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="of true_size.py, or a pipeline's folder")
    parser.add_argument("--script", default="sd3", help="that trains a folder: sd3, flux ...")
    parser.add_argument("--protocol", default="fast64", choices=tuple(PROTOCOLS))
    parser.add_argument("--epochs", type=int, default=2, help="that are timed")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--flops", type=Path, help="another result of these shapes that has them")
    parser.add_argument("--scratch", type=Path, default=Path("logs/benchmark"))
    parser.add_argument("--label", default="", help="of the row; default: model and protocol")
    parser.add_argument("--out", type=Path, help="a JSON file; its kernels go beside it as .txt")
    args, given = parser.parse_known_args(argv[1:])

    sys.path.append(str(Path(__file__).parents[2] / "tests"))  # whose tokenizers the next one has
    import true_size

    folder, script = Path(args.model), args.script
    if args.model in true_size.MODELS:
        folder, script = args.scratch / args.model, true_size.MODELS[args.model][1]
        if os.environ.get("RANK", "0") == "0":
            true_size.save(args.model, folder)
    config, keys = PROTOCOLS[args.protocol]
    label = args.label or f"{args.model} {args.protocol}"
    named = f"{label.replace(' ', '-')}-{os.getpid()}"
    keys = COMMON | keys | {"logdir": args.scratch / "runs", "run_name": named}
    keys |= {"pretrained.model": folder, "num_epochs": 1 + args.epochs + args.profile}
    command = [argv[0], f"--config={config}", *(f"--config.{k}={v}" for k, v in keys.items())]
    phases = json.loads(args.flops.read_text())["phases"] if args.flops else {}
    flops = {phase: value["tflop"] * 1e12 for phase, value in phases.items()} or None
    profiled_epoch = 1 + args.epochs if args.profile else -1
    found = measure(script, command + given, profiled_epoch, flops)
    kernels = found.pop("kernels")
    found |= {"label": label, "model": args.model, "protocol": args.protocol, "options": given}
    if os.environ.get("RANK", "0") == "0":
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            if kernels:
                args.out.with_suffix(".txt").write_text(kernels + "\n")
        print(row(found, label), flush=True)


if __name__ == "__main__":
    main(sys.argv)
