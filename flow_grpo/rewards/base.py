"""What a reward is: a class that keeps something, or a plain function with what it brings.

Its module imports numpy and PIL alone at its top, for servers; its constructor the rest.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from importlib.util import find_spec
from inspect import Parameter
from typing import Any, ClassVar

import numpy as np

from flow_grpo.rewards.batch import Batch

COLUMNS = ("images", "prompts", "metadata", "references", "group")  # that a function may name
# What a run calls its own beside the scores: no reward may return these, or any with a "/".
OURS = frozenset(
    ("avg", "avg_std", "missing", "zero_std_fraction", "hacking_alarm")
    + ("kind", "epoch", "step", "row", "file", "prompt", "tag")
)
ENDS = ("_low", "_high", "_missing")  # behind a score: its interval, and how many are NaN
Settings = Mapping[str, Any]
Check = Callable[[Settings, Sequence[str], Sequence[Mapping]], None]


class Reward:
    """A scorer that keeps something: a model, processes, connections.

    settings: config.rewards, with config.ocr_engine and `defaults`. Only the constructor loads.
    """

    needs_groups = False  # True: it compares the images of a group, so a call has whole groups
    defaults: ClassVar[Mapping[str, Any]] = {}  # settings of its own

    def __init__(self, settings: Settings, device: str):
        pass

    @classmethod
    def check(cls, settings: Settings, prompts: Sequence[str], metadata: Sequence[Mapping]) -> None:
        """Raise ValueError if the settings or a prompt can't be scored; called before loading."""

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """Score B images, uint8 (H, W, 3), or videos (F, H, W, 3). Returns (B,) columns."""
        raise NotImplementedError

    def close(self) -> None:
        """End what the constructor started."""


class Plain:
    """A function as a reward. It gets the columns and settings that it names.

    With one required parameter of another name it gets the Batch; any other is a ValueError.
    """

    def __init__(self, function: Callable, check=None, settings=None, needs_groups: bool = False):
        update_wrapper(self, function)
        self._function, self.check = function, check or Reward.check
        self.defaults, self.needs_groups = dict(settings or {}), needs_groups
        every = inspect.signature(function).parameters
        known, stars = {*COLUMNS, *self.defaults}, (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        named = (n for n, p in every.items() if p.kind != Parameter.POSITIONAL_ONLY)
        self._names = [name for name in named if name in known]
        required = (n for n, p in every.items() if p.default is p.empty and p.kind not in stars)
        required = [name for name in required if name not in self.defaults]
        others = [name for name in required if name not in self._names]
        self._takes_batch = len(required) == len(others) == 1
        if (others or not self._names) and not self._takes_batch:
            raise ValueError(
                f"{function!r} has parameters {list(every)}. "
                f"Needed are some of {', '.join((*COLUMNS, *self.defaults))}; or a single one, for "
                f"the whole flow_grpo.rewards.batch.Batch."
            )

    def __call__(self, *arguments, **named) -> Any:
        return self._function(*arguments, **named)

    def scorer(self, settings: Settings) -> Callable[[Batch], Any]:
        def score(batch: Batch) -> Any:
            columns = {name: each for name, each in vars(batch).items() if name in COLUMNS}
            known = {**settings, **columns}
            whole = (batch,) if self._takes_batch else ()
            return self._function(*whole, **{name: known[name] for name in self._names})

        return score


def reward(
    *, check: Check | None = None, settings: Settings | None = None, needs_groups: bool = False
) -> Callable[[Callable], Plain]:
    """Give a plain function what a class has: a check, settings with defaults, whole groups."""
    return lambda function: Plain(function, check, settings, needs_groups)


def check_model(settings: Settings, key: str) -> None:
    """Raise ValueError unless config.rewards.<key> is a folder, a file or could be a hub id."""
    path = settings[key]
    if not path:
        raise ValueError(f"config.rewards.{key} is empty: a local path is needed.")
    if not os.path.exists(path) and (path.startswith((".", "/")) or path.count("/") != 1):
        raise ValueError(
            f"config.rewards.{key}={path!r}: there is no such path, and it is no hub id "
            f"(owner/name). Correct it; it is relative to {os.getcwd()}."
        )


def check_package(module: str, extra: str) -> None:
    """Raise ValueError that says how to install what a reward imports."""
    if find_spec(module) is None:
        raise ValueError(
            f"the package {module} is not installed: pip install 'flow_grpo[{extra}]'."
        )


def only_images(images: list[np.ndarray], reward: str) -> list[np.ndarray]:
    for image in images:
        if image.ndim != 3:
            raise ValueError(f"{reward} scores images (H, W, 3), and got {image.shape}.")
    return images
