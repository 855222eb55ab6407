"""Compare objectives and rollouts on the testbed at equal cost, each beside its control.

    python scripts/testbed/objectives.py --out logs/objectives --seeds 0 1 2 --jobs 2
    python scripts/testbed/objectives.py --out logs/dev --split dev --seeds 7 --only window trunk

RUNS are differences from config/testbed.py:shapes_sd3_grpo. Each is trained on one thread for as
many epochs as --seconds of an idle core give it passes of the model, which are counted: so all cost
the same, whatever else the machine does. Of each there are three:

run      as it is
control  the same with each epoch's advantages, or scores, dealt to random rows
flipped  the reward's weight is -1: what raises it must then lower it; a quarter as long

Then the rows of --split are drawn with every result and with the base, from the same noise; of a
run that gains, also with its checkpoints at a quarter, half and three quarters of the epochs.
Writes objectives.csv, objectives.png and objectives.md to --out after each job, with what there
is so far. A finished job is not repeated. Checkpoints are deleted as soon as they are scored.
"""

import argparse
import json
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import numpy as np
import torch
from proof import ROOT, execute
from tqdm import tqdm

from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.evaluation.intervals import paired_interval
from flow_grpo.evaluation.tables import read_scores, write_rows
from flow_grpo.launch.entry import prepare
from flow_grpo.report.output import read_metrics

CONFIG = "config/testbed.py:shapes_sd3_grpo"
KINDS = ("run", "control", "flipped")
FORWARD_S = 1.7e-3  # of an image, while the other core of two is busy (scripts/benchmark/floor.py)
BACKWARD = 2.0  # times as long a forward and its backward take
GAIN = 0.1  # of strict accuracy; how many images it takes is told
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
    "dpo online": OFFLINE | {"objective": "dpo", "train.beta": 100.0, "train.ref_update_step": 20},
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
    keys |= {"num_epochs": num_epochs, "save_freq": max(1, num_epochs // 4), "eval_freq": 10_000}
    keys |= {"eval_max_samples": 1, "eval_split": "dev", "resume_from": "auto"} | RUNS[name]
    keys |= {"train.shuffle_advantages": True} if kind == "control" else {}
    keys |= {"reward_fn": {"shapes": -1.0}} if kind == "flipped" else {}
    given = [f"--config.{key}={value}" for key, value in keys.items()]
    return [sys.executable, str(ROOT / "scripts/train_sd3.py"), "--config", CONFIG, *given, *more]


def turn(job: tuple[str, str, int]) -> int:
    """Return a job's place: objectives, then other rollouts of Flow-GRPO, then their doubles."""
    name, kind, _ = job
    return 0 if "objective" in RUNS[name] or name == "window" else 1 if kind == "run" else 2


def folder_name(name: str, kind: str, seed: int) -> str:
    return f"{name.replace(' ', '-')}-{kind}-{seed}"


def epochs_of(out: Path, name: str, seconds: float, more: list[str]) -> int:
    """Return how many epochs of a run take so many CPU seconds, by their passes of the model."""
    run = prepare(command(out / "counted", name, "run", 0, 1, more)[1:], SD3, CONFIG)
    passes = run.passes()
    run.close()
    cost = sum(passes.values()) + (BACKWARD - 1) * passes["forward and backward"]
    return max(2, round(seconds / (cost * FORWARD_S)))


def train(out: Path, name: str, kind: str, seed: int, num_epochs: int, more: list[str]) -> dict:
    """Run a job to its end, unless it was; return its CPU and wall seconds."""
    note = out / f"{folder_name(name, kind, seed)}.json"
    if not note.exists():
        log = out / f"{folder_name(name, kind, seed)}.log"
        spent = execute(command(out, name, kind, seed, num_epochs, more), log)
        note.write_text(json.dumps(spent | {"epochs": num_epochs}))
    return json.loads(note.read_text())


def scores(
    folder: Path, split: str, seed: int, checkpoint: Path | None
) -> tuple[list[str], np.ndarray]:
    """Return a split's prompts and strict scores, drawn with a checkpoint, or with the base."""
    if not (folder / "scores.csv").exists():
        order = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--config", CONFIG]
        order += [
            f"--config.seed={seed}",
            f"--config.eval_split={split}",
            "--out",
            str(folder),
            "--resume",
        ]
        order += ["--checkpoint", str(checkpoint)] if checkpoint else []
        folder.mkdir(parents=True, exist_ok=True)
        execute(order, folder.with_suffix(".log"))
    prompts, columns = read_scores(folder / "scores.csv")
    return prompts, columns["shapes_strict"]


def row_of(out: Path, split: str, name: str, kind: str, seed: int, spent: dict) -> dict:
    """Compare a job's result with the base, row by row on the same noise; kept in a file."""
    job = folder_name(name, kind, seed)
    note = out / split / f"{job}.json"
    if note.exists():
        return json.loads(note.read_text())
    prompts, before = scores(out / split / f"base-{seed}", split, seed, None)
    checkpoints = list((out / job / "checkpoints").iterdir())
    saved = {int(path.name.removeprefix("checkpoint-")): path for path in checkpoints}

    def after(step: int) -> np.ndarray:
        return scores(out / split / f"{job}-{step}", split, seed, saved[step])[1]

    last = after(max(saved))
    low, high = paired_interval(before, last, prompts)
    epochs = read_metrics(out / job, "epoch")
    rewards = [row["reward/avg"] for row in epochs]
    found = {"before": before.mean(), "after": last.mean(), "change": (last - before).mean()}
    found |= {"change_low": low, "change_high": high, "cpu_seconds": spent["cpu_seconds"]}
    found |= {"reward_first": np.mean(rewards[:5]), "reward_last": np.mean(rewards[-5:])}
    found = {key: round(float(value), 4) for key, value in found.items()}
    row = {"name": name, "kind": kind, "seed": seed, "epochs": spent["epochs"]} | found
    row["images_to_gain"] = None
    if kind == "run" and row["change"] >= GAIN:
        first = next(step for step in sorted(saved) if (after(step) - before).mean() >= GAIN)
        row["images_to_gain"] = int(sum(e["images"] for e in epochs if e["step"] <= first))
    note.write_text(json.dumps(row))
    shutil.rmtree(out / job / "checkpoints")
    return row


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

    def images(name: str) -> str:
        runs = [row for row in of[name] if row["kind"] == "run"]
        return ", ".join(str(row["images_to_gain"] or "-") for row in runs)

    lines = [
        f"| | epochs | CPU s | run | control | flipped | images to {100 * GAIN:+.0f} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(of, key=gain, reverse=True):
        whole = [row for row in of[name] if row["kind"] != "flipped"] or of[name]
        spent = np.mean([row["cpu_seconds"] for row in whole])
        cells = [f"`{name}`", whole[0]["epochs"], f"{spent:.0f}"]
        cells += [*(points(name, kind) for kind in KINDS), images(name)]
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
    machine = f"Python {platform.python_version()}, torch {torch.__version__}"
    jobs = [(n, kind, seed) for seed in args.seeds for kind in args.kinds for n in args.only]
    jobs.sort(key=turn)
    epochs = {n: epochs_of(out, n, args.seconds, more) for n in tqdm(args.only, "plans")}
    rows = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            scores(out / args.split / f"base-{seed}", args.split, seed, None)

        def whole(job: tuple[str, str, int]) -> None:
            num_epochs = epochs[job[0]] if job[1] != "flipped" else max(2, epochs[job[0]] // 4)
            spent = train(out, *job, num_epochs, more)
            rows[job] = row_of(out, args.split, *job, spent)

        for done in tqdm(
            as_completed([pool.submit(whole, job) for job in jobs]), "jobs", len(jobs)
        ):
            done.result()
            so_far = [rows[job] for job in sorted(rows, key=jobs.index)]
            write_rows(out / "objectives.csv", so_far)
            plot(out / "objectives.png", so_far)
            said = [*table(so_far), "", f"{args.split} rows; seeds {args.seeds}; {machine}."]
            (out / "objectives.md").write_text("\n".join(said) + "\n")
    print((out / "objectives.md").read_text())


if __name__ == "__main__":
    main()
