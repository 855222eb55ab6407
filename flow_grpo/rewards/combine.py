"""Several rewards as one: loaded once, scored in the background, added up by weight."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NoReturn
from weakref import WeakSet

import ml_collections
import numpy as np

from flow_grpo.cli import redacted
from flow_grpo.rewards import loading
from flow_grpo.rewards.base import ENDS, OURS, Reward
from flow_grpo.rewards.batch import Batch, scatter
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.remote import health, servers
from flow_grpo.rewards.remote.servers import Servers, SomeFailed

CLOSE_S = 10.0  # for the calls that are being made when a run ends


class Scorer:
    """The rewards of a run, each with a thread of its own; their weighted sum is "avg".

    A row that lacks a reward of non-zero weight is NaN there. held_out: names scored where asked
    for. masks: a reward that fails gives NaN and a warning. group_size: for rewards that compare;
    comparing: those that only their server knows.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        settings: Mapping[str, Any],
        device: str = "cpu",
        *,
        where: Servers = Servers(),  # noqa: B008 - it is frozen
        held_out: Collection[str] = (),
        masks: bool = False,
        group_size: int = 0,
        comparing: Collection[str] = (),
    ):
        self.weights, self._masks, self.group_size = dict(weights), masks, group_size
        self.last_masked = ""  # what the last failure that was masked said
        names = (*self.weights, *held_out)
        found = (n for n in names if not where.alone_knows(n) and loading.find(n).needs_groups)
        self.comparing = {*comparing, *found}
        self._scorers = {
            name: _remote(name, where)
            if name in where.urls
            else loading.load(name, settings, device)
            for name in names
        }
        self._threads = {name: ThreadPoolExecutor(1, f"reward-{name}") for name in names}
        self._calls: WeakSet[Future] = WeakSet()

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, device: str) -> Scorer:
        where = servers.of(config)
        return cls(
            config.reward_fn,
            loading.settings(config),
            device,
            where=where,
            held_out=[name for name in config.eval_reward_fn if name not in config.reward_fn],
            masks=config.on_reward_error == "mask",
            group_size=config.sample.num_image_per_prompt,
            comparing=health.check(where, [name for name in where.urls if where.alone_knows(name)]),
        )

    def start(self, held_out: bool = False) -> Scoring:
        return Scoring(self, self._scorers if held_out else self.weights)

    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        """Score now, in this thread. Raises RuntimeError naming the reward that failed."""
        return self.combine({name: self._call(name, batch) for name in self.weights}, len(batch))

    def combine(
        self, columns: Mapping[str, dict[str, np.ndarray]], num_rows: int
    ) -> dict[str, np.ndarray]:
        """Add "avg" to all columns. Raises RuntimeError for one not the reward's to give."""
        scores = {key: each for part in columns.values() for key, each in part.items()}
        scores |= {name: part[name] for name, part in columns.items() if name in part}
        owners = {name: name for name in ("avg", *REWARDS, *columns)}
        for name, part in columns.items():
            for key, values in part.items():
                owner = owners.setdefault(key, name)
                related = {owner, name} <= set(REWARDS) and key.startswith(f"{name}_")
                if owner != name and not (related and _agree(values, scores[key])):
                    _refuse(name, key, f"that of {owner!r}")
                stem = next((key.removesuffix(end) for end in ENDS if key.endswith(end)), "")
                if key in OURS or "/" in key or stem in (*scores, "avg"):
                    _refuse(name, key, "a name of the run's own figures")
                if not key.isprintable() or len(key) > 200:
                    _refuse(name, key, "no single line of at most 200 characters")
        total = np.zeros(num_rows)
        for name, weight in self.weights.items():
            if weight:
                total = total + weight * columns[name][name]
        return scores | {"avg": total}

    def close(self) -> None:
        """End the rewards, drop what is queued, wait at most CLOSE_S for calls under way."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        for scorer in self._scorers.values():
            if isinstance(scorer, Reward):
                scorer.close()
        wait([call for call in self._calls if not call.cancelled()], CLOSE_S)

    def hand_over(self, name: str, batch: Batch) -> Future:
        call = self._threads[name].submit(self._call, name, batch)
        self._calls.add(call)
        return call

    def _call(self, name: str, batch: Batch) -> dict[str, np.ndarray]:
        """Score with one reward; where failures are masked, its rows are NaN."""
        try:
            return self._score(name, batch)
        except RuntimeError as error:
            if not self._masks:
                raise
            self.last_masked = str(error)
            logging.getLogger(__name__).warning("%s: its rows are masked", error)
            if isinstance(error.__cause__, SomeFailed):
                return error.__cause__.scores
            return {name: np.full(len(batch), np.nan)}

    def _score(self, name: str, batch: Batch) -> dict[str, np.ndarray]:
        try:
            scores = self._scorers[name](batch)
            scores = {key: np.asarray(value, dtype=np.float64) for key, value in scores.items()}
        except Exception as error:
            raise RuntimeError(redacted(f"reward {name!r} failed: {error}")) from error
        wrong = any(value.shape != (len(batch),) for value in scores.values())
        wrong |= not all(isinstance(key, str) for key in scores)
        if name not in scores or wrong or any(np.isinf(value).any() for value in scores.values()):
            raise RuntimeError(
                f"reward {name!r} must return {name!r}: ({len(batch)},) without infinities; "
                f"it returned {[(key, value.shape) for key, value in scores.items()]}."
            )
        return scores


class Scoring:
    """Rows on their way through rewards: add() call by call, then wait for result().

    A reward that compares gets groups once they are whole; those that a batch completes, at once.
    """

    def __init__(self, scorer: Scorer, names: Collection[str]):
        self._scorer, self._num_rows = scorer, 0
        self._comparing = scorer.comparing & set(names)
        assert scorer.group_size or not self._comparing, self._comparing
        self._waiting: dict[int, list[tuple[int, Batch]]] = {}  # by group: number and row
        # Of each reward: the numbers of a call's rows, and their scores.
        self._calls: dict[str, list[tuple[list[int], Future]]] = {name: [] for name in names}

    def add(self, batch: Batch) -> None:
        """Take in the rows of a sampling call; returns at once."""
        rows = list(range(self._num_rows, self._num_rows + len(batch)))
        self._num_rows += len(batch)
        whole = rows, batch
        if self._comparing and batch.group is not None:
            whole = self._complete(rows, batch)
        for name, calls in self._calls.items():
            numbers, part = whole if name in self._comparing else (rows, batch)
            if numbers:
                calls.append((numbers, self._scorer.hand_over(name, part)))

    def result(self, patience_s: float | None = None) -> dict[str, np.ndarray]:
        """Wait for the scores of all rows, (N,) float64 each, in the order of add().

        patience_s: for each call, None: endless. Raises RuntimeError naming the reward that failed.
        """
        assert not self._waiting, f"groups {sorted(self._waiting)} are not whole"
        columns = {}
        for name, calls in self._calls.items():
            try:
                scores = [(numbers, call.result(patience_s)) for numbers, call in calls]
            except FutureTimeout:
                raise RuntimeError(
                    f"reward {name!r} gave no scores for a call in {patience_s:g} s"
                ) from None
            columns[name] = scatter(scores, self._num_rows)
        return self._scorer.combine(columns, self._num_rows)

    def _complete(self, numbers: list[int], batch: Batch) -> tuple[list[int], Batch]:
        """Take rows in and give out those of the groups that are whole now."""
        whole: list[tuple[int, Batch]] = []
        for row, group in enumerate(batch.group.tolist()):
            members = self._waiting.setdefault(group, [])
            members.append((numbers[row], batch.rows([row])))
            if len(members) == self._scorer.group_size:
                whole += self._waiting.pop(group)
        return [number for number, _ in whole], Batch.cat([row for _, row in whole])


def _agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Tell whether two rewards gave the rows that both could score the same."""
    return bool((np.isnan(ours) | np.isnan(theirs) | (ours == theirs)).all())


def _refuse(name: str, key: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"reward {name!r} returned a column {key[:80]!r}, which is {what}. Rename it in what the "
        f"function returns."
    )


def _remote(name: str, where: Servers) -> Reward:
    from flow_grpo.rewards.remote.client import RemoteReward  # httpx is an extra

    return RemoteReward(name, where)
