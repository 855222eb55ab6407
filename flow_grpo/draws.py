"""Seeds for random draws: a function of what is drawn, never of a rank, a batch or a call order."""

import random
from hashlib import blake2b
from operator import index


def integer_seed(seed: int, purpose: str, *coordinates: int) -> int:
    """Hash a draw's name to an integer in [0, 2**63), the range of torch.Generator.manual_seed.

    seed: the run's. purpose: what is drawn ("init", "step", "window" ...).
    coordinates: those of epoch, inner epoch, group, member and step that the draw depends on, in
    this order; group is the slot in the epoch. Raises TypeError if one is not an integer.
    """
    # No digit, sign or comma is a "|", so equal messages have equal arguments.
    numbers = ",".join(f"{index(number):d}" for number in (seed, *coordinates))
    digest = blake2b(f"{numbers}|{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(seed: int, purpose: str, *coordinates: int) -> random.Random:
    """Start the random generator of one draw; arguments as in integer_seed."""
    return random.Random(integer_seed(seed, purpose, *coordinates))
