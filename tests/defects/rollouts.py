"""Defects of sampling, and of the model as sampling and training call it."""

from defects.defect import SLIP, Defect

SAMPLING = "flow_grpo/sampling.py"
ANCHORED = "flow_grpo/objectives/forward/anchored.py"
COLLECT = "flow_grpo/training/collect.py"
PLAN = "flow_grpo/plan.py"
COMBINE = "flow_grpo/rewards/combine.py"
SNAPSHOTS = "flow_grpo/training/snapshots.py"
RUN = "flow_grpo/training/run.py"
EVALUATE = "flow_grpo/evaluation/evaluate.py"
SPEED = "flow_grpo/parallel/speed.py"
SD3 = "flow_grpo/diffusers_patch/sd3.py"

DEFECTS = [
    Defect(
        "latents-rounded-after-the-log-prob",
        "Flow-Factory 5cfd422",
        SAMPLING,
        "= taken.next_latents[on_rows]",
        "= taken.next_latents[on_rows].bfloat16().float()",
        "test_sampling.py::test_replaying_a_rollout_gives_log_ratio_zero[sd3-1.0-sde-full]",
    ),
    Defect(
        "replay-at-another-sigma",
        "the column of the window taken for the step",
        SAMPLING,
        "schedule.sigmas[rollout.next_steps[:, column]],",
        "schedule.sigmas[column + 1],",
        "test_sampling.py::test_replaying_a_rollout_gives_log_ratio_zero[sd3-1.0-sde-windows]",
    ),
    Defect(
        "noise-of-the-group",
        "one generator a group: its members take the same steps",
        SAMPLING,
        "[(row.group, row.member, i, *row.branch)",
        "[(row.group, 0, i, *row.branch)",
        "test_toy.py::test_every_step_of_every_row_draws_its_own_standard_normal_noise",
    ),
    Defect(
        "noise-of-the-first-step",
        "a generator seeded anew at every step",
        SAMPLING,
        "[(row.group, row.member, i, *row.branch)",
        "[(row.group, row.member, 0, *row.branch)",
        "test_toy.py::test_every_step_of_every_row_draws_its_own_standard_normal_noise",
    ),
    Defect(
        "same-latent-of-each-member",
        SLIP,
        SAMPLING,
        "0 if schedule.same_latent else row.member",
        "row.member",
        "test_sampling.py::test_rows_share_the_initial_noise_of_their_group_only_with_same_latent",
    ),
    Defect(
        "prompts-lag",
        "the data loader prefetches: flow_grpo issue 215",
        PLAN,
        "self.num_groups, self.seed, epoch)",
        "self.num_groups, self.seed, max(epoch - 1, 0))",
        "test_collect.py::test_every_lap_through_the_prompts_holds_each_line_once",
    ),
    Defect(
        "rewards-of-the-row-before",
        "asynchronous rewards, collected out of order",
        COMBINE,
        "[(numbers, call.result",
        "[(numbers[::-1], call.result",
        "test_collect.py::test_an_advantage_belongs_to_the_picture_beside_it",
    ),
    Defect(
        "rewards-of-the-epoch-before",
        "asynchronous rewards, one epoch late",
        COLLECT,
        "    rows, ranks = table_of(",
        '    scores, run.late = getattr(run, "late", scores), scores\n    rows, ranks = table_of(',
        "test_collect.py::test_an_advantage_belongs_to_the_picture_beside_it",
    ),
    Defect(
        "part-of-a-group-is-compared",
        "a comparing reward sees what a call holds",
        COMBINE,
        "if self._comparing and batch.group is not None:",
        "if not self._num_rows:",
        "test_reward_queue.py::"
        "test_a_comparing_reward_gets_whole_groups_however_many_calls_they_took",
        "RuntimeError: reward 'places' failed",
    ),
    Defect(
        "nft-samples-with-the-policy",
        SLIP,
        ANCHORED,
        'return "old" if "old" in self.snapshots else "policy"',
        'return "policy"',
        "test_collect.py::test_nft_samples_with_its_old_policy",
    ),
    Defect(
        "evaluation-noise-anew",
        "other noise at every evaluation",
        EVALUATE,
        "Randomness(evaluator.config.seed, ())",
        "Randomness(np.random.randint(2**31), ())",
        "test_state.py::test_a_learning_rate_of_zero_changes_no_weight_and_no_evaluation",
    ),
    Defect(
        "guidance-left-out-of-training",
        "verl-omni 2e08eeff: the scale was not passed on",
        RUN,
        "if guided and not self.config.train.cfg else self.guidance",
        "if guided else self.guidance",
        "test_run.py::test_the_log_ratio_before_the_first_update_is_exactly_zero[2-True-sde]",
        error="RuntimeError: before the first update the largest log_ratio",
    ),
    Defect(
        "unconditional-pass-without-a-gradient",
        "flow_grpo a482878",
        SD3,
        "unconditional, conditional = velocity.chunk(2)",
        "unconditional, conditional = velocity.chunk(2)\n"
        "        unconditional = unconditional.detach()",
        "test_guidance.py::"
        "test_the_guided_velocity_s_gradient_is_that_of_both_passes_in_proportion",
    ),
    Defect(
        "timestep-of-an-integer",
        "DiffusionNFT's rollout, DanceGRPO",
        SD3,
        "timestep=torch.cat([sigma * 1000] * rows)",
        "timestep=torch.cat([(sigma * 1000).long()] * rows)",
        "test_run.py::test_the_exported_lora_gives_our_evaluation_in_a_stock_pipeline",
    ),
    Defect(
        "reference-with-its-adapter",
        "Pref-GRPO: disabling it does nothing to a wrapped model",
        SNAPSHOTS,
        "layer.enable_adapters(False)",
        "pass",
        "test_run.py::"
        "test_a_random_adapter_changes_the_velocity_and_disabling_it_restores_the_base",
    ),
    Defect(
        "own-weights-not-set-aside",
        "on a CPU, detach().cpu() is the live weight: flow_grpo, NFT",
        SNAPSHOTS,
        "own = {key: self._kept(master)",
        "own = {key: master",
        "test_bookkeeping.py::test_a_snapshot_is_swapped_in_and_the_policy_comes_back_bit_for_bit",
    ),
    Defect(
        "merged-weights-by-subtraction",
        "peft's unmerge()",
        SPEED,
        "layer.get_base_layer().weight.data = data",
        'layer.get_base_layer().weight.data -= layer.get_delta_weight("default")',
        "test_merged.py::test_weights_hold_the_adapter_and_are_put_back_to_the_bit",
    ),
]
