"""Defects of BAGEL: what its model, guidance, time, patches or grid could be mistaken for."""

from defects.defect import SHIPPED, SLIP, Defect

FOLDER = "flow_grpo/diffusers_patch/bagel"
TRANSFORMER, PIPELINE = f"{FOLDER}/transformer.py", f"{FOLDER}/pipeline.py"
FORMULAS = "test_bagel.py::test_two_prompts_in_a_call_have_the_velocities_of_the_formulas"

DEFECTS = [
    Defect(
        "bagel-marks-by-the-generation-expert",
        "all tokens of a step through one expert",
        TRANSFORMER,
        "theirs = self.project(UNDERSTANDING, marks, rope)",
        "theirs = self.project(GENERATION, marks, rope)",
        FORMULAS,
    ),
    Defect(
        "bagel-marks-with-the-time",
        "the time added to the whole sequence",
        TRANSFORMER,
        "marks = model.embed_tokens(ids).expand(len(image), -1, -1)",
        "marks = model.embed_tokens(ids) + self.time_embedder(timestep)[:, None]",
        FORMULAS,
    ),
    Defect(
        "bagel-positions-that-count-on",
        "L + i, as in a language model",
        TRANSFORMER,
        "ours = self.project(GENERATION, image, rope)",
        "width = rope[0].shape[-1]\n"
        "        count = 1e6 ** (-torch.arange(0, width, 2) / width).repeat(2)\n"
        "        count = torch.arange(image.shape[1])[:, None, None] * count\n"
        "        turn = torch.complex(*rope) * torch.exp(1j * count)\n"
        "        ours = self.project(GENERATION, image, (turn.real, turn.imag))",
        FORMULAS,
    ),
    Defect(
        "bagel-guidance-by-an-empty-prompt",
        "what other models subtract",
        f"{FOLDER}/bagel.py",
        'return Cond({"embeds": self.pipe.no_text().flatten(1)})',
        'return self.encode("", (), max_length)',
        FORMULAS,
    ),
    Defect(
        "bagel-norm-over-the-batch",
        SHIPPED,
        PIPELINE,
        "(each.norm(dim=(1, 2), keepdim=True) for each in (conditional, found))",
        "(each.norm() for each in (conditional, found))",
        "test_bagel.py::test_each_picture_is_rescaled_by_its_own_norms",
    ),
    Defect(
        "bagel-guidance-without-its-norm",
        SLIP,
        PIPELINE,
        "return found * (wanted / (norm + 1e-8)).clamp(guidance.rescale, 1.0)",
        "return found",
        FORMULAS,
    ),
    Defect(
        "bagel-channel-first-patches",
        "FLUX's order",
        PIPELINE,
        "return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)",
        "return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)",
        "test_bagel.py::test_a_patch_counts_rows_then_columns_then_channels",
    ),
    Defect(
        "bagel-time-in-thousands",
        "as other transformers are told it",
        TRANSFORMER,
        "angles = time[:, None].float() * torch.exp(",
        "angles = 1000 * time[:, None].float() * torch.exp(",
        FORMULAS,
    ),
    Defect(
        "bagel-as-many-steps-as-points",
        "as many as points, of which the last is the picture",
        PIPELINE,
        "return torch.linspace(1, 0, num_steps + 1)[:-1].tolist()",
        "return torch.linspace(1, 0, num_steps + 2)[:-2].tolist()",
        "test_bagel.py::test_time_is_told_as_it_is_and_moves_along_a_shifted_line_of_n_points",
    ),
    Defect(
        "bagel-picture-by-the-understanding-expert",
        "its output and MLP at least",
        TRANSFORMER,
        "image = self.finish(GENERATION, image, heard[:, 2:])",
        "image = self.finish(UNDERSTANDING, image, heard[:, 2:])",
        FORMULAS,
    ),
    Defect(
        "bagel-text-that-hears-what-follows",
        SLIP,
        TRANSFORMER,
        "heard = self.self_attn.attend(query, key, value, None, causal=True)",
        "heard = self.self_attn.attend(query, key, value, None)",
        FORMULAS,
    ),
    Defect(
        "bagel-padding-is-heard",
        "a neighbour's longer prompt leaks into a row",
        f"{FOLDER}/bagel.py",
        "if lengths.min() < width:",
        "if lengths.min() > width:",
        FORMULAS,
    ),
    Defect(
        "bagel-a-table-row-too-narrow",
        "places counted by the picture's width",
        TRANSFORMER,
        "unflatten(0, (side, side))[:rows, :columns]",
        "unflatten(0, (side, side)).flatten(0, 1)[: rows * columns].unflatten(0, (rows, columns))",
        FORMULAS,
    ),
    Defect(
        "bagel-keys-and-values-that-go-stale",
        "the understanding expert trains too",
        "flow_grpo/diffusers_patch/weights.py",
        "if strays := [name for name in modules if cls.trained_part not in name]:",
        "if strays := []:",
        "test_bagel_folder.py::test_what_it_can_not_do_is_refused_before_weights_load",
    ),
    Defect(
        "bagel-trained-in-the-frozen-precision",
        "16-bit master weights, of which runs collapsed",
        f"{FOLDER}/folder.py",
        "kind = trained_dtype if GENERATION in name else dtype",
        "kind = dtype",
        "test_bagel_folder.py::test_only_the_expert_that_trains_is_in_fp32_for_a_full_fine_tune",
    ),
]
