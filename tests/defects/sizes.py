"""Defects of epochs whose pictures have several sizes."""

from defects.defect import SLIP, Defect

ALONE = "test_sizes.py::test_each_picture_of_an_epoch_is_that_of_a_run_of_its_size_alone"
PACKED = "test_sizes.py::test_a_micro_batch_holds_rows_of_one_size_and_is_filled_up_by_its_own"

DEFECTS = [
    Defect(
        "schedule-of-the-first-size",
        "a scheduler's mu is set once, before the loop",
        "flow_grpo/sampling.py",
        "sigmas=self.of_size[size]",
        "sigmas=next(iter(self.of_size.values()))",
        ALONE,
    ),
    Defect(
        "evaluation-at-the-config-s-size",
        SLIP,
        "flow_grpo/evaluation/evaluate.py",
        "{prompt.size or self.size for prompt in distinct}",
        "{self.size}",
        ALONE,
    ),
    Defect(
        "gate-of-the-first-size",
        SLIP,
        "flow_grpo/training/collect.py",
        "gated.setdefault(batch.size, [])",
        "gated.setdefault(None, [])",
        ALONE,
    ),
    Defect(
        "micro-batch-of-several-sizes",
        "a bucket's rest is put to the next bucket's",
        "flow_grpo/plan.py",
        "{*self.row_sizes[each].tolist()}",
        "{0}",
        PACKED,
    ),
    Defect(
        "filled-up-by-another-size",
        SLIP,
        "flow_grpo/plan.py",
        "if self.row_sizes is None or not micro else micro[0]",
        "if self.row_sizes is None or micro else micro[0]",
        PACKED,
    ),
    Defect(
        "rows-in-the-order-of-sizes",
        "what is sorted by bucket is not sorted back",
        "flow_grpo/training/collect.py",
        "    in_turn = np.argsort(np.concatenate([part.numbers for part in parts]))\n    of_parts",
        "    in_turn = np.arange(sum(len(part.numbers) for part in parts))\n    of_parts",
        "test_sizes.py::test_an_advantage_stays_beside_its_picture",
    ),
    Defect(
        "identity-without-sizes",
        SLIP,
        "flow_grpo/training/folders.py",
        "[[prompt.text, prompt.metadata] for",
        "[prompt.text for",
        "test_sizes.py::test_a_run_that_goes_on_with_other_sizes_says_so",
    ),
    Defect(
        "a-prompt-s-size-in-spite-of-eval-sizes",
        SLIP,
        "flow_grpo/plan.py",
        "if config.sample.eval_sizes else found",
        "if False else found",
        "test_sizes.py::test_evaluations_share_no_call_among_sizes_and_eval_sizes_hold_for_all",
    ),
]
