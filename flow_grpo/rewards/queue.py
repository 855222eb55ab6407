"""The way of rows from sampling to a reward: they wait for their group, if it compares."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from flow_grpo.rewards.batch import Batch, scatter


class Lane:
    """The rows of one scoring on their way through one reward.

    hand_over: starts a call. group_size: 0: each batch is handed over as it comes; otherwise rows
    wait until their group has so many, however many batches that takes. Groups that a batch
    completes share a call.
    """

    def __init__(self, hand_over: Callable[[Batch], Future], group_size: int = 0):
        self._hand_over, self._group_size = hand_over, group_size
        self._waiting: dict[int, list[tuple[int, Batch]]] = {}  # by group: number and row
        self._calls: list[tuple[list[int], Future]] = []  # the numbers of its rows, their scores

    def add(self, batch: Batch, first: int) -> None:
        """Take rows in. first: the number of the first one."""
        numbers = list(range(first, first + len(batch)))
        if self._group_size and batch.group is not None:
            whole = self._complete(batch, first)
            if not whole:
                return
            numbers = [number for number, _ in whole]
            batch = Batch.cat([row for _, row in whole])
        self._calls.append((numbers, self._hand_over(batch)))

    def result(self, num_rows: int, patience_s: float | None) -> dict[str, np.ndarray]:
        """Wait for the scores of all rows, each (num_rows,), NaN where a call lacks a column.

        patience_s: for each call. Raises TimeoutError, or what a call raised.
        """
        assert not self._waiting, f"groups {sorted(self._waiting)} are not whole"
        return scatter(
            ((numbers, call.result(patience_s)) for numbers, call in self._calls), num_rows
        )

    def _complete(self, batch: Batch, first: int) -> list[tuple[int, Batch]]:
        """Take rows in and give out those of the groups that are whole now."""
        whole = []
        for row, group in enumerate(batch.group.tolist()):
            members = self._waiting.setdefault(group, [])
            members.append((first + row, batch.rows([row])))
            if len(members) == self._group_size:
                whole += self._waiting.pop(group)
        return whole
