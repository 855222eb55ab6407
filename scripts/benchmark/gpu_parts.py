"""The parts of the GPU kit, in order of worth: what each checks, and how long it may take.

A part is a function of a Setting and of the names of the rows that are known already; it yields a
Row for each check. To add one, write it and give it a line in PARTS.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from scripts.benchmark import gpu_speed
from scripts.benchmark.gpu_rows import LOG_CHARACTERS, ROOT, Part, Row, Setting

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def machine(setting: Setting, known: set[str]) -> Iterator[Row]:
    """Say what computes, and let it multiply in each precision."""
    import torch

    name = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    yield Row("device", True, f"{name}, torch {torch.__version__}")
    for precision in setting.precisions:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        ones = torch.ones(256, 256, dtype=dtype, device=setting.device)
        exact = bool((ones @ ones == 256).all())
        yield Row(f"sums of 256 ones in {precision}", exact, "exact" if exact else "wrong")


# The most by which the testbed may differ from a CPU in fp32 with the same seed: in the reward of
# the first evaluation ("before") and of the last ("after"), and in the norm of the first update's
# gradient, relative. What bf16 on a CPU does is in docs/gpu.md.
TOLERANCE = {
    "fp32": {"before": 0.003, "grad_norm": 0.01, "after": 0.02},
    "fp16": {"before": 0.005, "grad_norm": 0.03, "after": 0.03},
    "bf16": {"before": 0.01, "grad_norm": 0.05, "after": 0.03},
}
SMALL = {
    "sample.train_batch_size": 24,
    "sample.num_batches_per_epoch": 1,
    "train.gradient_accumulation_steps": 1,
    "eval_max_samples": 16,
}


def testbed(run: str) -> Callable[[Setting, set[str]], Iterator[Row]]:
    """Train the testbed for a few epochs in each precision, and compare with a CPU in fp32."""

    def rows(setting: Setting, known: set[str]) -> Iterator[Row]:
        reference = train(setting, run, "cpu", "fp32", "reference")
        for precision in setting.precisions:
            name = f"{run} {precision}"
            if name in known:
                continue
            try:
                folder = train(setting, run, setting.device, precision)
            except RuntimeError as error:
                yield Row(name, False, "the run failed", log=str(error))
            else:
                yield compare(name, reference, folder)

    return rows


def train(setting: Setting, run: str, device: str, precision: str, name: str = "") -> Path:
    """Train to the end, continuing what was cut short; returns the run's folder.

    Raises RuntimeError with the log's end if the run fails.
    """
    name = f"{run}-{name or f'{device}-{precision}'}-{setting.epochs}{'-small' * setting.small}"
    folder, log = setting.scratch / name, setting.scratch / f"{name}.log"
    ended = log.with_suffix(".ended")
    if ended.exists():
        return folder
    keys = {
        "logdir": setting.scratch,
        "run_name": name,
        "resume_from": "auto",
        "mixed_precision": PRECISION[precision],
        "num_epochs": setting.epochs,
        "eval_freq": setting.epochs,
        "save_freq": 1,
        "num_checkpoint_limit": 1,
        "tracker": "none",
    } | (SMALL if setting.small else {})
    command = [sys.executable, "scripts/train_sd3.py", "--config", f"config/testbed.py:{run}"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    setting.scratch.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | hidden, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status:
        raise RuntimeError(f"status {status}\n{log.read_text()[-LOG_CHARACTERS:]}")
    ended.touch()
    return folder


def compare(name: str, wanted: Path, found: Path) -> Row:
    """Hold a run's numbers against those of the run on a CPU."""
    reference, ours = figures(wanted), figures(found)
    differences = {
        "before": abs(ours["before"] - reference["before"]),
        "grad_norm": abs(ours["grad_norm"] / reference["grad_norm"] - 1),
        "after": abs(ours["after"] - reference["after"]),
    }
    bounds = TOLERANCE[name.split()[-1]]
    texts = [f"{key} {value:.3g} (at most {bounds[key]:g})" for key, value in differences.items()]
    gate = "".join(f", {name} {ours[name]:.2g}" for name in ours if name.startswith("gate "))
    return Row(
        name,
        all(value <= bounds[key] for key, value in differences.items()),  # NaN is not
        f"differs from a CPU in fp32 by {', '.join(texts)}{gate}, "
        f"{ours['images_per_second']:.3g} images/s",
        {f"reference {key}": value for key, value in reference.items()} | ours,
    )


def figures(folder: Path) -> dict[str, float]:
    """Read what a run reports of its start and its end."""
    from flow_grpo.report.recorded import read_metrics

    first, *_, last = read_metrics(folder, "eval")
    values = {"before": first["avg"], "after": last["avg"]}
    values["grad_norm"] = read_metrics(folder, "update")[0]["grad_norm"]
    epoch = read_metrics(folder, "epoch")[-1]
    values |= {key: epoch[key] for key in ("images_per_second", "skipped_updates")}
    file = folder / "gate.json"  # which a run has that has log-probs
    gate = json.loads(file.read_text()) if file.exists() else {}
    steps = {name: found for name, found in gate.items() if isinstance(found, dict) and found}
    return values | {f"gate {name}": max(found.values()) for name, found in steps.items()}


TINY = ("--size", "32x64", "--steps", "3", "--max_sequence_length", "64")
TRUE_SIZE = ("--size", "512", "--steps", "4")


def verify(precision: str) -> Callable[[Setting, set[str]], Iterator[Row]]:
    """Run scripts/verify_model.py on the tiny pipelines of tests/tiny, which builds them."""

    def rows(setting: Setting, known: set[str]) -> Iterator[Row]:
        import tiny

        distinct = {build: name for name, (_, build) in reversed(tiny.MODELS.items())}
        for name in ("sd3",) if setting.small else reversed(distinct.values()):
            if name not in known:
                folder = tiny.save(name, setting.scratch / "tiny" / name)
                options = [*TINY, *["--num_frames", "5"] * name.startswith("wan")]
                with small_references(name):
                    yield verified(name, folder, precision, setting.device, options)

    return rows


def verify_true_size(setting: Setting, known: set[str]) -> Iterator[Row]:
    """Run it in bf16 on models of the released sizes with random weights."""
    from scripts.benchmark import true_size

    for name in ("sd3_5_medium", "flux1_dev"):
        if name not in known:
            folder = setting.scratch / name
            true_size.save(name, folder)
            yield verified(name, folder, "bf16", setting.device, TRUE_SIZE)


def verified(name: str, folder: Path, precision: str, device: str, options: Iterable[str]) -> Row:
    """Check one pipeline; one that a model refuses to run in this precision passes."""
    from scripts import verify_model

    options = ["--model", str(folder), "--dtype", precision, "--device", device, *options]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            verify_model.main(["verify_model.py", *options])
    except SystemExit as refusal:
        return Row(name, f"={precision}: " in str(refusal), f"refused: {refusal}")
    except Exception as error:  # the others are worth a look all the same
        return Row(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
    lines = said.getvalue().splitlines()
    failed = [" ".join(text.split()) for text in lines if text.startswith("FAIL")]
    checks = [text for text in lines if text.startswith(("PASS", "FAIL"))]
    passed = bool(checks) and not failed
    return Row(name, passed, "; ".join(failed) or f"{len(checks)} checks passed")


@contextlib.contextmanager
def small_references(name: str) -> Iterator[None]:
    """Let a pipeline that edits see 64 x 64 pixels; 1024 x 1024 would take a CPU minutes."""
    import tiny

    family, area = tiny.MODELS[name][0], 64 * 64
    usual = family.reference_area
    family.reference_area = area
    try:
        with tiny.qwen.stock_reference_area(area):
            yield
    finally:
        family.reference_area = usual


def matrix(precision: str) -> Callable[[Setting, set[str]], Iterator[Row]]:
    """Train every objective, rollout and kernel on tiny pipelines by tests/matrix.py."""

    def rows(setting: Setting, known: set[str]) -> Iterator[Row]:
        command = [sys.executable, "tests/matrix.py", "--mixed_precision", PRECISION[precision]]
        command += ["--models", "sd3", "--objectives", "grpo"] if setting.small else ["--rollouts"]
        done = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for text in done.stdout:
            if text.startswith("| ") and not text.startswith("| model"):
                cells = [cell.strip() for cell in text.strip("| \n").split("|")]
                yield Row(" ".join(cells[:5]), "failed" not in text, "; ".join(cells[5:]))
        done.wait()

    return rows


PARTS = (
    Part("machine", machine, 120),
    Part("testbed-grpo", testbed("shapes_sd3_grpo"), 420),
    Part("testbed-nft", testbed("shapes_sd3"), 420),
    Part("verify-fp32", verify("fp32"), 240),
    Part("verify-bf16", verify("bf16"), 240),
    Part("verify-fp16", verify("fp16"), 240, ("cuda",)),
    Part("attention", gpu_speed.attention, 60),
    Part("matrix-bf16", matrix("bf16"), 540),
    Part("verify-true-size", verify_true_size, 540, ("cuda",)),
    Part("epoch-sd3", gpu_speed.epoch("sd3_5_medium", "fast64"), 540),
    Part("epoch-nft", gpu_speed.epoch("sd3_5_medium", "fast64", gpu_speed.LEVERS_OF_NFT), 540),
    Part("epoch-engines", gpu_speed.engines, 540),
    Part("epoch-flux", gpu_speed.epoch("flux1_dev", "flux_fast24"), 540, ("cuda",)),
)
