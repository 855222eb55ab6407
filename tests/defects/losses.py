"""Defects on the way from a score to a loss."""

from defects.defect import SLIP, Defect

ADVANTAGES = "flow_grpo/advantages.py"
BASE = "flow_grpo/objectives/base.py"
GRPO = "flow_grpo/objectives/ratio/grpo.py"
TERMS = "flow_grpo/objectives/ratio/terms.py"
NFT = "flow_grpo/objectives/forward/nft.py"
LOOP = "flow_grpo/training/loop.py"
COLLECT = "flow_grpo/training/collect.py"
COMBINE = "flow_grpo/rewards/combine.py"

DEFECTS = [
    Defect(
        "group-is-its-text",
        "two groups of one prompt become one: Flow-Factory 7058407",
        COLLECT,
        '"group": rollout.batch.group,',
        '"group": torch.tensor([*map(rollout.batch.prompts.index, rollout.batch.prompts)]),',
        "test_collect.py::test_an_advantage_belongs_to_the_picture_beside_it",
    ),
    Defect(
        "advantages-of-the-rank",
        "global std of a micro-batch: mm_grpo db2426b",
        BASE,
        "        advantages[trained], weights[trained] = "
        "self.targets(values[trained], cells[trained])\n",
        "        for rank in range(plan.world_size):\n"
        "            on = trained & (rows.rank == rank)\n"
        "            advantages[on], weights[on] = self.targets(values[on], cells[on])\n",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "baseline-of-the-batch",
        SLIP,
        ADVANTAGES,
        "torch.where(constant[index], 0, values - mean[index])",
        "torch.where(constant[index], 0, values - values.mean())",
        "test_advantages.py::test_every_group_sums_to_zero",
    ),
    Defect(
        "std-over-the-wrong-axis",
        SLIP,
        ADVANTAGES,
        "centred = centred / (group_std + epsilon)",
        "centred = centred / (_std(values) + epsilon)",
        "test_advantages.py::test_three_groups_of_four_have_these_advantages",
    ),
    Defect(
        "equal-scores-divided-by-epsilon",
        "1e-8 in MixGRPO, DanceGRPO, Pref-GRPO",
        ADVANTAGES,
        "torch.where(constant[index], 0, values - mean[index])",
        "values - mean[index]",
        "test_advantages.py::test_constant_means_to_1e_8_of_the_mean_or_of_one",
    ),
    Defect(
        "advantages-not-clamped",
        SLIP,
        BASE,
        "return advantages.clamp(-self.adv_clip_max, self.adv_clip_max),",
        "return advantages,",
        "test_advantages.py::test_targets_are_clamped_group_advantages",
    ),
    Defect(
        "failed-score-is-zero",
        "verl-omni: a reward that fails contributes 0",
        COMBINE,
        "weight * columns[name][name]",
        "weight * np.nan_to_num(columns[name][name])",
        "test_rewards.py::test_a_row_lacks_avg_where_it_lacks_a_reward_that_counts",
    ),
    Defect(
        "unscored-row-is-trained",
        SLIP,
        BASE,
        "(~scores.isnan()).double()",
        "scores.new_ones(len(scores))",
        "test_advantages.py::"
        "test_a_missing_score_has_weight_and_advantage_zero_and_leaves_its_group",
    ),
    Defect(
        "ratio-not-exponentiated",
        SLIP,
        TERMS,
        "ratio = log_ratio.exp()",
        "ratio = log_ratio",
        "test_grpo.py::test_the_surrogate_of_four_rows_has_these_losses_and_gradients",
    ),
    Defect(
        "clip-at-the-wrong-side",
        "min for max, as the loss is the negative surrogate",
        TERMS,
        "value = torch.maximum(",
        "value = torch.minimum(",
        "test_grpo.py::test_a_ratio_beyond_the_clip_range_keeps_only_the_gradient_that_leads_back",
    ),
    Defect(
        "clip-without-one",
        "clamp(ratio, -c, c): Flow-Factory 37005df",
        TERMS,
        "ratio.clamp(1 - below, 1 + above)",
        "ratio.clamp(-below, above)",
        "test_grpo.py::test_the_surrogate_of_four_rows_has_these_losses_and_gradients",
    ),
    Defect(
        "kl-without-a-gradient",
        "computed under no_grad: Flow-Factory 8bc04d0",
        GRPO,
        "value = value + self.beta * kl",
        "value = value + self.beta * kl.detach()",
        "test_grpo.py::test_the_kl_to_the_reference_has_this_value_and_gradient",
    ),
    Defect(
        "kl-without-dt",
        "two published trainers of one method disagree",
        TERMS,
        "divergence * (point.sigma - sigmas[rows.next_steps[:, point.column]])",
        "divergence",
        "test_grpo.py::test_the_kl_to_the_reference_has_this_value_and_gradient",
    ),
    Defect(
        "dt-of-the-batch",
        "GRPO-Guard's scale averaged over rows of unlike steps",
        TERMS,
        "(point.sigma - sigmas[rows.next_steps[:, point.column]])",
        "(point.sigma - sigmas[rows.next_steps[:, point.column]]).mean()",
        "test_grpo.py::test_rows_at_different_steps_have_the_loss_that_they_have_alone",
    ),
    Defect(
        "old-log-probs-after-the-update",
        "replayed for every update: the ratio is always 1",
        LOOP,
        "            for of_ranks in updates:\n",
        "            for of_ranks in updates:\n"
        "                known = prepare(objective, arranged, rank, micro_batch, run.predict)\n",
        "test_toy.py::test_the_first_update_of_an_epoch_sees_ratio_one_and_the_second_does_not",
    ),
    Defect(
        "nft-sign",
        "the worst images are imitated",
        NFT,
        "(quality * losses[0] + (1 - quality) * losses[1])",
        "(quality * losses[1] + (1 - quality) * losses[0])",
        "test_nft.py::test_the_fixture_has_these_losses",
    ),
]
