"""Prove the testbed: several seeds of a run, of its control, and more pretraining.

    python scripts/testbed/proof.py --out logs/proof --seeds 0 1 2 --jobs 2

Each job runs on one thread, `--jobs` of them at a time:

run         config/testbed.py:shapes_sd3
control     the same with each epoch's advantages dealt to random rows
supervised  the base's pretraining continued for the CPU time of that seed's run

Then the test rows are drawn with every result and with the base, from the same noise, by
scripts/evaluate.py. Writes testbed.csv (all evaluations), testbed_changes.csv and testbed.png to
--out, and prints the changes as a table. A job that has finished is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

from flow_grpo.evaluation.intervals import paired_interval
from flow_grpo.evaluation.tables import read_scores, write_rows
from flow_grpo.report.output import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KINDS = ("run", "control", "supervised")
COLORS = {"run": "#1b6ca8", "control": "#9a9a9a", "supervised": "#c8741a"}
TAGS = ("single", "count", "two", "position")


def train(out: Path, config: str, kind: str, seed: int, more: list[str]) -> None:
    """Run a job to its end, unless it was; note its CPU and wall seconds beside it."""
    folder, note = out / f"{kind}-{seed}", out / f"{kind}-{seed}.json"
    if note.exists():
        return
    if kind == "supervised":
        minutes = json.loads((out / f"run-{seed}.json").read_text())["cpu_seconds"] / 60
        command = [sys.executable, str(HERE / "pretrain.py"), "flow", "--seed", str(1000 + seed)]
        command += ["--init", str(HERE / "base"), "--learning_rate", "5e-4"]
        command += ["--minutes", f"{minutes:.2f}", "--save_minutes", "1000", "--out", str(folder)]
    else:
        command = [sys.executable, str(ROOT / "scripts/train_sd3.py"), "--config", config]
        command += [f"--config.logdir={out}", f"--config.run_name={folder.name}"]
        command += [f"--config.seed={seed}", "--config.resume_from=auto", *more]
        command += ["--config.train.shuffle_advantages=True"] * (kind == "control")
    seconds = execute(command, out / f"{folder.name}.log")
    note.write_text(json.dumps(seconds))


def execute(command: list[str], log: Path) -> dict[str, float]:
    """Run a command on one thread. Returns its CPU and wall seconds; raises if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed; {log} says why.")
    spent = {"cpu_seconds": usage.ru_utime + usage.ru_stime}
    return spent | {"wall_seconds": time.monotonic() - start}


def test_scores(out: Path, config: str, kind: str, seed: int) -> tuple[list[str], np.ndarray]:
    """Return prompts and strict scores of a result ("base", or a job's) on the seed's noise."""
    folder = out / "test" / f"{kind}-{seed}"
    if not (folder / "scores.csv").exists():
        command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--config", config]
        command += [f"--config.seed={seed}", "--out", str(folder)]
        if kind == "supervised":
            command += [f"--config.pretrained.model={out / f'supervised-{seed}' / 'base'}"]
        elif kind != "base":
            checkpoints = (out / f"{kind}-{seed}" / "checkpoints").iterdir()
            last = max(checkpoints, key=lambda path: int(path.name.split("-")[-1]))
            command += ["--checkpoint", str(last)]
        folder.mkdir(parents=True, exist_ok=True)
        execute(command, out / f"test-{kind}-{seed}.log")
    prompts, columns = read_scores(folder / "scores.csv")
    return prompts, columns["shapes_strict"]


def change(out: Path, config: str, kind: str, seed: int) -> dict[str, str | float]:
    """Compare a job's result with the base, row by row on the same noise."""
    (prompts, first), (_, second) = (
        test_scores(out, config, name, seed) for name in ("base", kind)
    )
    low, high = paired_interval(first, second, prompts)
    spent = json.loads((out / f"{kind}-{seed}.json").read_text())
    values = {
        "before": first.mean(),
        "after": second.mean(),
        "change": second.mean() - first.mean(),
        "change_low": low,
        "change_high": high,
        "cpu_minutes": spent["cpu_seconds"] / 60,
        "wall_minutes": spent["wall_seconds"] / 60,
    }
    return {"kind": kind, "seed": seed} | {k: round(float(v), 4) for k, v in values.items()}


def curve(out: Path, kind: str, seed: int) -> list[dict[str, str | float]]:
    """Return every evaluation of a run."""
    names = ["shapes_strict", "shapes_strict_low", "shapes_strict_high"]
    names += [f"shapes_strict/{tag}" for tag in TAGS] + ["shapes_dense"]
    rows = read_metrics(out / f"{kind}-{seed}", "eval")
    return [
        {"kind": kind, "seed": seed, "epoch": row["epoch"]}
        | {name.removeprefix("shapes_"): round(row[name], 4) for name in names if name in row}
        for row in rows
    ]


def plot(path: Path, curves: list[dict], changes: list[dict]) -> None:
    """Draw the curves of all seeds, and the end of continued pretraining as a mark."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind in ("run", "control"):
        for seed in sorted({row["seed"] for row in curves}):
            rows = [row for row in curves if (row["kind"], row["seed"]) == (kind, seed)]
            label = kind if seed == min(row["seed"] for row in curves) else None
            epochs, strict = ([row[key] for row in rows] for key in ("epoch", "strict"))
            axes.plot(epochs, strict, "o-", color=COLORS[kind], label=label)
    last = max(row["epoch"] for row in curves)
    ends = [row["after"] for row in changes if row["kind"] == "supervised"]
    label = "pretraining continued for the same CPU time"
    if ends:
        axes.plot([last] * len(ends), ends, "D", color=COLORS["supervised"], label=label)
    axes.set(xlabel="epoch", ylabel="strict accuracy on 400 test rows", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=130)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    parser.add_argument("--config", default="config/testbed.py:shapes_sd3")
    args, more = parser.parse_known_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, seed) for kind in KINDS if kind in args.kinds for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=2 * len(jobs), desc="jobs") as bar:

        def both(job: tuple[str, int]) -> None:
            train(out, args.config, *job, more)
            bar.update()

        runs = [job for job in jobs if job[0] != "supervised"]
        list(pool.map(both, runs))
        list(pool.map(both, [job for job in jobs if job[0] == "supervised"]))
        changes = []
        for job in jobs:
            changes.append(change(out, args.config, *job))
            bar.update()
    write_rows(out / "testbed_changes.csv", changes)
    if curves := [row for job in runs for row in curve(out, *job)]:
        write_rows(out / "testbed.csv", curves)
        plot(out / "testbed.png", curves, changes)
    print_table(changes)


def print_table(changes: list[dict]) -> None:
    """Print the changes in points, as Markdown."""
    print("| | seed | before | after | change, 95 % interval | CPU minutes |")
    print("|---|---|---|---|---|---|")
    for row in changes:
        points = [f"{100 * row[key]:+.1f}" for key in ("change", "change_low", "change_high")]
        cells = [row["kind"], row["seed"], f"{row['before']:.4f}", f"{row['after']:.4f}"]
        cells += [f"**{points[0]}** ({points[1]}, {points[2]})", f"{row['cpu_minutes']:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
