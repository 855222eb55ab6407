"""Defects of objectives on a ratio beyond Flow-GRPO's, and of what a branch is credited with."""

from defects.defect import SHIPPED, SLIP, Defect

GUARD = "flow_grpo/objectives/ratio/guard.py"
DPPO = "flow_grpo/objectives/ratio/dppo.py"
TERMS = "flow_grpo/objectives/ratio/terms.py"
CREDIT = "flow_grpo/objectives/credit.py"
SDE = "flow_grpo/sde.py"
BASE = "flow_grpo/objectives/base.py"
COLLECT = "flow_grpo/training/collect.py"

DEFECTS = [
    Defect(
        "guard-bias-of-the-batch",
        SHIPPED,
        GUARD,
        ".flatten(1).mean(1).clamp(-20, 20)",
        ".mean().clamp(-20, 20).expand(len(noise))",
        "test_ratio_objectives.py::test_the_guards_rows_each_have_their_own_bias",
    ),
    Defect(
        "guard-without-dt",
        "1/dt left out: Flow-Factory",
        GUARD,
        "return value / (point.sigma - sigma_next), stats",
        "return value, stats",
        "test_ratio_objectives.py::test_the_guards_fixture_has_this_ratio_loss_and_gradient",
    ),
    Defect(
        "guard-with-its-bias",
        "the plain log-ratio times std",
        GUARD,
        "(noise * (step.mean - old.mean)).flatten(1).mean(1)",
        "((step.log_prob - old.log_prob) * step.std.flatten())",
        "test_ratio_objectives.py::test_the_guards_fixture_has_this_ratio_loss_and_gradient",
    ),
    Defect(
        "guard-noise-of-the-new-mean",
        SLIP,
        GUARD,
        "(step.next_latents - old.mean) / step.std",
        "(step.next_latents - step.mean) / step.std",
        "test_ratio_objectives.py::test_the_guards_fixture_has_this_ratio_loss_and_gradient",
    ),
    Defect(
        "dppo-drops-both-ways",
        SLIP,
        DPPO,
        "outwards & (moved >= self.threshold)",
        "moved >= self.threshold",
        "test_ratio_objectives.py::test_with_threshold_zero_only_what_leads_back_to_the_old_policy_trains",
    ),
    Defect(
        "dppo-drops-inwards",
        SLIP,
        DPPO,
        "* advantages > 0",
        "* advantages < 0",
        "test_ratio_objectives.py::test_the_dppo_fixture_has_this_loss_at_each_threshold",
    ),
    Defect(
        "dppo-mean-of-the-policy",
        "kl of the policy to itself",
        DPPO,
        "sde.mean_kl(step.mean, old.mean, step.std)",
        "sde.mean_kl(step.mean, step.mean, step.std)",
        "test_ratio_objectives.py::test_the_dppo_fixture_has_this_loss_at_each_threshold",
    ),
    Defect(
        "sides-of-the-clip-swapped",
        SLIP,
        TERMS,
        "below, above = train.clip_range_lt, train.clip_range_gt",
        "above, below = train.clip_range_lt, train.clip_range_gt",
        "test_ratio_objectives.py::test_a_side_of_the_clip_range_may_have_its_own_width",
    ),
    Defect(
        "nats-of-cps-without-its-variance",
        SLIP,
        SDE,
        "share * 2 * step.std.flatten() ** 2",
        "share + 0 * step.std.flatten()",
        "test_ratio_objectives.py::test_a_clip_range_in_nats_is_of_the_whole_images_log_ratio",
    ),
    Defect(
        "slope-weights-upside-down",
        SLIP,
        TERMS,
        "weights = weights / (moved",
        "weights = 1 / weights * (moved",
        "test_ratio_objectives.py::test_slope_weights_take_a_log_probs_slope_in_the_velocity_out",
    ),
    Defect(
        "steps-of-a-group-compared",
        "branches of different steps share a baseline",
        CREDIT,
        "torch.stack([rows.group, step, place], dim=1)",
        "torch.stack([rows.group, 0 * step, place], dim=1)",
        "test_branching.py::test_branches_of_a_step_are_compared_with_each_other_alone",
    ),
    Defect(
        "strides-compared",
        SLIP,
        CREDIT,
        "place = torch.where(lone, rows.branch, -1)",
        "place = torch.where(lone, 0, -1)",
        "test_branching.py::test_a_step_is_credited_with_both_of_its_images_each_beside_its_like",
    ),
    Defect(
        "a-node-is-worth-its-sum",
        SLIP,
        CREDIT,
        "return total / count",
        "return total + 0 * count / count",
        "test_branching.py::test_a_nodes_value_is_the_mean_of_its_leaves_compared_at_its_depth",
    ),
    Defect(
        "the-best-alone-train",
        SLIP,
        CREDIT,
        "rows[most : max(most, len(rows) - most)]",
        "rows[: max(most, len(rows) - most)]",
        "test_branching.py::test_the_best_and_the_worst_of_a_group_train_with_the_advantages_of_all",
    ),
    Defect(
        "biased-std",
        SLIP,
        "flow_grpo/advantages.py",
        "torch.sqrt(count / (count - 1).clamp(min=1))",
        "torch.sqrt((count - 1).clamp(min=1) / count)",
        "test_advantages.py::test_an_unbiased_std_divides_by_one_less",
    ),
    Defect(
        "reward-kl-paid",
        "the sign of the KL in the reward",
        COLLECT,
        "leaf_scores - weight",
        "leaf_scores + weight",
        "test_collect.py::test_a_reward_is_less_by_its_paths_distance_from_the_reference",
    ),
    Defect(
        "reward-kl-of-the-first-step",
        SLIP,
        "flow_grpo/objectives/ratio/grpo.py",
        "torch.stack(of_points).mean(0)",
        "of_points[0]",
        "test_collect.py::test_a_reward_is_less_by_its_paths_distance_from_the_reference",
    ),
    Defect(
        "tree-depths-stay",
        SLIP,
        CREDIT,
        "first = epoch // train.tree_dwell % max(num_depths - train.tree_depths + 1, 1)",
        "first = 0",
        "test_branching.py::test_of_a_tree_some_depths_train_that_move_on_with_the_epochs",
    ),
]
