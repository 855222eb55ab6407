"""How a benchmark is run, pinned in one file of protocols/, and the row that states it."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from config.base import COMMON
from flow_grpo import keys
from flow_grpo.cli import did_you_mean
from flow_grpo.evaluation.evaluate import sizes
from flow_grpo.evaluation.intervals import NUM_RESAMPLES
from flow_grpo.evaluation.tables import Summary
from flow_grpo.inputs import MEAN_OF_TAGS
from flow_grpo.prompts import Prompt
from flow_grpo.records import Size

FOLDER = Path(__file__).parent / "protocols"
PARTS = {  # of a file: their keys
    "prompts": ("dataset", "rows", "per_prompt", "sha256", "others"),
    "config": (),  # of config/base.py
    "guidance": (),  # by the pipeline's class, where it is not sample.eval_guidance_scale
    "result": ("score", "over", "times", "judge", "resamples"),
    "published": ("model", "value", "settings", "source"),
}
NEEDED = (  # what every file must pin
    "seed",
    "resolution",
    "height",
    "width",
    "num_frames",
    "eval_split",
    "eval_max_samples",
    "reward_fn",
    "eval_reward_fn",
    "sample.eval_num_steps",
    "sample.eval_sizes",
    "sample.eval_guidance_scale",
    "sample.guidance_interval",
    "sample.clean_grid",
)


class Published(NamedTuple):
    model: str
    value: str
    settings: str  # and how they differ from ours
    source: str


@dataclass(frozen=True)
class Protocol:
    """A file of protocols/, or one's own like it."""

    name: str
    dataset: str  # the folder that is read unless config.dataset names another
    rows: int
    per_prompt: int  # pictures, each from a noise of its own
    sha256: Mapping[str, str]  # known copies of the prompts: checksum() and what each is
    others: bool  # whether another copy may be used; the row then says so
    config: Mapping[str, Any]  # keys and their values
    guidance: Mapping[str, float]
    score: str  # the column
    over: str  # "all": the mean of all rows; or MEAN_OF_TAGS
    times: float  # 100: percent
    judge: str
    published: tuple[Published, ...]

    def pin(self, config: ConfigDict, given: Collection[str], pipeline: str) -> None:
        """Set the keys. given: those of the command line; pipeline: the name of its class.

        Raises ValueError for one that was given another value.
        """
        pinned = dict(self.config)
        if pipeline in self.guidance:
            pinned["sample.eval_guidance_scale"] = self.guidance[pipeline]
        for name, value in pinned.items():
            was_given = any(each == name or each.startswith(f"{name}.") for each in given)
            if was_given and keys.get(config, name) != value:
                raise ValueError(
                    f"--config.{name}={keys.get(config, name)}: --protocol={self.name} pins "
                    f"{value!r}. Leave it out; or evaluate without --protocol; or copy {FOLDER}/"
                    f"{self.name}.toml, change it and name the copy, as --protocol=mine.toml."
                )
            keys.parent(config, name)[name.rpartition(".")[2]] = value
        if "dataset" not in given:
            config.dataset = self.dataset
        self._check_judge(config)

    def _check_judge(self, config: ConfigDict) -> None:
        """Refuse another judge in the process; what an endpoint serves can't be seen from here."""
        named = [self.config.get(f"rewards.vlm_{key}") for key in ("model", "revision")]
        model, revision = named
        wanted = [name.rpartition("/")[2] for name in named if name]
        path = config.rewards.vlm
        if path and wanted and not any(name in path for name in wanted):
            raise ValueError(
                f"--config.rewards.vlm={path}: --protocol={self.name} pins {model} at {revision}. "
                f"Name it so, or a folder that has the model's name or the revision in its own."
            )

    def check(self, prompts: Sequence[Prompt]) -> str:
        """Return the prompts' checksum and what copy it is. Raises ValueError for other prompts."""
        counts, found = Counter(p.text for p in prompts).values(), checksum(prompts)
        if len(prompts) != self.rows or any(count % self.per_prompt for count in counts):
            raise ValueError(
                f"--protocol={self.name} has {self.rows} rows, {self.per_prompt} of each prompt; "
                f"the data set has {len(prompts)}, of {len(counts)} prompts. README.md of "
                f"{self.dataset} says how it is made of your download."
            )
        if found not in self.sha256 and not self.others:
            raise ValueError(
                f"--protocol={self.name}: the prompts' checksum is {found}; those of "
                f"{self.dataset} have {', '.join(self.sha256)}. Restore that folder."
            )
        if own := next((p for p in prompts if p.size and p.metadata.get("size")), None):
            raise ValueError(
                f'--protocol={self.name} draws all rows at one size; {own.where} has a "size" of '
                f"its own. Leave it out; or name sample.eval_sizes in a copy of the protocol."
            )
        if self.over == MEAN_OF_TAGS and len({prompt.tag for prompt in prompts}) < 2:
            raise ValueError(
                f"--protocol={self.name} takes the mean over tags, and these prompts have not two. "
                f"README.md of {self.dataset} says how it is made of your download."
            )
        return f"{found[:12]} ({self.sha256.get(found, 'a copy not known to the protocol')})"

    def value(self, summaries: Sequence[Summary]) -> str:
        """Format the score with its interval."""
        tag = "" if self.over == "all" else self.over
        by_name = {(each.score, each.tag): each for each in summaries}
        if (self.score, tag) not in by_name:
            there = ", ".join(sorted({each.score for each in summaries}))
            raise ValueError(
                f"--protocol={self.name}: [result] score={self.score!r} is not among the scores "
                f"{there}. All are in scores.csv; correct the file for the next evaluation."
            )
        row = by_name[self.score, tag]
        numbers = (self.times * each for each in (row.mean, row.low, row.high))
        mean, low, high = (f"{n:.2f}" if self.times == 100 else f"{n:.4f}" for n in numbers)
        missing = f", {row.num_missing} rows without a score" if row.num_missing else ""
        return f"{mean} [{low}, {high}]{missing}"

    def markdown(
        self, config: ConfigDict, copy: str, value: str, model: str, code: str | None
    ) -> str:
        """Lay out a row that states the protocol, and what others published beside it."""
        sample, judge = config.sample, self.judge
        if "rewards.vlm_model" in self.config:
            judge += f" ({config.rewards.vlm or 'at an endpoint, as it is named there'})"
        trained = Size(config.height, config.width, config.num_frames)
        size = next(iter(sizes(config)), trained)
        frames = f" x {size.num_frames} frames" if size.num_frames > 1 else ""
        cells = {
            "protocol": self.name,
            "model": model,
            f"{self.score}, {self.over}": value,
            "pictures": f"{self.rows}, {self.per_prompt} a prompt",
            "prompts": copy,
            "size": f"{size.height} x {size.width}{frames}",
            "steps": str(sample.eval_num_steps),
            "guidance": f"{sample.eval_guidance_scale:g}",
            "judge": judge,
            "seed": str(config.seed),
            "precision": config.mixed_precision,
            "tokens": str(config.max_sequence_length),
            "code": code[:12] + code[40:] if code else "unknown",  # + behind it: with changes
        }
        lines = _table([cells])
        if self.published:
            lines += ["", "Published, at what settings:", ""]
            lines += _table([each._asdict() for each in self.published])
        return "\n".join(lines) + "\n"


def load(name: str) -> Protocol:
    """Read protocols/<name>.toml, or a file of one's own. Raises ValueError with file and fault."""
    known = sorted(path.stem for path in FOLDER.glob("*.toml"))
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise ValueError(
            f"--protocol={name}: there are {', '.join(known)}, or a file that ends in .toml."
            f"{did_you_mean(name, known)}"
        )
    try:
        return _read(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--protocol={name}: {path}: {error}") from None


def _read(name: str, found: dict) -> Protocol:
    for part, own in PARTS.items():
        for rows in [found.get(part, {})] if part != "published" else found.get(part, []):
            if own and set(rows) != set(own):
                raise ValueError(f"[{part}] needs {', '.join(own)}, and has {', '.join(rows)}")
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in found["config"].items()}
    for key in (*config, *NEEDED):
        if key not in COMMON or not COMMON[key].allows(config.get(key, b"")):
            needed = f"{COMMON[key].needed} is needed" if key in COMMON else "it is no key"
            raise ValueError(f"[config] {key}={config.get(key)!r}: {needed}")
    result = dict(found["result"])
    if result.pop("resamples") != NUM_RESAMPLES or result["over"] not in ("all", MEAN_OF_TAGS):
        raise ValueError(f"[result] resamples is {NUM_RESAMPLES}, over is all or {MEAN_OF_TAGS}")
    return Protocol(
        name,
        config=config,
        guidance=found.get("guidance", {}),
        published=tuple(Published(**row) for row in found.get("published", ())),
        **found["prompts"],
        **result,
    )


def checksum(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts in their order, what judges are told, and their pictures."""
    digest = hashlib.sha256()
    for each in prompts:
        pictures = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in each.images]
        digest.update(json.dumps([each.text, each.metadata, pictures], sort_keys=True).encode())
    return digest.hexdigest()


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
