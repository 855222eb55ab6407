"""What an evaluation writes, and which other one it can be compared with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from flow_grpo import keys
from flow_grpo.evaluation import tables
from flow_grpo.prompts import Prompt
from flow_grpo.report.sheets import captioned_sheet, side_by_side

PAIRED = (  # for its rows to be compared with others
    "seed",
    "eval_split",
    "eval_max_samples",
    "resolution",
    "height",
    "width",
    "num_frames",
    "reward_fn",
    "ocr_engine",
    "sample.eval_num_steps",
    "sample.eval_sizes",
    "sample.guidance_interval",
    "sample.clean_grid",
)


class Result(NamedTuple):
    scores: dict[str, np.ndarray]  # (N,) each
    images: dict[int, np.ndarray]  # some rows' images


def shown_score(config: ConfigDict) -> str:
    """Name the score of a caption: the weighted sum, or the only reward of it."""
    trained = [name for name, weight in config.reward_fn.items() if weight]
    return trained[0] if len(trained) == 1 else "avg"


def check_earlier(folder: Path, config: ConfigDict, prompts: list[Prompt]) -> None:
    """Refuse to pair with an evaluation of other prompts or from other noise. Raises ValueError."""
    try:
        texts, _ = tables.read_scores(folder / "scores.csv")
        told = json.loads((folder / "evaluation.json").read_text())
        theirs = told["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--compare={folder}: no folder of an evaluation ({error}).") from None
    ours = json.loads(config.to_json_best_effort())
    changed = [key for key in PAIRED if keys.at(theirs, key) != keys.at(ours, key)]
    changed += ["sample.eval_guidance_scale"] * (_scale(theirs) != _scale(ours))
    before, now = _judged_by(theirs), _judged_by(ours)
    changed += [f"rewards.{n}" for n in before | now if before.get(n) != now.get(n)]
    others = texts != [p.text for p in prompts] or told.get("sizes") not in (None, sizes(prompts))
    changed += ["dataset"] if others else []
    if changed:
        raise ValueError(
            f"--compare={folder} was evaluated with another config.{', config.'.join(changed)}: "
            f"its rows can't be paired with these. Evaluate both alike."
        )


def sizes(prompts: list[Prompt]) -> list[str]:
    """List the sizes that prompts have, as each changes from row to row."""
    return [size for size, _ in itertools.groupby(str(prompt.size) for prompt in prompts)]


def _scale(config: dict) -> object:
    found = keys.at(config, "sample.eval_guidance_scale")
    return keys.at(config, "sample.guidance_scale") if found is None else found


def _judged_by(config: dict) -> dict[str, object]:
    """Return the settings of rewards, but for where their servers are."""
    return {k: v for k, v in config.get("rewards", {}).items() if not k.endswith("_url")}


def compare(path: Path, scores: Sequence[dict[str, np.ndarray]], prompts: list[Prompt]) -> None:
    """Print and write how the second scores differ from the first, row by row."""
    texts, tags = [p.text for p in prompts], [p.tag for p in prompts]
    comparisons = tables.compare(*scores, tags, texts)
    print(f"{tables.table(comparisons)}\n{tables.outcomes(comparisons)}")
    tables.write_csv(path, comparisons)


def draw_pairs(
    path: Path,
    name: str,
    scores: Sequence[dict[str, np.ndarray]],
    images: Sequence[dict[int, np.ndarray]],
    prompts: list[Prompt],
) -> None:
    """Draw a sheet of the rows' images by two checkpoints, side by side. name: of the score."""
    before, after = (each[name] for each in scores)
    rows = list(images[0])[::2]
    captions = [f"{prompts[n].text}\n{name} {before[n]:.3f} -> {after[n]:.3f}" for n in rows]
    pairs = [side_by_side(images[0][n], images[1][n]) for n in rows]
    captioned_sheet(pairs, captions, 4).save(path)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as PNG; a video (F, H, W, 3) as an animated one."""
    first, *rest = (Image.fromarray(frame) for frame in (image if image.ndim == 4 else image[None]))
    first.save(path, save_all=bool(rest), append_images=rest)
