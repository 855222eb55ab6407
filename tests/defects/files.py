"""Defects of readers of files that a user, an accident or an enemy has written."""

from defects.defect import SLIP, Defect

INPUTS = "flow_grpo/inputs.py"
PICTURES = "flow_grpo/rewards/pictures.py"
STATE = "flow_grpo/parallel/state.py"
ENGINE = "flow_grpo/parallel/engine.py"
FOLDERS = "flow_grpo/training/folders.py"
LORA = "flow_grpo/diffusers_patch/disk/lora.py"
SETTINGS = "flow_grpo/diffusers_patch/disk/settings.py"

DEFECTS = [
    Defect(
        "counters-taken-as-they-come",
        "found by tests/fuzz_checkpoints.py",
        FOLDERS,
        "if type(state[key]) is not int or not 0 <= state[key] < 2**53:",
        "if key not in state:",
        "test_digests.py::test_counters_that_no_run_wrote_are_refused_whatever_the_digest_says",
    ),
    Defect(
        "moments-of-another-dtype",
        "found by tests/fuzz_checkpoints.py",
        STATE,
        "(value.shape, value.dtype) != (like.shape, like.dtype)",
        "value.shape != like.shape",
        "test_digests.py::test_a_forged_state_changes_nothing",
    ),
    Defect(
        "an-average-that-is-missing",
        "found by tests/fuzz_checkpoints.py: refused when the policy had been replaced",
        ENGINE,
        "(POLICY, *copies)",
        "(POLICY,)",
        "test_digests.py::test_a_forged_state_changes_nothing",
        error="KeyError",
    ),
    Defect(
        "negative-second-moments",
        "found by tests/fuzz_checkpoints.py",
        STATE,
        'elif name.endswith(("/step", "/exp_avg_sq")) and (value < 0).any():',
        "elif not name:",
        "test_digests.py::test_a_forged_state_changes_nothing",
    ),
    Defect(
        "tiff-mapped-into-memory",
        "found by tests/fuzz_data.py, in Pillow 13",
        INPUTS,
        "Image.open(file) as image",
        "Image.open(path) as image",
        "test_odd_files.py::test_a_turned_tiff_is_read_whatever_its_mode",
    ),
    Defect(
        "a-bomb-is-decoded",
        "found by tests/fuzz_data.py",
        INPUTS,
        "if math.prod(image.size) > MAX_PIXELS:",
        "if max(image.size) > MAX_PIXELS:",
        "test_odd_files.py::test_a_small_file_of_an_enormous_picture_is_refused_unread",
    ),
    Defect(
        "the-last-of-two-keys-counts",
        "found by tests/fuzz_data.py",
        INPUTS,
        "if len(found) < len(pairs):",
        "if len(found) > len(pairs):",
        "test_odd_files.py::test_a_key_that_stands_twice_is_refused",
    ),
    Defect(
        "prompts-that-are-no-file-are-passed-over",
        "found by tests/fuzz_data.py",
        PICTURES,
        "if os.path.lexists(lines):",
        "if lines.is_file():",
        "test_odd_files.py::test_what_says_the_prompts_of_pictures_is_not_passed_over",
    ),
    Defect(
        "integers-as-a-lora",
        "found by tests/fuzz_lora.py",
        LORA,
        "value.ndim > 1 and value.numel() and value.is_floating_point()",
        "value.ndim > 1 and value.numel()",
        "test_lora_damage.py::test_a_matrix_that_does_not_fit_or_holds_no_numbers_adds_nothing",
    ),
    Defect(
        "rank-for-its-root",
        SLIP,
        SETTINGS,
        "(math.sqrt(rank) if",
        "(rank if",
        "test_lora_damage.py::test_what_is_said_of_it_counts",
    ),
    Defect(
        "a-last-pattern-counts",
        SLIP,
        SETTINGS,
        "for k, v in self.alphas.items() if",
        "for k, v in reversed(self.alphas.items()) if",
        "test_lora_damage.py::test_what_is_said_of_it_counts",
    ),
    Defect(
        "a-start-that-moves-the-base",
        "PiSSA's A and B stand for the base's own directions, which it takes out of the base",
        SETTINGS,
        "start.lower().startswith(MOVES_BASE)",
        "start.startswith(MOVES_BASE)",
        "test_lora_damage.py::test_what_is_said_of_it_must_be_what_peft_says_of_a_plain_lora",
    ),
]
