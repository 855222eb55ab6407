"""Who is drawn, in which segments, and which of their steps are stochastic and trained."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ml_collections
import numpy as np

from flow_grpo import randomness

NOISE = (-1, -1)  # a parent: the row starts from fresh noise


class Row(NamedTuple):
    """Whom a row belongs to; its random numbers depend on these alone."""

    group: int  # slot of the prompt in the epoch
    member: int
    branch: tuple[int, ...] = ()  # its number at each branching that lies before it


@dataclass(frozen=True)
class Segment:
    """The part of the schedule that each of B rows walks in one call."""

    grid: np.ndarray  # (B, L) int64, ascending indices of the sigmas; where one repeats a row waits
    stochastic: np.ndarray  # (B, L - 1) bool, as many in each row; these steps are kept
    parent: np.ndarray  # (B, 2) int64: a row of this rank's rollout and the index of its sigma

    def kept(self, offset: int) -> np.ndarray:
        """List the sigmas' indices before (offset 0) or after (1) the kept steps, (B, K)."""
        width = self.grid.shape[1] - 1
        values = self.grid[:, offset : offset + width][self.stochastic]
        return values.reshape(len(self.grid), -1)


class Call(NamedTuple):
    """One call of denoise(): B rows and their segment."""

    rows: list[Row]
    segment: Segment
    leaf: bool = True  # the rows end as images


StepsOf = Callable[[Iterable[int]], np.ndarray]  # groups -> their stochastic steps (len(groups), K)
Calls = Sequence[list[tuple[int, int]]]  # a rank's rows, (group, member), call by call


def whole(steps: np.ndarray, num_steps: int) -> Segment:
    """Walk from noise to the image. steps: (B, K), the stochastic ones."""
    grid = np.tile(np.arange(num_steps + 1), (len(steps), 1))
    return Segment(grid, _marked(grid, steps), np.full((len(steps), 2), NOISE))


def independent(calls: Calls, steps_of: StepsOf, num_steps: int) -> list[Call]:
    """Draw every row by itself, from noise to the image."""
    return [
        Call([Row(*row) for row in rows], whole(steps_of(g for g, _ in rows), num_steps))
        for rows in calls
    ]


def shared_prefix(calls: Calls, steps_of: StepsOf, num_steps: int) -> list[Call]:
    """Walk the deterministic steps before a group's first stochastic one once for all its rows.

    For groups of one initial noise. All rows of a call wait for the group that starts first.
    """
    groups = list(dict.fromkeys(group for rows in calls for group, _ in rows))
    starts = dict(zip(groups, steps_of(groups)[:, 0].tolist(), strict=True))
    prefixes = [group for group in groups if starts[group]]
    number = {group: n for n, group in enumerate(prefixes)}
    found = []
    for first in range(0, len(prefixes), len(calls[0])):
        part = prefixes[first : first + len(calls[0])]
        grid = _waiting([range(starts[group] + 1) for group in part])
        nothing = np.zeros((len(part), grid.shape[1] - 1), dtype=bool)
        parent = np.full((len(part), 2), NOISE)
        rows = [Row(group, 0) for group in part]
        found.append(Call(rows, Segment(grid, nothing, parent), leaf=False))
    for rows in calls:
        grid = _waiting([range(starts[group], num_steps + 1) for group, _ in rows])
        parent = [(number[g], starts[g]) if g in number else NOISE for g, _ in rows]
        marked = _marked(grid, steps_of(group for group, _ in rows))
        found.append(Call([Row(*row) for row in rows], Segment(grid, marked, np.array(parent))))
    return found


def branches(calls: Calls, steps_of: StepsOf, num_steps: int) -> list[Call]:
    """Let members branch off their group's trunk, which ends at its first stochastic step."""
    found = shared_prefix(calls, steps_of, num_steps)
    return [
        call._replace(rows=[Row(r.group, 0, (r.member,)) for r in call.rows]) if call.leaf else call
        for call in found
    ]


def states_to_save(calls: Sequence[Call]) -> list[set[int]]:
    """List the sigmas' indices at which each call's states are gone on from by later ones."""
    ends = np.cumsum([len(call.rows) for call in calls])
    save: list[set[int]] = [set() for _ in calls]
    for call in calls:
        for row, index in call.segment.parent.tolist():
            if row >= 0:
                save[int(np.searchsorted(ends, row, side="right"))].add(index)
    return save


def num_forwards(calls: Iterable[Call]) -> int:
    """Count the passes of one image through the model, without guidance."""
    return sum(len(call.rows) * (call.segment.grid.shape[1] - 1) for call in calls)


def _waiting(paths: list[range]) -> np.ndarray:
    """Make paths equally long: a short one waits at its start."""
    longest = max(map(len, paths))
    return np.array([[path[0]] * (longest - len(path)) + list(path) for path in paths])


def _marked(grid: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Mark the steps (B, K) on a grid (B, L), as (B, L - 1); a step that waits is none."""
    moves = grid[:, 1:] > grid[:, :-1]
    return moves & (grid[:, :-1, None] == steps[:, None, :]).any(-1)


def trained_steps(
    sample: ml_collections.ConfigDict, groups: Iterable[int], seed: int, epoch: int
) -> np.ndarray:
    """List the trained steps of each group, (len(groups), K) int64; step i starts at sigma i.

    groups: slots in the epoch. sde_steps: these. Otherwise sde_window_size 0: all but the last
    (arXiv:2505.05470); w: w consecutive ones, the first uniform in {first, ..., end - w} of
    sde_window_range, one draw per group (Flow-GRPO-Fast).
    """
    groups, num_steps, size = list(groups), sample.num_steps, sample.sde_window_size
    if sample.sde_steps or size == 0:
        steps = np.array(tuple(sample.sde_steps) or range(num_steps - 1), dtype=np.int64)
        return np.tile(steps, (len(groups), 1))
    first, end = sample.sde_window_range
    starts = [randomness.rng(seed, "window", epoch, g).randint(first, end - size) for g in groups]
    return np.array(starts, dtype=np.int64)[:, None] + np.arange(size)


def check(sample: ml_collections.ConfigDict) -> None:
    """Raise ValueError where settings, each within its range, are at odds or train the last step.

    That ends at sigma 0, where its std is so small that log-probs lose all precision.
    """
    fixed, span = tuple(sample.sde_steps), tuple(sample.sde_window_range)
    size, last = sample.sde_window_size, sample.num_steps - 1
    if fixed and size:
        raise ValueError(
            f"config.sample.sde_steps={fixed} and config.sample.sde_window_size={size}: only one "
            "that chooses the trained steps is needed. Set config.sample.sde_window_size to 0 or "
            "config.sample.sde_steps to ()."
        )
    if list(fixed) != sorted(set(fixed)) or (fixed and fixed[-1] >= last):
        raise ValueError(
            f"config.sample.sde_steps={fixed}: distinct, ascending steps from 0 to {last - 1} are "
            f"needed, as config.sample.num_steps={last + 1} and the last step is never trained. "
            "Change config.sample.sde_steps, or raise config.sample.num_steps."
        )
    if size and not (len(span) == 2 and span[0] + size <= span[1] <= last):
        raise ValueError(
            f"config.sample.sde_window_size={size} and config.sample.sde_window_range={span} with "
            f"config.sample.num_steps={last + 1}: (first, end) with first + size <= end <= {last} "
            "is needed, as the last step is never trained. Set config.sample.sde_window_range, for "
            f"example to (0, {min(last, max(size, (last + 1) // 2))}), or shrink "
            "config.sample.sde_window_size."
        )
