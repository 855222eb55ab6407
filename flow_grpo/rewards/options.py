"""What the commands that score without a run share: --set, and the device."""

from __future__ import annotations

from typing import Any

from config.base import base
from flow_grpo.rewards import loading


def settings(given: list[str], rewards: list[str]) -> dict[str, Any]:
    """Return config.rewards and the rewards' own settings as --set KEY=VALUE changes them.

    Raises ValueError.
    """
    own = {key: value for name in rewards for key, value in loading.find(name).defaults.items()}
    settings = own | loading.settings(base())
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or key not in settings:
            raise ValueError(f"--set={each}: KEY=VALUE is needed, a key of {', '.join(settings)}.")
        try:
            settings[key] = type(settings[key])(value)
        except ValueError:
            raise ValueError(f"--set={each}: a value like {settings[key]!r} is needed.") from None
    return settings


def device(rewards: list[str]) -> str:
    """Return where the rewards' models go if nobody says."""
    if not any(isinstance(loading.find(name), type) for name in rewards):
        return "cpu"  # functions hold no model, and torch takes seconds
    from torch import cuda

    return "cuda" if cuda.is_available() else "cpu"
