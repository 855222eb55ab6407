"""What losses on noised final images share: noisings, anchors, and guards against hacking."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import relu

from flow_grpo.keys import Key
from flow_grpo.objectives.base import Micro, Objective, Predict, Snapshots, Statistic, Values
from flow_grpo.objectives.forward import noising
from flow_grpo.objectives.forward.guards import overrated
from flow_grpo.objectives.norms import NORM_RATIO, norm_ratio, rms, squared
from flow_grpo.objectives.preference.reference import refresh
from flow_grpo.plan import Passes, Plan
from flow_grpo.randomness import Randomness
from flow_grpo.records import Arranged, Loss, Point, Rollout, RowTable

DECAYS = {  # of the old policy: at first, more with each update, from this one on, at most
    "on_policy": (0.0, 0.0, 0, 0.0),
    "half": (0.0, 0.001, 0, 0.5),
    "slow": (0.0, 0.0075, 75, 0.999),
    "rising": (0.25, 0.005, 0, 0.999),
}
ANCHORS = {
    "forward.ema_beta": Key(
        0.0, "velocity-space KL to a fast average of the policy", least=0, most=10**6
    ),
    "forward.reset_every": Key(
        0, "updates after which the reference becomes the policy; 0: never", least=0, most=10**9
    ),
    "forward.reset_kl": Key(
        0.0,
        "KL to the reference, of an update, beyond which it becomes the policy; 0: never",
        least=0,
        most=10**6,
    ),
    "forward.norm_beta": Key(
        0.0,
        "of NormGuard: the square of how far a velocity's root mean square exceeds the reference's",
        least=0,
        most=10**6,
    ),
    "forward.uncertain": Key(
        1.0,
        "share of an epoch's images that the KL to the reference holds: those whose place in their "
        "group most exceeds that by the rewards of weight 0 (GARDO)",
        least=0,
        most=1,
    ),
}
STATISTICS = {
    "kl": Statistic("KL to the reference", "mean squared difference of the velocities"),
    "ema_kl": Statistic("KL to the fast average", "mean squared difference of the velocities"),
    **NORM_RATIO,
}


def keys(
    section: str = "forward",
    num_times: int = 4,
    kl_beta: float = 0.0,
    decay: str = "on_policy",
    **defaults,
) -> dict[str, Key]:
    """Declare what Forward reads. defaults: of a loss, by the names of keys of forward."""
    own = noising.counted(section, num_times) | {
        f"{section}.kl_beta": Key(
            kl_beta, "velocity-space KL to the reference", least=0, most=10**6
        ),
        f"{section}.decay": Key(
            decay,
            "of the old policy, which rolls out; types 0, 1, 2 of DiffusionNFT's code, and CRD's",
            choices=tuple(DECAYS),
        ),
    }
    shared = noising.KEYS | ANCHORS
    changed = {f"forward.{name}": value for name, value in defaults.items()}
    changed = {name: replace(shared[name], default=value) for name, value in changed.items()}
    return own | shared | changed


class Forward(Objective):
    """Trains at fresh noisings of final images that any solver drew; no log-probs.

    A loss is matching() of the rows; beside it stand what pulls to the reference and to a fast
    average, and NormGuard's hinge (arXiv:2606.27771). "old" rolls out where there is one.
    """

    draws_points = True
    section: ClassVar[str] = "forward"  # of num_times, steps, kl_beta and decay
    needs: tuple[str, ...] = ()  # copies whose velocities matching() compares with
    replays: ClassVar[int] = 0  # velocities of the policy itself that freeze() needs

    @classmethod
    def check(cls, config, family) -> None:
        noising.check(config, cls.section)
        forward, kl_beta = config.forward, config[cls.section].kl_beta
        if forward.reset_kl and not kl_beta:
            raise ValueError(
                f"config.forward.reset_kl={forward.reset_kl} asks for the KL to the reference, "
                f"which config.{cls.section}.kl_beta=0 does not measure. Set the latter above 0, "
                f"or config.forward.reset_kl=0; forward.reset_every counts updates."
            )
        guided = config.train.reference_guidance is not None
        for key in ("reset_kl", "norm_beta"):
            if guided and forward[key]:
                raise ValueError(
                    f"config.forward.{key}={forward[key]} compares the policy with the reference, "
                    f"and config.train.reference_guidance guides the latter alone. Set "
                    f"config.forward.{key}=0, or leave the guidance out."
                )
        asked = config.sample.source == "model"
        if config.forward.uncertain < 1 and (all(config.reward_fn.values()) or not asked):
            raise ValueError(
                f"config.forward.uncertain={config.forward.uncertain} compares the trained reward "
                f"with others, and config.reward_fn={dict(config.reward_fn)} has none of weight 0, "
                f"or config.sample.source={config.sample.source!r} asks none. Add one, such as "
                f"'pickscore': 0.0, with images that the model draws, or set "
                f"config.forward.uncertain=1."
            )

    def __init__(self, config, schedule):
        super().__init__(config, schedule)
        own, shared = config[self.section], config.forward
        self.noising = noising.Noising.of(config, self.section)
        self.kl_beta, self.decay = own.kl_beta, own.decay
        self.ema_beta, self.norm_beta = shared.ema_beta, shared.norm_beta
        self.reset_every, self.reset_kl = shared.reset_every, shared.reset_kl
        self.uncertain = shared.uncertain
        self.others = [name for name, weight in config.reward_fn.items() if not weight]
        asked = {"fast": self.ema_beta, "reference": self.kl_beta or self.norm_beta}
        names = [n for n in ("old", "fast", "reference") if n in self.needs or asked.get(n)]
        self.compared = tuple(names)
        self.on_policy = self.decay == "on_policy"
        lone = "old" not in names and not self.on_policy
        self.snapshots = ("old", *names) if lone else self.compared
        self.fresh = self.on_policy  # "old" is the policy, and known by a row's own forward

    def samples_with(self, epoch: int, num_updates: int) -> str:
        return "old" if "old" in self.snapshots else "policy"

    def arrange(self, scores: Tensor, rows: RowTable, plan: Plan, epoch: int) -> Arranged:
        arranged = super().arrange(scores, rows, plan, epoch)
        if self.uncertain < 1:
            others = [rows.scores[name] for name in self.others]
            arranged.uncertain = overrated(scores, others, rows.group, self.uncertain)
        return arranged

    def points(self, rows: Rollout, randomness: Randomness) -> list[Point]:
        return self.noising.points(rows, self.schedule, randomness)

    def freeze(self, micros: list[Micro], predict: Predict) -> dict[str, Values]:
        names = [name for name in self.compared if not (self.fresh and name == "old")]
        return {name: predict(micros, name) for name in names}

    def loss(self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point) -> Loss:
        if "old" in self.compared:
            known = {"old": velocity.detach()} | known
        value, stats = self.matching(velocity, known, rows, point)
        if "reference" in known:
            reference = known["reference"]
            stats["norm_ratio"] = norm_ratio(velocity, reference)
            if self.kl_beta:
                kl = squared(velocity - reference)
                value = value + self.kl_beta * self.pull(kl, rows, point)
                stats["kl"] = kl.detach()
            if self.norm_beta:
                value = value + self.norm_beta * relu(rms(velocity) - rms(reference)) ** 2
        if self.ema_beta:
            kl = squared(velocity - known["fast"])
            value = value + self.ema_beta * kl
            stats["ema_kl"] = kl.detach()
        return Loss(value, stats)

    def matching(
        self, velocity: Tensor, known: dict[str, Tensor], rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (B,) of each row without its anchors, and its statistics."""
        raise NotImplementedError

    def pull(self, kl: Tensor, rows: Rollout, point: Point) -> Tensor:
        """Weigh the KL (B,) to the reference row by row."""
        return kl if rows.uncertain is None else rows.uncertain * kl

    def passes(self, num_kept: float) -> Passes:
        points, frozen = len(self.noising), len(self.compared) + self.replays
        if "old" in self.compared and self.on_policy:  # known in an epoch's first update
            sample, train = self.sample, self.train
            micro = train.batch_size or sample.train_batch_size
            micros = sample.train_batch_size * sample.num_batches_per_epoch // micro
            updates = micros // train.gradient_accumulation_steps * train.num_inner_epochs
            frozen -= (1 + self.replays) / updates
        by_reference = points * ("reference" in self.compared)
        return Passes(points, points * frozen, 0, reference=(by_reference, 0))

    def after_update(
        self, snapshots: Snapshots, num_updates: int, metrics: dict[str, float]
    ) -> None:
        self.fresh = False
        if "fast" in self.snapshots:
            snapshots.update("fast", min(0.001 * num_updates, 0.3))
        if "reference" in self.snapshots:
            far = bool(self.reset_kl) and metrics["kl"] > self.reset_kl
            refresh(snapshots, "reference", 1 if far else self.reset_every, num_updates)

    def after_epoch(self, snapshots: Snapshots, num_updates: int) -> None:
        self.fresh = self.on_policy
        if "old" in self.snapshots:
            snapshots.update("old", old_decay(self.decay, num_updates))


def old_decay(kind: str, num_updates: int) -> float:
    """How much of the old policy stays after an epoch."""
    start, rate, first, most = DECAYS[kind]
    return min(start + rate * max(num_updates - first, 0), most)
