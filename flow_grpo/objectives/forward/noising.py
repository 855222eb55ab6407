"""Final latents noised anew: at which levels, by which noise, shared by whom."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flow_grpo.randomness import Randomness
from flow_grpo.records import Point, Rollout
from flow_grpo.sampling import Schedule
from flow_grpo.sde import per_row


@dataclass(frozen=True)
class Noising:
    """How each final latent x0 is noised, to (1 - sigma) x0 + sigma x1.

    num_drawn: levels of the rollout's grid that each row draws, with replacement. steps: these
    instead, for all rows. density: of a drawn step i in the grid's N, "uniform" or "logit_normal",
    i = N / (1 + exp(-normal)) (arXiv:2403.03206). shared: a group's rows have one noise and level.
    """

    num_drawn: int
    steps: tuple[int, ...] = ()
    density: str = "uniform"
    shared: bool = False

    def __len__(self) -> int:
        return len(self.steps) or self.num_drawn

    def points(self, rows: Rollout, schedule: Schedule, randomness: Randomness) -> list[Point]:
        device, found = rows.final.device, []
        for k in range(len(self)):
            if self.shared:
                names = [(row.group, k) for row in rows.batch.owners]
            else:
                names = [(row.group, row.member, k, *row.branch) for row in rows.batch.owners]
            if self.steps:
                steps = torch.full((len(names),), self.steps[k])
            else:
                steps = (self._places(randomness, names) * schedule.num_steps).long()
            steps = steps.to(device)
            sigma, purpose = schedule.sigmas[steps], "noising of a group" * self.shared or "noising"
            noise = randomness.normal(purpose, names, rows.final.shape[1:]).to(device)
            wide = per_row(sigma, noise)
            latents = (1 - wide) * rows.final + wide * noise
            found.append(Point(latents, sigma, step=steps, column=k, noise=noise))
        return found

    def _places(self, randomness: Randomness, names: list[tuple[int, ...]]) -> Tensor:
        """Draw where in the grid, in [0, 1), each row is noised."""
        purpose = "time of a group" if self.shared else "time"
        if self.density == "uniform":
            return randomness.uniform(purpose, names)
        return randomness.normal(purpose, names, ()).sigmoid().clamp(max=1 - 2**-24)


def error(velocity: Tensor, rows: Rollout, point: Point) -> Tensor:
    """Return mean((velocity - (x1 - x0))^2) of each row, (B,)."""
    return ((velocity - (point.noise - rows.final)) ** 2).flatten(1).mean(1)
