"""Random numbers as functions of what is drawn, never of a rank, a batch or a call order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index

import torch
from torch import Tensor


def integer_seed(seed: int, purpose: str, *coordinates: int) -> int:
    """Hash a draw's name to an integer in [0, 2**63), the range of torch.Generator.manual_seed.

    purpose: what is drawn ("init", "step" ...). coordinates: those of epoch, inner epoch, group,
    member and step that it depends on, in this order; integers, or a TypeError.
    """
    # No digit, sign or comma is a "|", so equal messages have equal arguments.
    numbers = ",".join(f"{index(number):d}" for number in (seed, *coordinates))
    digest = blake2b(f"{numbers}|{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(seed: int, purpose: str, *coordinates: int) -> random.Random:
    """Start the random generator of one draw; arguments as in integer_seed."""
    return random.Random(integer_seed(seed, purpose, *coordinates))


@dataclass(frozen=True)
class Randomness:
    """Random numbers of rows, each a function of (seed, purpose, coordinates) alone.

    coordinates: those that all rows share, such as (epoch,). Drawn on the CPU: machines agree.
    """

    seed: int
    coordinates: tuple[int, ...]

    def normal(
        self, purpose: str, rows: Sequence[tuple[int, ...]], shape: tuple[int, ...]
    ) -> Tensor:
        """Return standard normal noise (len(rows), *shape), fp32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=self._at(purpose, row)) for row in rows])

    def uniform(self, purpose: str, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return (len(rows),) numbers in [0, 1), fp32 on the CPU."""
        return torch.cat([torch.rand(1, generator=self._at(purpose, row)) for row in rows])

    def _at(self, purpose: str, row: tuple[int, ...]) -> torch.Generator:
        seed = integer_seed(self.seed, purpose, *self.coordinates, *row)
        return torch.Generator().manual_seed(seed)
