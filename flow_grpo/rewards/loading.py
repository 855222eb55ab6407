"""From a name in config.reward_fn to a scorer: found, checked before weights load, then built."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from flow_grpo.cli import did_you_mean, load_named
from flow_grpo.rewards.base import Plain, Reward
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.registry import REWARDS


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return {**config.rewards, "ocr_engine": config.ocr_engine}


def find(name: str) -> type[Reward] | Plain:
    """Return the reward of a key of REWARDS or "module:attribute". Raises ValueError."""
    if name not in REWARDS and ":" not in name:
        raise ValueError(
            f"there is no reward {name!r}; there are {', '.join(sorted(REWARDS))}, and "
            f"module:function is one's own.{did_you_mean(name, REWARDS)}"
        )
    what = f"the reward {name!r}"
    found = REWARDS[name] if name in REWARDS else load_named(name, what, "function")
    if isinstance(found, Plain) or (isinstance(found, type) and issubclass(found, Reward)):
        return found
    if isinstance(found, type) or not callable(found):
        raise ValueError(
            f"{what} is {found!r}; needed is a function, or a class of "
            f"flow_grpo.rewards.base.Reward."
        )
    try:
        return Plain(found)
    except ValueError as error:
        raise ValueError(f"{what} can't be called: {error}") from error


def check(
    name: str, settings: Mapping[str, Any], prompts: Sequence[str], metadata: Sequence[Mapping]
) -> None:
    """Raise ValueError if a reward does not exist or can't score all these. Loads nothing."""
    found = find(name)
    try:
        found.check({**found.defaults, **settings}, prompts, metadata)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def load(name: str, settings: Mapping[str, Any], device: str) -> Callable[[Batch], dict]:
    """Build a reward's scorer; its weights load here.

    The user's own may name its scores after the attribute, or give an array without a name.
    """
    found = find(name)
    settings = {**found.defaults, **settings}
    scorer = found.scorer(settings) if isinstance(found, Plain) else found(settings, device)
    return _Renamed(name, scorer) if name not in REWARDS else scorer


def _copies(values: Any) -> Any:
    return [copy.deepcopy(v) for v in values] if isinstance(values, list) else copy.copy(values)


def _host(scores: Any) -> Any:
    """Take tensors from where they are, off a graph and in a type that numpy knows."""
    if isinstance(scores, (list, tuple)):
        return [_host(each) for each in scores]
    return scores.detach().cpu().double().numpy() if hasattr(scores, "detach") else scores


class _Renamed(Reward):
    def __init__(self, name: str, scorer: Callable[[Batch], Any]):
        self.name, self.scorer = name, scorer

    def __call__(self, batch: Batch) -> dict:
        # What it writes into is no one else's, nor another row's.
        columns = {name: _copies(values) for name, values in vars(batch).items()}
        scores = self.scorer(Batch(**columns))
        if not isinstance(scores, dict):
            return {self.name: _host(scores)}
        short = self.name.partition(":")[2]
        if short in scores and self.name in scores:
            raise ValueError(f"it returned both {short!r} and {self.name!r}, which are one")
        return {self.name if k == short else k: _host(each) for k, each in scores.items()}

    def close(self) -> None:
        if isinstance(self.scorer, Reward):
            self.scorer.close()
