"""What is optimised: a name in config.objective, and the class behind it."""

import re

import torch
from ml_collections import ConfigDict

from flow_grpo.cli import did_you_mean, load_named
from flow_grpo.keys import Key
from flow_grpo.objectives.base import Objective
from flow_grpo.objectives.forward.awm import AWM
from flow_grpo.objectives.forward.crd import CRD
from flow_grpo.objectives.forward.dgpo import DGPO
from flow_grpo.objectives.forward.epg import EPG
from flow_grpo.objectives.forward.nft import NFT
from flow_grpo.objectives.forward.ram import RAM
from flow_grpo.objectives.forward.vgrpo import VGRPO
from flow_grpo.objectives.preference.dpo import DPO
from flow_grpo.objectives.preference.sft import SFT
from flow_grpo.objectives.ratio.dppo import FlowDPPO
from flow_grpo.objectives.ratio.grpo import GRPO
from flow_grpo.objectives.ratio.guard import GRPOGuard
from flow_grpo.sampling import Schedule

OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": GRPO,
    "grpo_guard": GRPOGuard,
    "flow_dppo": FlowDPPO,
    "nft": NFT,
    "awm": AWM,
    "vgrpo": VGRPO,
    "epg": EPG,
    "ram": RAM,
    "crd": CRD,
    "dgpo": DGPO,
    "dpo": DPO,
    "sft": SFT,
}


def find(name: str) -> type[Objective]:
    """Return the class of a name of OBJECTIVES or "module:Class". Raises ValueError."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" not in name:
        raise ValueError(
            f"config.objective={name!r}: one of {', '.join(OBJECTIVES)} is needed, or module:Class "
            f"of one's own.{did_you_mean(name, OBJECTIVES)}"
        )
    found = load_named(name, f"config.objective={name!r}", "class")
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(
            f"config.objective={name!r} is {found!r}; needed is a class of "
            f"flow_grpo.objectives.base.Objective."
        )
    for key, declared in found.keys.items():
        if not (isinstance(declared, Key) and re.fullmatch(r"[a-z]\w*\.[a-z]\w*", key)):
            raise ValueError(
                f"config.objective={name!r} declares {key!r}: {declared!r}; needed is section.key, "
                f"such as 'pairs.beta', and a flow_grpo.keys.Key."
            )
    return found


def anywhere(config: ConfigDict) -> Objective:
    """Make a run's objective on a schedule of no model, for what it declares."""
    return find(config.objective)(
        config, Schedule(torch.linspace(1, 0, config.sample.num_steps + 1))
    )


def copies(objective: Objective, config: ConfigDict) -> list[str]:
    """Name the copies of the trained weights that a run holds from its start on."""
    held = [name for name in objective.snapshots if name != "reference" or not config.use_lora]
    return [*held, *(["ema"] if config.train.ema else [])]
