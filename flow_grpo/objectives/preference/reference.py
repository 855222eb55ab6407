"""A frozen copy that samples, and now and then becomes the policy."""

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Snapshots

REF_UPDATE_STEP = Key(
    0,
    "online: optimizer steps after which the weights that sample become the policy's; 0: never",
    least=0,
    most=10**9,
)


def refresh(snapshots: Snapshots, name: str, every: int, num_updates: int) -> None:
    if every and num_updates % every == 0:
        snapshots.update(name, 0.0)
