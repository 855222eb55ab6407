"""Defects of optimizer steps, the average of weights and checkpoints."""

from defects.defect import SLIP, Defect

LOOP = "flow_grpo/training/loop.py"
OPTIMIZER = "flow_grpo/training/optimizer.py"
SNAPSHOTS = "flow_grpo/training/snapshots.py"
CHECKPOINT = "flow_grpo/training/checkpoint.py"

DEFECTS = [
    Defect(
        "mean-of-means",
        "each micro-batch divided by its own rows",
        LOOP,
        "/ (total * len(points))",
        "/ (micro.weights.sum().clamp(min=1e-8) * len(micros) * len(points))",
        "test_accumulation.py::test_the_update_is_the_weighted_mean_of_unequal_micro_batches",
    ),
    Defect(
        "steps-not-counted-in-the-accumulation",
        "Flow-Factory 45ef14d",
        LOOP,
        "/ (total * len(points))",
        "/ total",
        "test_accumulation.py::test_training_the_same_steps_twice_leaves_the_update_unchanged",
    ),
    Defect(
        "mean-of-the-ranks-means",
        "ranks with fewer rows weigh them more",
        LOOP,
        "total = run.total(sum(micro.weights.sum() for micro in micros)).clamp(min=1e-8)",
        "total = sum(m.weights.sum() for m in micros) * run.accelerator.num_processes",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "gradient-averaged-over-ranks",
        "DDP divides a sum that was divided already",
        OPTIMIZER,
        "self.accelerator.backward(loss * self.accelerator.num_processes)",
        "self.accelerator.backward(loss)",
        "test_ranks.py::test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does",
    ),
    Defect(
        "gradient-kept-after-the-update",
        SLIP,
        OPTIMIZER,
        "            self.optimizer.zero_grad()\n        self.num_updates += 1",
        "        self.num_updates += 1",
        "test_accumulation.py::test_an_update_forgets_the_gradient_of_the_one_before",
    ),
    Defect(
        "skipped-gradient-leaks",
        "accelerate's zero_grad() does nothing while accumulating",
        OPTIMIZER,
        "self.accelerator.gradient_state._set_sync_gradients(True)",
        "pass",
        "test_accumulation.py::test_a_non_finite_loss_leaves_no_trace_in_the_next_update",
    ),
    Defect(
        "skipped-update-is-counted",
        "fp16's skipped steps moved the average, too",
        LOOP,
        "    if norm is None:\n        return\n",
        "",
        "test_overflow.py::test_an_fp16_overflow_is_no_update_and_lowers_the_scale",
    ),
    Defect(
        "average-of-every-micro-batch",
        "its decay then depends on the accumulation",
        LOOP,
        "            loss_sum += share.detach()\n",
        "            loss_sum += share.detach()\n            run.move_snapshots()\n",
        "test_accumulation.py::test_the_average_follows_every_second_update",
    ),
    Defect(
        "average-by-its-complement",
        SLIP,
        SNAPSHOTS,
        "lerp_(_master(param), 1 - decay)",
        "lerp_(_master(param), decay)",
        "test_bookkeeping.py::test_an_average_of_one_two_three_is_as_computed_by_hand",
    ),
    Defect(
        "average-forgotten-by-a-resume",
        "Flow-Factory saves no EMA",
        CHECKPOINT,
        "run.snapshots.load_state_dict(weights)",
        "pass",
        "test_resume.py::test_four_epochs_equal_two_and_a_resume_and_two",
    ),
    Defect(
        "moments-forgotten-by-a-resume",
        SLIP,
        CHECKPOINT,
        'run.updater.load_optimizer(state["optimizer"])',
        "pass",
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
        "            _set_aside(final)\n",
        "            _remove(final)\n",
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
]
