"""Defects in reading what users bring: LoRAs, pictures, text, judges' answers, own rewards."""

from defects.defect import SHIPPED, SLIP, Defect

LORA = "flow_grpo/diffusers_patch/disk/lora.py"
FILES = "flow_grpo/diffusers_patch/disk/files.py"
INPUTS = "flow_grpo/inputs.py"
PICTURES = "flow_grpo/rewards/pictures.py"
QUOTED = "flow_grpo/rewards/rules/quoted.py"
JUDGE = "flow_grpo/rewards/judges/judge.py"
LOADING = "flow_grpo/rewards/loading.py"
WRONG = 'wrong = found["sign"] or listed or other or _MORE.match(rest)'

DEFECTS = [
    Defect(
        "alphas-beside-the-weights-dropped",
        "diffusers, where network_alphas are not asked for",
        LORA,
        'own = float(parts.get("alpha", rank))',
        "own = float(rank)",
        "test_lora_layouts.py::"
        "test_a_lora_has_its_strength_in_its_layers_and_nowhere_else[sd3-diffusers with alphas]",
    ),
    Defect(
        "alpha-of-the-metadata-dropped",
        "readers of tensors alone",
        LORA,
        "stated = said.alpha_of(name, rank)",
        "stated = float(rank)",
        "test_lora_layouts.py::"
        "test_a_lora_has_its_strength_in_its_layers_and_nowhere_else[sd3-diffusers with metadata]",
    ),
    Defect(
        "alpha-dropped-where-names-are-converted",
        SLIP,
        LORA,
        'each["B"] * (each.get("alpha", rank) / rank)',
        'each["B"]',
        "test_lora_layouts.py::test_the_original_names_and_fused_layers_are_read",
    ),
    Defect(
        "warm-start-at-another-strength",
        SLIP,
        LORA,
        "(lora.alphas[name] / (alpha or 1.0))",
        "1.0",
        "test_lora_exports.py::test_an_export_trains_on_as_it_was_whatever_its_alpha[sd3]",
    ),
    Defect(
        "export-at-half-its-strength",
        "alpha / rank in the metadata alone, which ComfyUI does not read",
        LORA,
        "(value * scale).contiguous()",
        "value.contiguous()",
        "test_lora_exports.py::test_an_export_without_its_metadata_gives_the_trained_picture[sd3]",
    ),
    Defect(
        "part-of-a-lora-left-out",
        "diffusers warns of unexpected keys and goes on",
        LORA,
        "    if missing or unknown or not named:\n",
        "    if missing or not named:\n",
        "test_lora_layouts.py::test_what_would_not_be_the_same_is_refused",
    ),
    Defect(
        "cut-file-read",
        SLIP,
        FILES,
        "whole = size == 8 + length + max(ends, default=0)",
        "whole = bool(held) or not ends",
        "test_model_folders.py::test_what_a_folder_lacks_is_named_before_weights_load",
    ),
    Defect(
        "exif-ignored",
        SHIPPED,
        INPUTS,
        "ImageOps.exif_transpose(frame)",
        "frame",
        "test_inputs.py::test_a_picture_is_turned_as_its_exif_says",
    ),
    Defect(
        "size-before-it-is-turned",
        "buckets by the stored size",
        INPUTS,
        "return image.size[::-1] if turned else image.size",
        "return image.size",
        "test_inputs.py::test_a_jpeg_is_turned_too",
    ),
    Defect(
        "sixteen-bits-clipped",
        "PIL's convert() of 16 bits to 8",
        INPUTS,
        'if image.mode in ("I", "F") or image.mode.startswith("I;16"):',
        "if False:",
        "test_inputs.py::test_deeper_pictures_are_scaled",
    ),
    Defect(
        "transparency-over-black",
        "PIL's convert() to RGB",
        INPUTS,
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        "test_inputs.py::test_what_is_transparent_shows_white",
    ),
    Defect(
        "byte-order-mark-kept",
        SHIPPED,
        INPUTS,
        'read_text(encoding="utf-8-sig")',
        'read_text(encoding="utf-8")',
        "test_inputs.py::test_a_token_has_no_mark",
        error="ValueError: key=",
    ),
    Defect(
        "marks-kept-at-a-line-s-ends",
        "files joined by cat",
        INPUTS,
        "line.strip(EDGES)) for n",
        "line.strip()) for n",
        "test_inputs.py::test_prompts_and_rows_and_lines_of_pictures_are_read_by_one_rule",
    ),
    Defect(
        "ten-before-two",
        "sorted as text",
        PICTURES,
        "sorted(shown, key=_number)",
        "sorted(shown)",
        "test_inputs.py::test_numbered_pictures_are_sorted_as_numbers",
    ),
    Defect(
        "inches-open-a-quote",
        "prompt.split('\"')[1], in published rewards",
        QUOTED,
        "        if digits or apart:\n",
        "        if False:\n",
        "test_ocr.py::test_inches_open_no_quote_and_quotes_are_paired",
        error="ValueError: the prompt",
    ),
    Defect(
        "odd-quotes-taken",
        SLIP,
        QUOTED,
        "    if odd is not None:\n",
        "    if False:\n",
        "test_ocr.py::test_a_prompt_with_an_odd_mark_is_refused_with_its_row",
    ),
    Defect(
        "typographic-variants-differ",
        "a perfect picture of it’s does not score 1",
        QUOTED,
        'unicodedata.normalize("NFKC", text.translate(_SAME)).translate(_SAME).lower()',
        "text.lower()",
        "test_ocr.py::test_a_text_that_looks_the_same_scores_1",
    ),
    Defect(
        "range-read-as-its-first-number",
        "re.search(r'\\d+') in published judges",
        JUDGE,
        WRONG,
        WRONG.replace(" or _MORE.match(rest)", ""),
        "test_judge_answers.py::test_a_score_is_a_number_that_was_given_on_the_judge_s_scale_or_nan",
    ),
    Defect(
        "minus-sign-dropped",
        "re.search(r'\\d+') in published judges",
        JUDGE,
        WRONG,
        WRONG.replace('found["sign"] or ', ""),
        "test_judge_answers.py::test_a_score_is_a_number_that_was_given_on_the_judge_s_scale_or_nan",
    ),
    Defect(
        "another-scale-s-number-taken",
        "8/10 read as 8",
        JUDGE,
        WRONG,
        WRONG.replace(" or other", ""),
        "test_judge_answers.py::test_a_score_is_a_number_that_was_given_on_the_judge_s_scale_or_nan",
    ),
    Defect(
        "own-reward-writes-into-the-batch",
        SLIP,
        LOADING,
        "return [copy.deepcopy(v) for v in values] if isinstance(values, list)",
        "return values if isinstance(values, list)",
        "test_own_rewards.py::test_what_a_function_writes_into_is_its_own",
        error="RuntimeError: reward 'my_rewards:scribbles' failed",
    ),
    Defect(
        "wan-without-its-average",
        "the published run has train.ema=True",
        "config/grpo.py",
        '    config.train.kl_mode = "kl_true"\n    config.train.ema = True\n',
        '    config.train.kl_mode = "kl_true"\n',
        "test_known_runs.py::test_the_average_is_kept_where_the_published_run_keeps_one",
    ),
]
