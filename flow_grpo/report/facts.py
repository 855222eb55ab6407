"""A run in words and numbers: its headline, its settings, how it was started. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from flow_grpo.report.recorded import Recorded, interval

LEAVES = ("reward_fn", "reward_urls")  # a dict that is one setting
FALLEN, CHANGED, INFLATED = (0.7, math.inf), (0.75, 1.33), 1.05  # beyond them signs() speaks
PER_RUN = ("run_name", "logdir", "resume_from", "tracker", "project_name")  # no news if changed


@dataclass(frozen=True)
class Change:
    """A score before and after; texts, "" where there is nothing to say."""

    name: str
    before: str
    after: str
    difference: str
    rises: bool
    interval_before: str
    interval_after: str


@dataclass(frozen=True)
class Setting:
    key: str
    value: str
    default: str
    changed: bool


def number(value: float | None) -> str:
    """Write a number with three digits behind the point, or three that matter if it is small."""
    if value is None:
        return "–"
    if value != 0 and (abs(value) < 0.01 or abs(value) >= 1e5):
        return f"{value:.3g}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value}"


def changes(run: Recorded) -> list[Change]:
    """Compare the first evaluation with the last, score by score."""
    rows = []
    for name in run.scores():
        before, after = run.evals[0].get(name), run.evals[-1].get(name)
        gain = "" if None in (before, after) else _signed(after - before)
        ends = [_written(interval(row, name)) for row in (run.evals[0], run.evals[-1])]
        rows.append(Change(name, number(before), number(after), gain, gain.startswith("+"), *ends))
    return rows


def _signed(gain: float) -> str:
    """Write a difference with its sign, as precisely as number() writes what is not tiny."""
    precise = f"{abs(gain):.3f}" if abs(gain) >= 0.0005 else number(abs(gain))
    return f"{'−' if gain < 0 else '+'}{precise}"


def _written(ends: tuple[float, float] | None) -> str:
    return f"{number(ends[0])} – {number(ends[1])}" if ends else ""


def what(run: Recorded) -> str:
    """Say what was trained on what, in a sentence."""
    config, train = run.config, run.config["train"]
    how = f"a LoRA of rank {train['lora_rank']}" if config["use_lora"] else "all weights"
    weights = {name: config["reward_fn"][name] for name in run.trained}
    rewards = " + ".join(n if w == 1 else f"{w:g} × {n}" for n, w in weights.items())
    return (
        f"{config['pretrained']['model']}, {how}, trained by {config['objective']} "
        f"on {rewards} with the prompts of {config['dataset']}"
    )


def signs(run: Recorded) -> list[str]:
    """Say which signs of reward hacking a run shows, a sentence each, with where to look."""
    found = []
    if steps := [str(row["step"]) for row in run.evals if row.get("hacking_alarm")]:
        found.append(
            f"Held-out rewards fell while the trained one rose (evaluations of step "
            f"{', '.join(steps)}): compare images/eval-*.png of before and after."
        )
    values = {
        "A prompt's images differ {:.2f} times as much": (run.epochs, "diversity", FALLEN),
        "Images are {:.2f} times as colourful": (run.looks, "saturation", CHANGED),
        "Images are {:.2f} times as sharp": (run.looks, "sharpness", CHANGED),
    }
    for words, (rows, key, (least, most)) in values.items():
        known = [row[key] for row in rows if key in row]
        times = known[-1] / known[0] if known and known[0] else 1.0
        if not least <= times <= most:
            found.append(f"{words.format(times)} as at first.")
    ratios = [row["norm_ratio"] for row in run.updates if "norm_ratio" in row]
    is_guided = run.config.get("train", {}).get("reference_guidance") is not None
    if ratios and ratios[-1] > INFLATED and not is_guided:  # else they differ by that already
        found.append(
            f"The velocity's norm is {ratios[-1]:.2f} times the reference's: forward.norm_beta or "
            f"a stronger KL holds it."
        )
    return found


def duration(run: Recorded) -> str:
    """The wall-clock of the finished epochs, with their evaluations."""
    seconds = sum(_seconds(row) for row in run.epochs)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def headline(run: Recorded) -> dict[str, str]:
    """What stands below the scores: how much was done, on what."""
    last, machines = run.evals[-1], {machine(launch) for launch in run.launches}
    images = sum(round(row["images_per_second"] * _seconds(row, "eval")) for row in run.epochs)
    return {
        "epochs": f"{len(run.epochs)} of {run.config['num_epochs']}",
        "optimizer steps": f"{last['step']:,}",
        "images": f"{images:,}",
        "time": duration(run),
        "machine": "; ".join(sorted(machines)) or "not recorded",
    }


def _seconds(row: dict, without: str = "") -> float:
    keys = (key for key in row if key.startswith("seconds/") and key != f"seconds/{without}")
    return sum(row[key] for key in keys)


def machine(launch: dict) -> str:
    """A launch's machine, in words."""
    held = launch["machine"]
    cpu = f"{held['cores']} cores of {held['cpu']}, {held['memory_gib']:.0f} GiB"
    return ", ".join([*held["gpus"], cpu])


def settings(run: Recorded) -> list[Setting]:
    """Every key of the run beside its default, in the order of config/base.py."""
    defaults, own = _flat(run.defaults), _flat(run.config)
    rows = []
    for key in defaults | own:
        if key in own:  # if not, the run is older than the key
            value, default = own[key], defaults.get(key)
            changed = key not in PER_RUN and (key not in defaults or value != default)
            rows.append(Setting(key, json.dumps(value), json.dumps(default), changed))
    return rows


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in LEAVES:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
