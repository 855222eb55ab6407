"""Defects of a single step and of the choice of steps."""

from defects.defect import SHIPPED, SLIP, Defect

SDE = "flow_grpo/sde.py"
ROLLOUTS = "flow_grpo/rollouts.py"
RUN = "flow_grpo/training/run.py"

DEFECTS = [
    Defect(
        "velocity-sign",
        "v = x0 - x1, the other convention",
        SDE,
        "x0, x1 = latents - sigma * velocity, latents + (1 - sigma) * velocity",
        "x0, x1 = latents + sigma * velocity, latents - (1 - sigma) * velocity",
        "test_sde.py::test_the_fixture_has_these_numbers",
    ),
    Defect(
        "std-without-dt",
        SHIPPED,
        SDE,
        "diffusion * torch.sqrt(dt)",
        "diffusion",
        "test_gaussian.py::test_the_variance_along_ten_steps_is_this",
    ),
    Defect(
        "dance-without-its-score-correction",
        "noise added to the ODE's mean",
        SDE,
        "return _diffuse(sigma, sigma_next, noise_level)\n",
        "return sigma_next, _diffuse(sigma, sigma_next, noise_level)[1]\n",
        "test_gaussian.py::test_the_variance_along_ten_steps_is_this",
    ),
    Defect(
        "cps-keeps-all-the-old-noise",
        SLIP,
        SDE,
        "return sigma_next * torch.cos(angle),",
        "return sigma_next,",
        "test_sde.py::test_cps_keeps_the_coefficients_of_signal_and_noise",
    ),
    Defect(
        "gradient-through-the-noise",
        "the sample is not detached: REINFORCE without a gradient",
        SDE,
        "(next_latents.detach() - mean) ** 2",
        "(next_latents - mean) ** 2",
        "test_sde.py::test_the_gradient_reaches_the_velocity_only_through_the_mean",
    ),
    Defect(
        "arithmetic-in-bf16",
        SHIPPED,
        SDE,
        "dtype = torch.promote_types(latents.dtype, torch.float32)",
        "dtype = latents.dtype",
        "test_sde.py::test_low_precision_is_left_before_any_arithmetic",
    ),
    Defect(
        "kl-by-std",
        "std for variance",
        SDE,
        "return _row_mean((mean - other_mean) ** 2 / (2 * std**2))",
        "return _row_mean((mean - other_mean) ** 2 / (2 * std))",
        "test_log_ratio.py::test_the_kl_is_the_table_s_multiple_of_the_velocity_s_square",
    ),
    Defect(
        "window-frozen",
        "random.seed(rank) before every draw, in a published trainer",
        RUN,
        "self.config.seed, epoch)",
        "self.config.seed, 0)",
        "test_collect.py::test_a_group_has_one_window_and_groups_and_epochs_have_others",
    ),
    Defect(
        "window-of-each-row",
        "verl-omni: inside one group it inflates the reward's std",
        ROLLOUTS,
        "whole(steps_of(g for g, _ in rows), num_steps)",
        "whole(steps_of(range(len(rows))), num_steps)",
        "test_collect.py::test_a_group_has_one_window_and_groups_and_epochs_have_others",
    ),
    Defect(
        "window-of-the-rank",
        SHIPPED,
        RUN,
        "self.config.seed, epoch)",
        "self.config.seed, epoch + self.ranks.rank)",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "last-step-trained",
        "its log-prob has no precision",
        ROLLOUTS,
        "range(num_steps - 1), dtype",
        "range(num_steps), dtype",
        "test_rollouts.py::test_size_zero_trains_every_step_but_the_last",
    ),
]
