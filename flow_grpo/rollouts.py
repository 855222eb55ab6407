"""Which steps of a rollout are stochastic and trained; all others are ODE steps."""

from collections.abc import Iterable

import numpy as np

from flow_grpo import randomness


def trained_steps(
    num_steps: int,
    groups: Iterable[int],
    *,
    size: int,
    span: tuple[int, int],
    fixed: tuple[int, ...],
    seed: int,
    epoch: int,
) -> np.ndarray:
    """List the trained steps of each group; step i goes from sigma i to sigma i + 1.

    groups: slots in the epoch. fixed: these steps for all. Otherwise size 0: every step but the
    last (Flow-GRPO, arXiv:2505.05470); size w: w consecutive steps, the first of them uniform in
    {span[0], ..., span[1] - w}, one draw per group (Flow-GRPO-Fast).
    Returns (len(groups), K) int64, ascending along K. K does not depend on the group.
    """
    groups = list(groups)
    if fixed or size == 0:
        steps = np.array(fixed or range(num_steps - 1), dtype=np.int64)
        return np.tile(steps, (len(groups), 1))
    first, end = span
    starts = [randomness.rng(seed, "window", epoch, g).randint(first, end - size) for g in groups]
    return np.array(starts, dtype=np.int64)[:, None] + np.arange(size)


def check(num_steps: int, size: int, span: tuple[int, int], fixed: tuple[int, ...]) -> None:
    """Refuse settings that leave no step to train, or that would train the last one.

    The last step ends at sigma 0, where its std is so small that log-probs lose all precision.
    Raises ValueError, naming the keys, the values and the remedy.
    """
    if num_steps < 2:
        raise ValueError(
            f"config.sample.num_steps is {num_steps}; at least 2 are needed, as the last step is "
            "never trained. Raise config.sample.num_steps."
        )
    if fixed:
        _check_fixed(num_steps, size, tuple(fixed))
    elif size != 0:
        _check_span(num_steps, size, tuple(span))


def _check_fixed(num_steps: int, size: int, fixed: tuple[int, ...]) -> None:
    if size:
        raise ValueError(
            f"config.sample.sde_steps is {fixed} and config.sample.sde_window_size is {size}; "
            "needed: only one that chooses the trained steps. Set config.sample.sde_window_size "
            "to 0 or config.sample.sde_steps to ()."
        )
    if list(fixed) != sorted(set(fixed)) or fixed[0] < 0 or fixed[-1] > num_steps - 2:
        raise ValueError(
            f"config.sample.sde_steps is {fixed}; needed: distinct, ascending steps from 0 to "
            f"{num_steps - 2}, as config.sample.num_steps is {num_steps} and the last step is "
            "never trained. Change config.sample.sde_steps, or raise config.sample.num_steps."
        )


def _check_span(num_steps: int, size: int, span: tuple[int, ...]) -> None:
    found = f"config.sample.sde_window_size is {size}, config.sample.sde_window_range is {span}"
    if size < 0 or len(span) != 2 or not all(isinstance(step, int) for step in span):
        raise ValueError(
            f"{found}; a size of at least 0 and a range (first, end) are needed. Set "
            "config.sample.sde_window_size to 0 to train every step but the last."
        )
    first, end = span
    if not (0 <= first and first + size <= end <= num_steps - 1):
        raise ValueError(
            f"{found} and config.sample.num_steps is {num_steps}; needed: 0 <= first and "
            f"first + size <= end <= {num_steps - 1}, as the last step is never trained. Set "
            "config.sample.sde_window_range, for example to "
            f"(0, {min(num_steps - 1, max(size, num_steps // 2))}), or shrink "
            "config.sample.sde_window_size."
        )


def progressive_start(
    iteration: int,
    *,
    num_steps: int,
    size: int,
    stride: int,
    iterations_per_position: int,
    offset: int = 0,
    roll_back: bool = True,
) -> int:
    """Give the first trained step of a window that slides towards the image.

    After the last position the window returns to the offset, or stays there without roll_back.
    Source: MixGRPO (arXiv:2507.21802).
    """
    num_positions = (num_steps - 1 - size - offset) // stride + 1
    assert num_positions > 0, f"no window of {size} fits into {num_steps} steps from {offset}"
    position = iteration // iterations_per_position
    position = position % num_positions if roll_back else min(position, num_positions - 1)
    return offset + position * stride
