"""Who is drawn, in which segments: alone, after a shared prefix, or as branches of a path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

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

    def behind(self, num_rows: int) -> Call:
        """Return it with its parents' numbers as they are behind so many rows."""
        parent = self.segment.parent.copy()
        parent[parent[:, 0] >= 0, 0] += num_rows
        return self._replace(segment=replace(self.segment, parent=parent))


StepsOf = Callable[[Iterable[int]], np.ndarray]  # groups -> their stochastic steps (len(groups), K)
Calls = Sequence[list[tuple[int, int]]]  # a rank's rows, (group, member), call by call


def whole(steps: np.ndarray, num_steps: int) -> Segment:
    """Walk from noise to the image. steps: (B, K), the stochastic ones."""
    grid = np.tile(np.arange(num_steps + 1), (len(steps), 1))
    return Segment(grid, _marked(grid, steps), np.full((len(steps), 2), NOISE))


def independent(calls: Calls, steps_of: StepsOf, num_steps: int, group_size: int = 0) -> list[Call]:
    """Draw every row by itself, from noise to the image."""
    return [
        Call([Row(*row) for row in rows], whole(steps_of(g for g, _ in rows), num_steps))
        for rows in calls
    ]


def shared_prefix(
    calls: Calls, steps_of: StepsOf, num_steps: int, group_size: int = 0
) -> list[Call]:
    """Walk the deterministic steps before a group's first stochastic one once for all its rows.

    For groups of one initial noise. All rows of a call wait for the group that starts first.
    """
    groups = _groups(calls)
    steps = dict(zip(groups, steps_of(groups), strict=True))
    found, trunk = _trunks({group: int(steps[group][0]) for group in groups}, calls)
    for rows in calls:
        starts = [int(steps[group][0]) for group, _ in rows]
        grid = _waiting([range(start, num_steps + 1) for start in starts])
        parent = [(trunk[g], i) if i else NOISE for (g, _), i in zip(rows, starts, strict=True)]
        marked = _marked(grid, np.array([steps[group] for group, _ in rows]))
        found.append(Call([Row(*row) for row in rows], Segment(grid, marked, np.array(parent))))
    return found


def branches(calls: Calls, steps_of: StepsOf, num_steps: int, group_size: int = 0) -> list[Call]:
    """Let members branch off their group's trunk, which ends at its first stochastic step."""
    found = shared_prefix(calls, steps_of, num_steps)
    return [
        call._replace(rows=[Row(r.group, 0, (r.member,)) for r in call.rows]) if call.leaf else call
        for call in found
    ]


def per_step(calls: Calls, steps_of: StepsOf, num_steps: int, group_size: int) -> list[Call]:
    """Let members branch off their trunk at a step each (TempFlow-GRPO, arXiv:2508.04324).

    Each of a group's K steps has group_size / K members, for which it alone is stochastic: what
    they score is that step's doing.
    """
    chosen = {row: _own_step(row, steps_of, group_size) for rows in calls for row in rows}
    found, trunk = _trunks(_last(chosen), calls)
    for rows in calls:
        starts = [chosen[row] for row in rows]
        grid = _waiting([range(start, num_steps + 1) for start in starts])
        parent = [(trunk[g], i) if i else NOISE for (g, _), i in zip(rows, starts, strict=True)]
        segment = Segment(grid, _marked(grid, np.array(starts)[:, None]), np.array(parent))
        found.append(Call([Row(group, 0, (member,)) for group, member in rows], segment))
    return found


def strides(calls: Calls, steps_of: StepsOf, num_steps: int, group_size: int) -> list[Call]:
    """Score a step by two images, walked on to by strides of 1 and 2 (G2RPO, arXiv:2510.01982).

    Members 2j and 2j + 1 are the two images of the j-th branch, at the step that per_step() gives
    2j. Whole groups are needed on a rank.
    """
    pairs = sorted({(group, member // 2) for rows in calls for group, member in rows})
    chosen = {pair: _own_step((pair[0], 2 * pair[1]), steps_of, group_size) for pair in pairs}
    found, trunk = _trunks(_last(chosen), calls)
    number = {pair: sum(len(call.rows) for call in found) + n for n, pair in enumerate(pairs)}
    for part in _cut(pairs, calls):
        starts = np.array([chosen[pair] for pair in part])
        parent = [(trunk[g], i) if i else NOISE for (g, _), i in zip(part, starts, strict=True)]
        grid = np.stack([starts, starts + 1], axis=1)
        segment = Segment(grid, np.ones((len(part), 1), dtype=bool), np.array(parent))
        found.append(Call([Row(g, 0, (j,)) for g, j in part], segment, leaf=False))
    for rows in calls:
        paths, parent = [], []
        for group, member in rows:
            start = chosen[group, member // 2] + 1
            paths.append([*range(start, num_steps, 1 + member % 2), num_steps])
            parent.append((number[group, member // 2], start))
        grid = _waiting(paths)
        nothing = np.zeros((len(rows), grid.shape[1] - 1), dtype=bool)
        owners = [Row(group, 0, (member // 2, member % 2)) for group, member in rows]
        found.append(Call(owners, Segment(grid, nothing, np.array(parent))))
    return found


def tree(calls: Calls, steps_of: StepsOf, num_steps: int, group_size: int) -> list[Call]:
    """Split each path at each of the group's K steps (BranchGRPO, arXiv:2509.06040).

    Into as many as make group_size images. Every node's step is stochastic and trains. Whole
    groups are needed on a rank.
    """
    groups = _groups(calls)
    steps = dict(zip(groups, steps_of(groups), strict=True))
    depth = len(steps[groups[0]])
    width = tree_width(group_size, depth)
    assert width, f"{group_size} is no power of {depth}"
    found, above = _trunks({group: int(steps[group][0]) for group in groups}, calls)
    number = {(group, ()): n for group, n in above.items()}
    for level in range(depth):
        last, share = level == depth - 1, width ** (depth - 1 - level)
        if last:
            parts = calls
        else:
            parts = _cut(
                [(g, m * share) for g in groups for m in range(width ** (level + 1))], calls
            )
        for part in parts:
            rows, paths, parent = [], [], []
            for group, member in part:
                branch = tuple(member // width**n % width for n in range(depth - 1, -1, -1))
                branch, start = branch[: level + 1], int(steps[group][level])
                end = num_steps if last else int(steps[group][level + 1])
                rows.append(Row(group, 0, branch))
                paths.append(range(start, end + 1))
                parent.append((number[group, branch[:-1]], start) if start else NOISE)
            grid = _waiting(paths)
            marked = _marked(grid, np.array([[steps[row.group][level]] for row in rows]))
            first = sum(len(call.rows) for call in found)
            number |= {(row.group, row.branch): first + n for n, row in enumerate(rows)}
            found.append(Call(rows, Segment(grid, marked, np.array(parent)), leaf=last))
    return found


BRANCHINGS: dict[str, Callable[[Calls, StepsOf, int, int], list[Call]]] = {
    "none": independent,
    "shared_prefix": shared_prefix,
    "trunk": branches,
    "per_step": per_step,
    "strides": strides,
    "tree": tree,
}


def tree_width(group_size: int, depth: int) -> int:
    """Return of how many branches each split must be; 0: no number gives group_size leaves."""
    return next((w for w in range(2, group_size + 1) if w**depth == group_size), 0)


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


def _groups(calls: Calls) -> list[int]:
    return list(dict.fromkeys(group for rows in calls for group, _ in rows))


def _own_step(row: tuple[int, int], steps_of: StepsOf, group_size: int) -> int:
    """Return the step of which a member is a branch: the first ones have the first step."""
    group, member = row
    steps = steps_of([group])[0]
    return int(steps[member * len(steps) // group_size])


def _last(chosen: dict[tuple[int, int], int]) -> dict[int, int]:
    """Return each group's last step, at which its trunk may end."""
    ends: dict[int, int] = {}
    for (group, _), step in chosen.items():
        ends[group] = max(step, ends.get(group, 0))
    return ends


def _cut(rows: list[tuple[int, int]], calls: Calls) -> Calls:
    """Cut rows into calls as large as these."""
    size = len(calls[0])
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _trunks(ends: dict[int, int], calls: Calls) -> tuple[list[Call], dict[int, int]]:
    """Walk each group's path from noise to its end, without noise on the way.

    Returns these calls, and the number of each group's row.
    """
    groups = [group for group, end in ends.items() if end]
    found = []
    for part in _cut([(group, 0) for group in groups], calls):
        grid = _waiting([range(ends[group] + 1) for group, _ in part])
        nothing = np.zeros((len(part), grid.shape[1] - 1), dtype=bool)
        parent = np.full((len(part), 2), NOISE)
        rows = [Row(group, 0) for group, _ in part]
        found.append(Call(rows, Segment(grid, nothing, parent), leaf=False))
    return found, {group: n for n, group in enumerate(groups)}


def _waiting(paths: Sequence[Sequence[int]]) -> np.ndarray:
    """Make paths equally long: a short one waits at its start."""
    longest = max(map(len, paths))
    return np.array([[path[0]] * (longest - len(path)) + list(path) for path in paths])


def _marked(grid: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Mark the steps (B, K) on a grid (B, L), as (B, L - 1); a step that waits is none."""
    moves = grid[:, 1:] > grid[:, :-1]
    return moves & (grid[:, :-1, None] == steps[:, None, :]).any(-1)
