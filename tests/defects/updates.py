"""Defects of optimizer steps, the average of weights and checkpoints."""

from defects.defect import SLIP, Defect

ARRANGE = "flow_grpo/training/arrange.py"
LOOP = "flow_grpo/training/loop.py"
ENGINE = "flow_grpo/parallel/engine.py"
PLAIN = "flow_grpo/parallel/plain.py"
DEEPSPEED = "flow_grpo/parallel/deepspeed.py"
ZERO3, FSDP2 = "flow_grpo/parallel/zero3.py", "flow_grpo/parallel/fsdp2.py"
SNAPSHOTS = "flow_grpo/training/snapshots.py"
CHECKPOINT = "flow_grpo/training/checkpoint.py"

DEFECTS = [
    Defect(
        "a-read-a-point",
        "the device then waits for the host once a micro-batch and step",
        LOOP,
        "loss_sum += share.detach()",
        "loss_sum += share.item()",
        "test_waits.py::test_an_update_reads_once[grpo]",
        "RuntimeError: Tensor.item() cannot be called on meta tensors",
    ),
    Defect(
        "a-read-a-denoising-step",
        SLIP,
        "flow_grpo/sampling.py",
        "        on_step()\n",
        "        on_step()\n        assert latents.isfinite().all()\n",
        "test_waits.py::test_denoising_reads_nothing_from_the_device[sd3]",
        "RuntimeError: Tensor.item() cannot be called on meta tensors",
    ),
    Defect(
        "mean-of-means",
        "each micro-batch divided by its own rows",
        LOOP,
        "micro, k, statistics) / total",
        "micro, k, statistics) / len(velocity) / len(micros) / len(micro.points)",
        "test_accumulation.py::test_the_update_is_the_weighted_mean_of_unequal_micro_batches",
    ),
    Defect(
        "steps-not-counted-in-the-accumulation",
        "Flow-Factory 45ef14d",
        ARRANGE,
        "(num_points if weights.ndim == 1 else 1)",
        "1",
        "test_accumulation.py::test_training_the_same_steps_twice_leaves_the_update_unchanged",
    ),
    Defect(
        "mean-of-the-ranks-means",
        "ranks with fewer rows weigh them more",
        LOOP,
        "arrange.total_weight(arranged, of_ranks, num_points)",
        "arrange.total_weight(arranged, [of_ranks[rank]], num_points) * run.ranks.num_ranks",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "gradient-averaged-over-ranks",
        "DDP divides a sum that was divided already",
        PLAIN,
        "loss = loss * self.ranks.num_ranks",
        "pass",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "gradient-kept-after-the-update",
        SLIP,
        PLAIN,
        "        self.scaler.update()\n        self.optimizer.zero_grad()",
        "        self.scaler.update()",
        "test_accumulation.py::test_an_update_forgets_the_gradient_of_the_one_before",
    ),
    Defect(
        "skipped-gradient-leaks",
        "accelerate's zero_grad() does nothing while accumulating",
        PLAIN,
        "self.scaler.get_scale())\n        self.optimizer.zero_grad()",
        "self.scaler.get_scale())",
        "test_accumulation.py::test_a_non_finite_loss_leaves_no_trace_in_the_next_update",
    ),
    Defect(
        "masters-put-in-place-alone",
        SLIP,
        DEEPSPEED,
        "self._zero.update_lp_params()",
        "pass",
        "test_engines.py::test_masters_are_put_in_place_and_the_weights_follow[zero2]",
    ),
    Defect(
        "masters-put-in-place-alone-under-zero-3",
        SLIP,
        ZERO3,
        "zero._reassign_or_swap_out_partitioned_parameters(row)",
        "pass",
        "test_engines.py::test_masters_are_put_in_place_and_the_weights_follow[zero3]",
    ),
    Defect(
        "abandoned-gradient-kept-under-zero-3",
        SLIP,
        ZERO3,
        "self._zero._overflow_clean_up(None)",
        "pass",
        "test_engines.py::"
        "test_an_abandoned_update_leaves_the_weights_bits_alone_and_no_trace_in_the_next[zero3]",
    ),
    Defect(
        "a-gathered-weight-outlives-its-change",
        "FSDP2 keeps the root's, unless it is told otherwise",
        FSDP2,
        '"reshard_after_forward": True,',
        '"reshard_after_forward": None,',
        "test_engines.py::"
        "test_a_snapshot_predicts_as_a_module_with_its_weights_and_the_policy_as_itself"
        "[fsdp2-False]",
    ),
    Defect(
        "norm-of-a-rank's-own-rows",
        SLIP,
        FSDP2,
        "return self.ranks.total(own.double() ** 2).sqrt()",
        "return own.double()",
        "test_engines.py::test_updates_are_those_of_one_batch_computed_by_hand[fsdp2]",
    ),
    Defect(
        "abandoned-gradient-kept-under-fsdp2",
        SLIP,
        FSDP2,
        "        self.optimizer.zero_grad()\n        self.model.zero_grad()",
        "        self.optimizer.zero_grad()",
        "test_engines.py::"
        "test_an_abandoned_update_leaves_the_weights_bits_alone_and_no_trace_in_the_next[fsdp2]",
    ),
    Defect(
        "adapters-that-train",
        "set_adapter() flips requires_grad",
        SNAPSHOTS,
        "param.requires_grad_(id(param) in trained)",
        "pass",
        "test_bookkeeping.py::"
        "test_a_weight_that_did_not_train_does_not_train_after_a_snapshot_was_asked",
    ),
    Defect(
        "skipped-update-is-counted",
        "fp16's skipped steps moved the average, too",
        LOOP,
        "    if run.updater.finish(mean, norm):\n",
        "    run.updater.finish(mean, norm)\n    if True:\n",
        "test_overflow.py::test_an_fp16_overflow_is_no_update_and_lowers_the_scale",
    ),
    Defect(
        "average-of-every-micro-batch",
        "its decay then depends on the accumulation",
        LOOP,
        "            loss_sum += share.detach()\n",
        "            loss_sum += share.detach()\n            run.move_snapshots({})\n",
        "test_accumulation.py::test_the_average_follows_every_second_update",
    ),
    Defect(
        "average-by-its-complement",
        SLIP,
        SNAPSHOTS,
        "lerp_(master, 1 - decay)",
        "lerp_(master, decay)",
        "test_bookkeeping.py::test_an_average_of_one_two_three_is_as_computed_by_hand",
    ),
    Defect(
        "average-forgotten-by-a-resume",
        "Flow-Factory saves no EMA",
        CHECKPOINT,
        "run.snapshots.load_state_dict(run.engine.load(folder, run.snapshots.names))",
        "run.engine.load(folder, run.snapshots.names)",
        "test_resume.py::test_four_epochs_equal_two_and_a_resume_and_two",
    ),
    Defect(
        "moments-forgotten-by-a-resume",
        SLIP,
        ENGINE,
        "self.optimizer.state[tensor] = {",
        "_ = {",
        "test_resume.py::test_four_epochs_equal_two_and_a_resume_and_two",
    ),
    Defect(
        "metrics-not-cut-back",
        "rows of an unfinished epoch stand twice",
        CHECKPOINT,
        'run.tracker.cut(state["metrics_bytes"])',
        "pass",
        "test_resume.py::test_four_epochs_equal_two_and_a_resume_and_two",
    ),
    Defect(
        "replaced-before-its-successor-is-there",
        "a kill between two renames left no checkpoint",
        CHECKPOINT,
        "        _set_aside(final)\n",
        "        _remove(final)\n",
        "test_kills.py::test_a_kill_before_or_within_any_file_leaves_the_old_or_the_new_checkpoint",
        error="ValueError: config.resume_from=latest",
    ),
    Defect(
        "raw-weights-exported",
        "the average is evaluated, the policy is published",
        CHECKPOINT,
        '"ema" if run.config.train.ema else "policy")',
        '"policy")',
        "test_run.py::test_the_exported_lora_gives_our_evaluation_in_a_stock_pipeline",
    ),
    Defect(
        "stacked-rows-with-anothers-prompt",
        SLIP,
        "flow_grpo/records.py",
        "torch.cat([value] * times)",
        "value.repeat_interleave(times, 0)",
        "test_stacking.py::test_stacked_points_give_the_same_update_in_fewer_calls[nft]",
    ),
]
