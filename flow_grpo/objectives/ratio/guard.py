"""GRPO-Guard (arXiv:2510.22319): a ratio of the same scale and without a bias at every step."""

from torch import Tensor

from flow_grpo import sde
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.keys import Key
from flow_grpo.objectives.ratio import terms
from flow_grpo.objectives.ratio.grpo import GRPO, OldStep
from flow_grpo.records import Point, Rollout


class GRPOGuard(GRPO):
    """Flow-GRPO's surrogate with r = exp(mean(z (m - m_old))), divided by sigma - sigma_next.

    m: a step's mean; z = (next - m_old) / std. The exponent is (log_prob - old_log_prob + KL) std:
    its expectation is 0 wherever the policy goes, and at r = 1 the gradient in the velocity is the
    same at all steps but the first.
    """

    keys = terms.KEYS | {"train.clip_range": Key(2e-6, "epsilon, of mean(z dm)", least=0, most=1)}
    keeps = ("states", "log_probs", "means")

    @classmethod
    def check(cls, config, family: type[PatchedPipeline]) -> None:
        super().check(config, family)
        sample, train = config.sample, config.train
        kinds = [kind for kind in sde.STOCHASTIC if sde.KERNELS[kind].has_variance]
        if sample.sde_type not in kinds:
            raise ValueError(
                f"config.sample.sde_type={sample.sde_type!r} with config.objective="
                f"{config.objective!r}: its ratio needs the log-density of an SDE's step, of which "
                f"{sample.sde_type} leaves the variance out. Set config.sample.sde_type to "
                f"{' or '.join(kinds)}."
            )
        if train.step_weight != "none":
            raise ValueError(
                f"config.train.step_weight={train.step_weight!r} with config.objective="
                f"{config.objective!r}: it weighs all steps alike already. Set "
                f"config.train.step_weight=none."
            )

    def surrogate(
        self, step: sde.Step, old: OldStep, rows: Rollout, point: Point
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = (step.next_latents - old.mean) / step.std
        log_ratio = (noise * (step.mean - old.mean)).flatten(1).mean(1).clamp(-20, 20)
        of_a_nat = sde.of_a_nat(self.schedule.kind, step) * step.std.flatten()
        value, stats = terms.clipped_surrogate(
            log_ratio,
            rows.at("advantages", point.column),
            *terms.clip_bounds(self.train, of_a_nat),
        )
        sigmas = self.schedule.at(rows.batch.size).sigmas
        sigma_next = sigmas[rows.next_steps[:, point.column]]
        return value / (point.sigma - sigma_next), stats
