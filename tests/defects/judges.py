"""Defects in asking a vision-language model for probabilities, and in benchmarks."""

from defects.defect import SHIPPED, SLIP, Defect

PROBABILITY = "flow_grpo/rewards/judges/probability.py"
LOCAL = "flow_grpo/rewards/judges/local.py"
VQA = "flow_grpo/rewards/judges/vqa.py"
PROTOCOL = "flow_grpo/evaluation/protocol.py"
TEST = "test_probability.py::"

DEFECTS = [
    Defect(
        "a-missing-token-is-a-score-of-0",
        SHIPPED,
        PROBABILITY,
        "return masses[0] if masses[0] else math.nan",
        "return masses[0]",
        f"{TEST}test_an_answer_without_the_token_is_nan_and_counted[missing token]",
    ),
    Defect(
        "a-share-beside-what-is-not-listed",
        SLIP,
        PROBABILITY,
        "math.nan if unseen > MOST_UNSEEN * sum(masses) else masses[0] / sum(masses)",
        "masses[0] / sum(masses)",
        f"{TEST}test_a_listed_answers_share",
    ),
    Defect(
        "a-count-has-no-digit",
        SLIP,
        PROBABILITY,
        "words & {*NUMBERS}",
        "set()",
        f"{TEST}test_a_local_judges_probability_is_that_of_the_logits[qwen2_5_vl]",
    ),
    Defect(
        "the-last-token-of-a-batch-padded-on-the-right",
        SHIPPED,
        LOCAL,
        'padding_side="left"',
        'padding_side="right"',
        f"{TEST}test_a_local_judges_probability_is_that_of_the_logits[qwen2_5_vl]",
    ),
    Defect(
        "a-prompts-marks-are-the-chats",
        SLIP,
        LOCAL,
        '.replace("<|", "< |")',
        "",
        f"{TEST}test_a_prompts_marks_are_text",
    ),
    Defect(
        "a-zeroed-parent-hands-nothing-on",
        SHIPPED,
        VQA,
        "said[number] = said[[number, *of]].min()",
        "said[number] = min([said[number], *(probabilities[of] > 0.5)])",
        f"{TEST}test_a_question_counts_as_no_where_one_does_that_it_depends_on",
    ),
    Defect(
        "a-cut-answers-number-counts",
        SHIPPED,
        "flow_grpo/rewards/judges/chat.py",
        'in ("length", "content_filter")',
        'in ("content_filter",)',
        f"{TEST}test_a_grade_that_was_cut_or_refused_is_no_grade",
    ),
    Defect(
        "a-protocol-gives-way-to-a-flag",
        "benchmarks whose settings are defaults",
        PROTOCOL,
        "if was_given and keys.get(config, name) != value:",
        "if was_given:\n                continue\n            if False:",
        "test_protocols.py::test_a_deviation_is_refused_before_weights_load",
    ),
    Defect(
        "a-config-s-keys-stay-under-a-protocol",
        SLIP,
        PROTOCOL,
        'keys.parent(config, name)[name.rpartition(".")[2]] = value',
        "pass",
        "test_protocols.py::test_guidance_follows_the_pipelines_class",
    ),
    Defect(
        "training-s-grid-at-another-size",
        SLIP,
        "flow_grpo/evaluation/evaluate.py",
        "replace(evaluator, size=size) for size in",
        "replace(evaluator, size=evaluator.size) for size in",
        "test_eval_sizes.py::test_a_run_is_evaluated_at_other_sizes_and_trains_as_it_would",
    ),
    Defect(
        "rows-that-are-there-are-drawn-again",
        SLIP,
        "flow_grpo/evaluation/evaluate.py",
        "batches = [batch for batch in batches if not done >= set(batch)]",
        "batches = list(batches)",
        "test_protocols.py::test_an_evaluation_that_was_stopped_goes_on",
    ),
    Defect(
        "an-evaluation-goes-on-with-other-settings",
        SLIP,
        "flow_grpo/evaluation/kept.py",
        "if changed := [key for key in made_with if before.get(key) != json.loads(text)[key]]:",
        "if changed := []:",
        "test_protocols.py::test_an_evaluation_that_was_stopped_goes_on",
    ),
]
