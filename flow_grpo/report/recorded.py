"""Read what a run wrote. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flow_grpo.cli import redacted
from flow_grpo.inputs import MEAN_OF_TAGS


def read_metrics(folder: Path, kind: str) -> list[dict]:
    """Return the rows of one kind (update | epoch | eval | look) of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def score_names(row: dict) -> list[str]:
    """Return the scores of an evaluation's row, without counts and the ends of intervals."""
    ends = {f"{name}_{end}" for name in row for end in ("low", "high")}
    other = {"kind", "epoch", "step", "hacking_alarm"} | ends
    return [
        key for key in row if key not in other and "/" not in key and not key.endswith("_missing")
    ]


def tag_names(row: dict) -> list[str]:
    """Return the tags of an evaluation's row, sorted, and then their mean if there is one."""
    tags = {key.split("/", 1)[1] for key in row if "/" in key}
    return sorted(tags, key=lambda tag: (tag == MEAN_OF_TAGS, tag))


def interval(row: dict, name: str, tag: str | None = None) -> tuple[float, float] | None:
    """Return an evaluated score's interval, if the run wrote one."""
    behind = f"/{tag}" if tag else ""
    ends = row.get(f"{name}_low{behind}"), row.get(f"{name}_high{behind}")
    return None if None in ends else ends


@dataclass(frozen=True)
class Recorded:
    """A run as its folder has it; rows are those of metrics.jsonl."""

    folder: Path
    config: dict
    launches: list[dict]  # see provenance.py; empty for a run that did not write them
    defaults: dict  # of every key of config; empty for a run that did not write them
    statistics: dict[str, dict]  # the objective's: name -> title, note, origin; likewise
    evals: list[dict]
    epochs: list[dict]
    updates: list[dict]
    looks: list[dict]  # of the evaluations' images

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def trained(self) -> list[str]:
        """The rewards of non-zero weight."""
        return [name for name, weight in self.config["reward_fn"].items() if weight]

    def scores(self) -> list[str]:
        """The evaluated scores, what was trained first; avg only where it is a sum of several."""
        names = score_names(self.evals[-1])
        first = [name for name in self.trained if name in names]
        if "avg" in names and len(self.trained) > 1:
            first = ["avg", *first]
        return first + [name for name in names if name not in first and name != "avg"] or names

    def tags(self) -> list[str]:
        return tag_names(self.evals[-1])


def load(folder: Path) -> Recorded:
    """Read a run's folder. Raises ValueError if it is not one, or has no evaluation yet."""
    missing = [n for n in ("config.json", "metrics.jsonl") if not (folder / n).is_file()]
    if missing or not read_metrics(folder, "eval"):
        raise ValueError(
            f"{str(folder)!r} has no {missing[0] if missing else 'evaluation in metrics.jsonl'}: "
            f"a run's folder, logs/<run_name>, is needed, after its first evaluation."
        )
    files = [folder / name for name in ("config.json", "launches.json", "run.json")]
    config, launches, about = (
        redacted(json.loads(f.read_text())) if f.is_file() else {} for f in files
    )
    defaults, statistics = about.get("defaults", {}), about.get("statistics", {})
    rows = [read_metrics(folder, kind) for kind in ("eval", "epoch", "update", "look")]
    return Recorded(folder, config, launches or [], defaults, statistics, *rows)
