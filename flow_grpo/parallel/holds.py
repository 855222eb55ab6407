"""What each engine keeps of a training on a rank, and what it sends: arithmetic alone."""

from dataclasses import dataclass
from typing import NamedTuple

MOST = 500_000_000  # gradients' elements that DeepSpeed reduces at a time
LIVE = 1_000_000_000  # elements that its stage 3 leaves gathered, by its default
FP32 = 4  # bytes


class Training(NamedTuple):
    """Elements and bytes of a training, whoever runs it."""

    frozen: int  # elements that do not train, in the type that is computed with
    trained: int
    block: int  # elements of the largest block that is gathered by itself
    width: int  # bytes of the type that is computed with
    copies: int  # snapshots
    is_lora: bool
    holds_start: bool  # the host keeps what an epoch's updates change
    copies_wait: bool = False  # on the host, where they are no adapters


class Calls(NamedTuple):
    """What a rank does in an epoch."""

    forwards: float  # that no backward follows
    backwards: float
    updates: int


@dataclass(frozen=True)
class Kind:
    """A config of scripts/accelerate_configs/. What is cut, each rank has 1/N of."""

    name: str
    alone: bool | None = None  # True: for one rank; False: for several
    cuts_masters: bool = False  # fp32 weights, moments, snapshots
    cuts_gradients: bool = False
    cuts_weights: bool = False
    autocasts: bool = True  # False: what trains is in 16 bits too, beside its masters
    offloads: bool = False  # masters, moments, snapshots to the host; cut weights too
    gathers: str = ""  # of cut weights: "blocks", two at a time; "layers", up to LIVE elements

    def casts_trained(self, training: Training) -> bool:
        """Whether a pass finds what trains in the type that is computed with."""
        return not self.autocasts or self.cuts_weights and not training.is_lora

    def device(self, training: Training, num_ranks: int) -> dict[str, float]:
        """Return the bytes on a rank's device of what lasts, by part."""
        on_host = dict.fromkeys(self._on_host(training), 0.0)
        return self._parts(training, num_ranks) | on_host

    def host(self, training: Training, num_ranks: int) -> dict[str, float]:
        """Return the same of what is on the host; "start" is what an epoch's updates change."""
        found, cut = self._parts(training, num_ranks), num_ranks if self.cuts_masters else 1
        start = FP32 * training.trained * (3 + training.copies) / cut
        kept = {name: found[name] for name in self._on_host(training)}
        return kept | {"start": start if training.holds_start else 0.0}

    def sent(self, training: Training, calls: Calls, num_ranks: int) -> float:
        """Return the bytes that a rank sends in an epoch, by rings: of P, P (N - 1) / N a pass."""
        share = (num_ranks - 1) / num_ranks
        trained, whole = training.trained, training.frozen + training.trained
        if self.cuts_weights:
            gathered = training.width * whole * (calls.forwards + 2 * calls.backwards)
            return share * (gathered + FP32 * trained * calls.backwards)
        width = FP32 if self.autocasts else training.width
        return share * 2 * width * trained * calls.updates

    def _on_host(self, training: Training) -> tuple[str, ...]:
        if not self.offloads:
            swapped = self.cuts_weights or not training.is_lora
            return ("snapshots",) if training.copies_wait and swapped else ()
        of_weights = ("frozen weights", "trained weights") if self.cuts_weights else ()
        return (*of_weights, "optimizer", "snapshots")

    def _parts(self, training: Training, num_ranks: int) -> dict[str, float]:
        _, trained, block, width, copies, is_lora, *_ = training
        weights = num_ranks if self.cuts_weights else 1
        masters = num_ranks if self.cuts_masters else 1
        adapters = width * trained * copies if is_lora and not self.cuts_weights else 0.0
        found = {"frozen weights": width * training.frozen / weights}
        if self.autocasts:  # the module's own weights are the masters
            found["trained weights"] = FP32 * trained / weights
            buckets = 1 if num_ranks > 1 and not self.cuts_weights else 0
            found["gradients"] = FP32 * trained * (1 / weights + buckets)
            found["optimizer"] = 2 * FP32 * trained / masters
            adapters = 0.0  # which a snapshot shares memory with
        else:
            found["trained weights"] = width * trained / weights
            whole = 0 if self.cuts_gradients else width * trained
            found["gradients"] = whole + FP32 * trained / masters + width * min(trained, MOST)
            found["optimizer"] = 3 * FP32 * trained / masters
        found["snapshots"] = FP32 * trained * copies / masters + adapters
        gathered = {"": 0, "blocks": 2 * block, "layers": min(training.frozen + trained, LIVE)}
        found["gathered weights"] = width * gathered[self.gathers]
        return found


_CUT = {"cuts_masters": True, "cuts_gradients": True}
_ZERO3 = _CUT | {"cuts_weights": True, "autocasts": False, "gathers": "layers"}
KINDS = (  # the fastest first, where it fits
    Kind("single", alone=True),
    Kind("multi_gpu", alone=False),
    Kind("deepspeed_zero1", cuts_masters=True, autocasts=False),
    Kind("deepspeed_zero2", **_CUT, autocasts=False),
    Kind("fsdp2", **_CUT, cuts_weights=True, gathers="blocks"),
    Kind("deepspeed_zero3", **_ZERO3),
    Kind("deepspeed_zero2_offload", **_CUT, autocasts=False, offloads=True),
    Kind("deepspeed_zero3_offload", **_ZERO3, offloads=True),
)
