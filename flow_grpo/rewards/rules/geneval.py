"""GenEval (arXiv:2310.11513) as a reward: are the objects there that the prompt asks for.

Needs neither mmdetection nor open_clip. The verdicts are in geneval_rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.rules import geneval_rules
from flow_grpo.rewards.rules.geneval_rules import COLORS, Found

GROUND = (0x99, 0x99, 0x99)  # what is not of the object, when its color is judged
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class GenEval(Reward):
    """Score each picture by its row's "include": soft in [0, 1], or as config.rewards says.

    Further columns: geneval_soft, geneval_strict (0 or 1, exact counts) and geneval_official (0 or
    1, the benchmark's own verdict).
    """

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "geneval_detector")
        check_model(settings, "clip")
        for prompt, row in zip(prompts, metadata, strict=True):
            try:
                geneval_rules.check_row(row)
            except ValueError as error:
                raise ValueError(
                    f"the row of the prompt {prompt!r} can't be judged: {error}. A data set such "
                    f"as dataset/geneval is needed."
                ) from error

    def __init__(self, settings, device):
        from flow_grpo.rewards.clip import encoder
        from flow_grpo.rewards.rules.detector import Detector

        self.trained = settings["geneval_score"]
        self.detect = Detector(settings["geneval_detector"], device)
        self.clip = encoder.load(settings["clip"], settings["clip"], device)
        self._colors = {}

    def __call__(self, batch: Batch) -> dict:
        found = self.detect(only_pictures(batch.images, "geneval"))
        columns = {"geneval_" + name: [] for name in geneval_rules.SCORES}
        for image, row, objects in zip(batch.images, batch.metadata, found, strict=True):
            kept = geneval_rules.keep(objects, row.get("tag", ""))
            for name, value in self._verdicts(image, row, kept).items():
                columns["geneval_" + name].append(float(value))
        scores = {name: np.array(column) for name, column in columns.items()}
        trained = scores["geneval_" + self.trained]
        if self.trained != "flow_grpo":
            del scores["geneval_flow_grpo"]
        return scores | {"geneval": trained}

    def _verdicts(self, image: np.ndarray, row: dict, objects: dict) -> dict[str, float]:
        def paint(name: str, things: Sequence[Found]) -> list[str]:
            return self.colors(image, name, things)

        strict, soft = geneval_rules.strict_and_soft(objects, row, paint)
        old = geneval_rules.strict_and_soft(objects, row, paint, compat="flow_grpo")[1]
        official = geneval_rules.official(objects, row, paint)
        return {"soft": soft, "strict": strict, "official": official, "flow_grpo": old}

    def colors(self, image: np.ndarray, name: str, things: Sequence[Found]) -> list[str]:
        """Name the color of each object by CLIP, looking at its own pixels alone."""
        if name not in self._colors:
            texts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
            features = self.clip.text_features(texts).unflatten(0, (len(COLORS), -1)).mean(1)
            self._colors[name] = features / features.norm(dim=-1, keepdim=True)
        crops = [crop(image, thing) for thing in things]
        best = (self.clip.image_features(crops) @ self._colors[name].T).argmax(-1)
        return [COLORS[n] for n in best.tolist()]


def crop(image: np.ndarray, thing: Found) -> Image.Image:
    """Cut an object's box out, on plain ground where its mask is not."""
    if thing.mask is not None:
        image = np.where(thing.mask[..., None], image, np.array(GROUND, np.uint8))
    return Image.fromarray(image).crop(tuple(round(edge) for edge in thing.box))
