"""Defects of a single step and of the choice of steps."""

from defects.defect import SHIPPED, SLIP, Defect

SDE = "flow_grpo/sde.py"
ROLLOUTS = "flow_grpo/rollouts.py"
WINDOWS = "flow_grpo/windows.py"
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
        "config.sample, groups, config.seed, epoch,",
        "config.sample, groups, config.seed, 0,",
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
        "return trained_steps(self.config, self.plan, groups, epoch)",
        "return trained_steps(self.config, self.plan, groups, epoch + self.ranks.rank)",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "last-step-trained",
        "its log-prob has no precision",
        WINDOWS,
        "range(num_steps - 1), dtype",
        "range(num_steps), dtype",
        "test_windows.py::test_size_zero_trains_every_step_but_the_last",
    ),
    Defect(
        "progressive-window-never-rolls-back",
        SLIP,
        WINDOWS,
        "slot.epoch % ends[-1] if",
        "min(slot.epoch, ends[-1] - 1) if",
        "test_windows.py::test_a_progressive_window_moves_on_and_rolls_back_as_mixgrpos",
    ),
    Defect(
        "strata-of-each-group",
        "steps drawn independently: their numbers vary",
        WINDOWS,
        "place = order[slot.group % slot.num_groups] + within",
        "place = (slot.num_groups - 1) * within",
        "test_windows.py::test_one_stratified_step_a_group_covers_the_range_evenly_every_epoch",
    ),
    Defect(
        "branches-at-their-trunks-end",
        "all members of per_step branch off at the last step",
        ROLLOUTS,
        "steps[member * len(steps) // group_size]",
        "steps[-1]",
        "test_branching.py::test_each_of_a_groups_steps_has_its_own_branches_of_the_trunk",
    ),
    Defect(
        "tree-without-a-trunk",
        "nodes start from noise of their own",
        ROLLOUTS,
        "parent.append((number[group, branch[:-1]], start) if start else NOISE)",
        "parent.append((number[group, branch[:-1]], start) if branch[1:] else NOISE)",
        "test_branching.py::test_a_tree_splits_at_each_step_and_its_nodes_share_what_lies_before",
    ),
]
