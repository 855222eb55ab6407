"""What the commands that score without a run share: --set, and the device."""

from typing import Any

from config.base import COMMON, base
from flow_grpo import keys
from flow_grpo.rewards import loading


def settings(given: list[str], rewards: list[str]) -> dict[str, Any]:
    """Return config.rewards and the rewards' settings, changed by --set; or raise ValueError."""
    config = base(None)
    own = {key: value for name in rewards for key, value in loading.find(name).defaults.items()}
    for each in given:
        name, equals, value = each.partition("=")
        common = loading.settings(config)
        known = {**own, **common}
        if not equals or name not in known:
            raise ValueError(f"--set={each}: KEY=VALUE is needed, a key of {', '.join(known)}.")
        key = name if name in COMMON else f"rewards.{name}"
        try:
            if name in common:
                keys.parent(config, key)[name] = COMMON[key].parse(value)
            else:
                own[name] = type(own[name])(value)
        except ValueError:
            raise ValueError(f"--set={each}: a value like {known[name]!r} is needed.") from None
    keys.check(config, COMMON)
    return {**own, **loading.settings(config)}


def device(rewards: list[str]) -> str:
    if not any(isinstance(loading.find(name), type) for name in rewards):
        return "cpu"  # functions hold no model, and torch takes seconds
    from torch import cuda

    return "cuda" if cuda.is_available() else "cpu"
