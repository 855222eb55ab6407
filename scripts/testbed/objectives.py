"""Compare objectives and rollouts on the testbed at equal cost, each beside its control.

    python scripts/testbed/objectives.py --out logs/objectives --seeds 0 1 2 --jobs 2
    python scripts/testbed/objectives.py --out logs/dev --split dev --seeds 7 --only window trunk

RUNS are differences from config/testbed.py:shapes_sd3_grpo. Each is trained on one thread for
about --seconds of CPU time: the first job of a name finds how many epochs that is, and all of that
name's jobs have as many. Of each there are three:

run      as it is
control  the same with each epoch's advantages, or scores, dealt to random rows
flipped  the reward's weight is -1: what raises it must then lower it

Then the rows of --split are drawn with every result and with the base, from the same noise.
Writes objectives.csv, objectives.png and objectives.md to --out. A finished job is not repeated.
"""

import argparse
import csv
import json
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
from proof import ROOT, execute
from tqdm import tqdm

from flow_grpo.evaluation.intervals import paired_interval
from flow_grpo.evaluation.tables import write_rows
from flow_grpo.report.output import read_metrics

CONFIG = "config/testbed.py:shapes_sd3_grpo"
KINDS = ("run", "control", "flipped")
# Chosen on dev (docs/log.md): one optimizer step an epoch, which is steadier.
RATIO = {"train.gradient_accumulation_steps": 4, "train.learning_rate": 5e-4}
IMAGES = {"sample.noise_level": 0.0, "train.learning_rate": 1.5e-4, "train.ema_decay": 0.95}
LEVELS = {"forward.steps": (0, 1), "forward.kl_beta": 0.1, "forward.decay": "on_policy"}
OFFLINE = IMAGES | {"train.batch_size": 96, "train.ref_update_step": 2}
RUNS: dict[str, dict] = {  # by name: the keys that differ
    "window": RATIO,
    "all steps": RATIO | {"sample.sde_window_size": 0},
    "subset": RATIO | {"sample.sde_window": "subset"},
    "progressive": RATIO | {"sample.sde_window": "progressive", "sample.window_dwell": 8},
    "stratified": RATIO
    | {
        "sample.sde_window": "stratified",
        "sample.sde_window_size": 1,
        "train.step_weight": "slope",
    },
    "cps": RATIO
    | {"sample.sde_type": "cps", "sample.noise_level": 0.8, "train.step_weight": "none"},
    "shared_prefix": RATIO | {"sample.branching": "shared_prefix", "sample.same_latent": True},
    "trunk": RATIO | {"sample.branching": "trunk"},
    "per_step": RATIO | {"sample.branching": "per_step"},
    "strides": RATIO
    | {
        "sample.branching": "strides",
        "sample.sde_window_size": 2,
        "sample.num_batches_per_epoch": 8,
        "sample.num_image_per_prompt": 24,
    },
    "tree": RATIO
    | {
        "sample.branching": "tree",
        "sample.sde_window_size": 2,
        "sample.num_image_per_prompt": 16,
        "sample.train_batch_size": 96,
    },
    "best and worst 3": RATIO | {"train.best_and_worst": 3},
    "reward kl": RATIO | {"train.reward_kl": 10.0, "train.kl_mode": "v"},
    "guard": RATIO
    | {
        "objective": "grpo_guard",
        "train.clip_range": 1e-3,
        "train.step_weight": "none",
    },
    "dppo": RATIO | {"objective": "flow_dppo", "dppo.threshold": 1e-4},
    "dpo online": OFFLINE | {"objective": "dpo", "train.beta": 100.0},
    "sft online": OFFLINE | {"objective": "sft"},
    "rwr online": OFFLINE | {"objective": "sft", "sft.weights": "reward"},
    "nft": IMAGES
    | {"objective": "nft", "nft.steps": (0, 1), "nft.decay": "on_policy", "nft.kl_beta": 0.1},
    "awm": IMAGES | LEVELS | {"objective": "awm"},
    "vgrpo": IMAGES | LEVELS | {"objective": "vgrpo"},
    "epg": IMAGES | LEVELS | {"objective": "epg"},
    "ram": IMAGES | LEVELS | {"objective": "ram", "ram.scale": 10.0, "forward.kl_beta": 0.0},
    "crd": IMAGES | LEVELS | {"objective": "crd"},
    "dgpo": IMAGES | LEVELS | {"objective": "dgpo", "dgpo.beta": 10.0},
}


def command(out: Path, name: str, kind: str, seed: int, num_epochs: int, more: list[str]) -> list:
    """Return the command that trains a job for so many epochs."""
    keys = {"logdir": out, "run_name": folder_name(name, kind, seed), "seed": seed}
    keys |= {"num_epochs": num_epochs, "save_freq": 10_000, "eval_freq": 10_000}
    keys |= {"eval_max_samples": 1, "eval_split": "dev", "resume_from": "auto"} | RUNS[name]
    keys |= {"train.shuffle_advantages": True} if kind == "control" else {}
    keys |= {"reward_fn": {"shapes": -1.0}} if kind == "flipped" else {}
    given = [f"--config.{key}={value}" for key, value in keys.items()]
    return [sys.executable, str(ROOT / "scripts/train_sd3.py"), "--config", CONFIG, *given, *more]


def folder_name(name: str, kind: str, seed: int) -> str:
    return f"{name.replace(' ', '-')}-{kind}-{seed}"


def epochs_of(out: Path, name: str, seconds: float, more: list[str]) -> int:
    """Return how many epochs of a run take so many CPU seconds; measured once, by two of them."""
    note = out / f"{name.replace(' ', '-')}.json"
    if not note.exists():
        few, many = (
            execute(command(out / f"{n}", name, "run", 99, n, more), out / "epochs.log")
            for n in (2, 8)
        )
        per_epoch = (many["cpu_seconds"] - few["cpu_seconds"]) / 6
        note.write_text(json.dumps({"per_epoch": per_epoch}))
    return max(2, round(seconds / json.loads(note.read_text())["per_epoch"]))


def train(out: Path, name: str, kind: str, seed: int, num_epochs: int, more: list[str]) -> dict:
    """Run a job to its end, unless it was; return its CPU and wall seconds."""
    note = out / f"{folder_name(name, kind, seed)}.json"
    if not note.exists():
        log = out / f"{folder_name(name, kind, seed)}.log"
        spent = execute(command(out, name, kind, seed, num_epochs, more), log)
        note.write_text(json.dumps(spent | {"epochs": num_epochs}))
    return json.loads(note.read_text())


def scores(out: Path, split: str, job: str, seed: int) -> tuple[np.ndarray, list[str]]:
    """Return the strict score of each row of a split, by a job's result or "base"; its prompts."""
    folder = out / split / (job if job != "base" else f"base-{seed}")
    if not (folder / "scores.csv").exists():
        order = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--config", CONFIG]
        order += [f"--config.seed={seed}", f"--config.eval_split={split}", "--out", str(folder)]
        if job != "base":
            checkpoints = (out / job / "checkpoints").iterdir()
            last = max(checkpoints, key=lambda path: int(path.name.split("-")[-1]))
            order += ["--checkpoint", str(last)]
        folder.mkdir(parents=True, exist_ok=True)
        execute(order, out / f"{split}-{job}.log")
    with (folder / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return np.array([float(row["shapes_strict"]) for row in rows]), [r["prompt"] for r in rows]


def row_of(out: Path, split: str, name: str, kind: str, seed: int, spent: dict) -> dict:
    """Compare a job's result with the base, row by row on the same noise."""
    job = folder_name(name, kind, seed)
    (before, prompts), (after, _) = (scores(out, split, each, seed) for each in ("base", job))
    low, high = paired_interval(before, after, prompts)
    rewards = [row["reward/avg"] for row in read_metrics(out / job, "epoch")]
    found = {"before": before.mean(), "after": after.mean(), "change": (after - before).mean()}
    found |= {"change_low": low, "change_high": high, "cpu_seconds": spent["cpu_seconds"]}
    found |= {"reward_first": np.mean(rewards[:5]), "reward_last": np.mean(rewards[-5:])}
    rounded = {key: round(float(value), 4) for key, value in found.items()}
    return {"name": name, "kind": kind, "seed": seed, "epochs": spent["epochs"]} | rounded


def table(rows: list[dict]) -> list[str]:
    """Return a Markdown table: each name's change in points, all seeds, best first."""
    of = {name: [r for r in rows if r["name"] == name] for name in {r["name"] for r in rows}}

    def points(name: str, kind: str) -> str:
        mine = [row for row in of[name] if row["kind"] == kind]
        if not mine:
            return ""
        each = ", ".join(f"{100 * row['change']:+.1f}" for row in mine)
        width = max(row["change_high"] - row["change_low"] for row in mine) / 2
        mean = np.mean([row["change"] for row in mine])
        return f"**{100 * mean:+.1f}** ({each}; ±{100 * width:.1f})"

    def gain(name: str) -> float:
        runs = [row["change"] for row in of[name] if row["kind"] == "run"]
        return float(np.mean(runs)) if runs else -np.inf

    lines = ["| | epochs | CPU s | run | control | flipped |", "|---|---|---|---|---|---|"]
    for name in sorted(of, key=gain, reverse=True):
        spent = np.mean([row["cpu_seconds"] for row in of[name]])
        cells = [f"`{name}`", of[name][0]["epochs"], f"{spent:.0f}"]
        cells += [points(name, kind) for kind in KINDS]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def plot(path: Path, rows: list[dict]) -> None:
    """Draw every job's change as a point, a line a name."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = {"run": "#1b6ca8", "control": "#9a9a9a", "flipped": "#c8741a"}
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(names)), layout="constrained")
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        places = [names.index(row["name"]) for row in mine]
        axes.plot([100 * r["change"] for r in mine], places, "o", color=colors[kind], label=kind)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of strict accuracy in points")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--seconds", type=float, default=240.0, help="of CPU time, each job")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    args, more = parser.parse_known_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    epochs = {name: epochs_of(out, name, args.seconds, more) for name in args.only}
    jobs = [(n, kind, seed) for seed in args.seeds for kind in args.kinds for n in args.only]
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), desc="jobs") as bar:

        def whole(job: tuple[str, str, int]) -> dict:
            name, kind, seed = job
            spent = train(out, name, kind, seed, epochs[name], more)
            found = row_of(out, args.split, name, kind, seed, spent)
            bar.update()
            return found

        for row in pool.map(whole, jobs):
            rows.append(row)
            write_rows(out / "objectives.csv", rows)
    plot(out / "objectives.png", rows)
    machine = f"Python {platform.python_version()}, torch {torch.__version__}"
    said = [*table(rows), "", f"{args.split} rows; seeds {args.seeds}; {machine}."]
    (out / "objectives.md").write_text("\n".join(said) + "\n")
    print("\n".join(said))


if __name__ == "__main__":
    main()
