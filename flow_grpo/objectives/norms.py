"""How long velocities are, and how far apart."""

from torch import Tensor

from flow_grpo.objectives.base import Statistic

NORM_RATIO = {
    "norm_ratio": Statistic("Norm ratio − 1", "of the velocity to the reference's", origin=1.0)
}


def squared(values: Tensor) -> Tensor:
    """Return the mean square of each row, (B,)."""
    return (values**2).flatten(1).mean(1)


def rms(values: Tensor) -> Tensor:
    """Return the root mean square of each row, (B,): its norm, whatever its size."""
    return squared(values).sqrt()


def norm_ratio(velocity: Tensor, reference: Tensor) -> Tensor:
    """Return |velocity| / |reference| of each row, (B,), without a gradient.

    RL makes it grow by 5 to 15 % (arXiv:2606.27771).
    """
    return rms(velocity.detach()) / rms(reference)
