"""What the engines have in common whose ranks each step a part of the weights of their own."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flow_grpo.parallel.engine import Engine, Parts

BUCKET = 2**26  # elements that full() joins at a time


class Sharded(Engine):
    """Each rank holds, of each weight's elements in their order, those of one range, or none."""

    def _take(self, module: nn.Module) -> None:
        """Remember what trains, before its weights are cut."""
        self.module, self.num_parts = module, self.ranks.num_ranks
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._shapes = {name: param.shape for name, param in self._trained.items()}

    @abstractmethod
    def _held(self, name: str) -> tuple[int, int]:
        """Return the range of a weight's elements that this rank holds."""

    @abstractmethod
    def _lies(self, name: str) -> tuple[str, int]:
        """Return in which stepped tensor these lie, and from which element on."""

    @abstractmethod
    def _master(self, name: str) -> Tensor:
        """Return the elements that this rank holds, in fp32 and one row, as the optimizer does."""

    def masters(self) -> Parts:
        held = {name: self._held(name) for name in self._trained}
        return {name: self._master(name) for name, (start, stop) in held.items() if stop > start}

    @torch.no_grad()
    def put(self, parts: Parts) -> None:
        for name, master in self.masters().items():
            master.copy_(parts[name])

    def full(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        for names in self._buckets():
            sizes = [self._shapes[name].numel() for name in names]
            row = torch.zeros(sum(sizes), device=self.ranks.device)
            values = dict(zip(names, row.split(sizes), strict=True))
            for name in values.keys() & parts.keys():
                values[name][slice(*self._held(name))] = parts[name].to(row.device)
            for name, value in zip(names, self.ranks.total(row).split(sizes), strict=True):
                yield name, value.view(self._shapes[name])

    def _buckets(self) -> Iterator[list[str]]:
        """Cut the weights' names into runs of about BUCKET elements."""
        names, size = [], 0
        for name, shape in self._shapes.items():
            if names and size + shape.numel() > BUCKET:
                yield names
                names, size = [], 0
            names.append(name)
            size += shape.numel()
        yield names

    def _layout(self) -> dict[str, dict]:
        found = {}
        for name, shape in self._shapes.items():
            start, stop = self._held(name)
            lies = list(self._lies(name)) if stop > start else None
            held = {"held": [start, stop], "row": True, "in": lies}
            found[name] = {"shape": list(shape)} | held
        return found
