"""Final latents noised anew: at which levels, by which noise, shared by whom."""

from dataclasses import dataclass

import ml_collections
import torch
from torch import Tensor

from flow_grpo.keys import Key
from flow_grpo.objectives.norms import squared
from flow_grpo.randomness import Randomness
from flow_grpo.records import Point, Rollout
from flow_grpo.sampling import Schedule
from flow_grpo.sde import per_row

GRID = ("uniform", "logit_normal")  # densities of a step of the rollout's grid
KEYS = {  # beside num_times and steps, of any loss; all take the same draws
    "forward.levels": Key(
        "uniform",
        "of a noising: steps of the rollout's grid, drawn with replacement (uniform, logit_normal) "
        "or without (distinct); or sigmas, one in each of num_times equal intervals (stratified)",
        choices=(*GRID, "distinct", "stratified"),
    ),
    "forward.shift": Key(
        1.0, "above 1: more noise; sigma = shift s / (1 + (shift - 1) s)", above=0, most=100
    ),
    "forward.levels_of": Key(
        "image", "who has a level in common", choices=("image", "group", "all")
    ),
    "forward.noise_of": Key("image", "who has a noise in common", choices=("image", "group")),
    "forward.antithetic": Key(False, "each noising twice, the second time by minus its noise"),
}
PURPOSE = {"image": "", "group": " of a group", "all": " of all"}


def counted(section: str, num_times: int = 4, what: str = "image") -> dict[str, Key]:
    """Declare how many noisings each has, or at which steps."""
    return {
        f"{section}.num_times": Key(
            num_times, f"noise levels drawn for each {what}", least=1, most=1000
        ),
        f"{section}.steps": Key(
            (), f"instead: the levels of these steps, for every {what}", of=int, least=0, most=1000
        ),
    }


def drawn(section: str, what: str) -> dict[str, Key]:
    """Declare how many noisings are drawn for each of what, and by which density."""
    return counted(section, 1, what) | {
        f"{section}.density": Key("logit_normal", "of the noise levels", choices=GRID),
    }


@dataclass(frozen=True)
class Noising:
    """How each final latent x0 is noised, to (1 - sigma) x0 + sigma x1.

    num_drawn: levels that each row draws; levels, shift, levels_of, noise_of, antithetic: see KEYS.
    A place in the grid's N steps is i = N u, u uniform or 1 / (1 + exp(-normal))
    (arXiv:2403.03206). steps: these instead, for all rows.
    """

    num_drawn: int
    steps: tuple[int, ...] = ()
    levels: str = "uniform"
    shift: float = 1.0
    levels_of: str = "image"
    noise_of: str = "image"
    antithetic: bool = False

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, section: str) -> "Noising":
        """Read KEYS and, of a section, what counted() declares."""
        counts, names = config[section], (key.removeprefix("forward.") for key in KEYS)
        how = {name: config.forward[name] for name in names}
        return cls(counts.num_times, tuple(counts.steps), **how)

    def __len__(self) -> int:
        return (len(self.steps) or self.num_drawn) * (1 + self.antithetic)

    def points(self, rows: Rollout, schedule: Schedule, randomness: Randomness) -> list[Point]:
        device, found = rows.final.device, []
        for column in range(len(self)):
            k, minus = divmod(column, 2) if self.antithetic else (column, 0)
            sigma, steps = self._level(k, rows, schedule, randomness)
            purpose, names = f"noising{PURPOSE[self.noise_of]}", _names(rows, self.noise_of, k)
            noise = randomness.normal(purpose, names, rows.final.shape[1:]).to(device)
            noise = -noise if minus else noise
            wide = per_row(sigma, noise)
            latents = (1 - wide) * rows.final + wide * noise
            found.append(Point(latents, sigma, step=steps, column=column, noise=noise))
        return found

    def _level(
        self, k: int, rows: Rollout, schedule: Schedule, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        """Return sigma and the step of the grid at or below which it lies, (B,) each."""
        num_steps, sigmas = schedule.num_steps, schedule.at(rows.batch.size).sigmas
        if self.steps:
            steps = torch.full((len(rows),), self.steps[k])
        elif self.levels == "distinct":
            each = [self._uniform(i, rows, randomness) for i in range(num_steps)]
            steps = torch.stack(each, dim=1).argsort(dim=1)[:, k]
        elif self.levels == "stratified":
            place = (k + self._uniform(k, rows, randomness)) / self.num_drawn
            sigma = (1 - self._shifted(place)).clamp(min=2**-24).to(sigmas)
            return sigma, (sigmas[:-1] >= sigma[:, None]).sum(1).sub(1).clamp(min=0)
        else:
            place = self._uniform(k, rows, randomness)
            steps = (self._shifted(place) * num_steps).long().clamp(max=num_steps - 1)
        steps = steps.to(rows.final.device)
        return sigmas[steps], steps

    def _uniform(self, k: int, rows: Rollout, randomness: Randomness) -> Tensor:
        """Draw where in the grid, in [0, 1), each row is noised."""
        purpose, names = f"time{PURPOSE[self.levels_of]}", _names(rows, self.levels_of, k)
        if self.levels != "logit_normal":
            return randomness.uniform(purpose, names)
        return randomness.normal(purpose, names, ()).sigmoid().clamp(max=1 - 2**-24)

    def _shifted(self, place: Tensor) -> Tensor:
        """Move a place, whose share of noise is 1 - place, by the shift."""
        return place if self.shift == 1 else place / (self.shift - (self.shift - 1) * place)


def check_steps(config: ml_collections.ConfigDict, section: str) -> None:
    """Raise ValueError for steps that the rollout's grid does not have."""
    steps, known = list(config[section].steps), range(config.sample.num_steps)
    if steps != sorted(set(steps) & set(known)):
        raise ValueError(
            f"config.{section}.steps={tuple(steps)}: distinct, ascending steps from 0 to "
            f"{known[-1]} are needed, as config.sample.num_steps={len(known)}; or () to draw "
            f"num_times."
        )


def check(config: ml_collections.ConfigDict, section: str) -> None:
    """Raise ValueError for steps or levels that the rollout's grid does not have."""
    check_steps(config, section)
    steps, known = config[section].steps, range(config.sample.num_steps)
    num_times, forward = config[section].num_times, config.forward
    if forward.levels == "distinct" and not steps and num_times > len(known):
        raise ValueError(
            f"config.{section}.num_times={num_times}: of config.sample.num_steps={len(known)} "
            f"levels at most as many can be distinct. Lower the one, or set config.forward.levels."
        )
    if forward.shift != 1 and (steps or forward.levels == "distinct"):
        chosen = f"{section}.steps={tuple(steps)}" if steps else "forward.levels=distinct"
        raise ValueError(
            f"config.forward.shift={forward.shift} moves levels that are drawn with replacement; "
            f"config.{chosen} draws none. Set config.forward.shift=1."
        )


def _names(rows: Rollout, of: str, k: int) -> list[tuple[int, ...]]:
    """Name the k-th draw of each row, the same for all that have it in common."""
    if of == "image":
        return [(row.group, row.member, k, *row.branch) for row in rows.batch.owners]
    return [(row.group, k) if of == "group" else (k,) for row in rows.batch.owners]


def error(velocity: Tensor, rows: Rollout, point: Point) -> Tensor:
    """Return mean((velocity - (x1 - x0))^2) of each row, (B,)."""
    return squared(velocity - (point.noise - rows.final))
