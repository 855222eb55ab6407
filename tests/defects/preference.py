"""Defects of what trains on pairs and on chosen images."""

from defects.defect import SHIPPED, SLIP, Defect

DPO = "flow_grpo/objectives/preference/dpo.py"
SFT = "flow_grpo/objectives/preference/sft.py"
NOISING = "flow_grpo/objectives/forward/noising.py"

DEFECTS = [
    Defect(
        "pair-swapped",
        SLIP,
        DPO,
        "pairs.append(np.array([best, worst]))",
        "pairs.append(np.array([worst, best]))",
        "test_preference.py::test_no_pair_is_split_and_all_ranks_make_equally_many_calls",
    ),
    Defect(
        "margin-sign",
        SLIP,
        DPO,
        "margin = -self.beta / 2",
        "margin = self.beta / 2",
        "test_preference.py::test_the_dpo_fixture_has_this_loss",
    ),
    Defect(
        "margin-without-its-half",
        SLIP,
        DPO,
        "margin = -self.beta / 2 *",
        "margin = -self.beta *",
        "test_preference.py::test_the_dpo_fixture_has_this_loss",
    ),
    Defect(
        "dpo-without-its-reference",
        SLIP,
        DPO,
        "error(velocity, rows, point) - error(known",
        "error(velocity, rows, point) - 0 * error(known",
        "test_preference.py::test_the_dpo_fixture_has_this_loss",
    ),
    Defect(
        "pair-of-equal-scores",
        SHIPPED,
        DPO,
        "if scores[best] > scores[worst]:",
        "if best != worst or True:",
        "test_preference.py::test_a_pair_is_the_first_best_and_the_first_worst_of_a_group_with_both",
    ),
    Defect(
        "pair-of-two-noises",
        SLIP,
        NOISING,
        'return [(row.group, k) if of == "group"',
        'return [(row.group, row.member, k) if of == "group"',
        "test_preference.py::test_a_pair_is_noised_alike_and_pairs_differ",
    ),
    Defect(
        "sft-without-its-weights",
        "weights left out where beta is 0, in a published trainer",
        SFT,
        'rows.at("advantages", point.column) * errors',
        "errors",
        "test_preference.py::test_the_sft_fixture_has_this_loss_with_and_without_the_kl",
    ),
    Defect(
        "all-of-a-group-are-best",
        SLIP,
        SFT,
        "weights *= scored == highest[group]",
        "weights *= scored <= highest[group]",
        "test_preference.py::test_the_best_of_a_group_train_all_ties_and_no_other_row",
    ),
    Defect(
        "reference-never-moves",
        "a reference without an adapter under LoRA has nothing to move",
        "flow_grpo/objectives/preference/reference.py",
        "if every and num_updates % every == 0:",
        "if every and num_updates % every == every:",
        "test_preference.py::test_online_the_weights_that_sample_become_the_policys_every_so_many_steps",
    ),
    Defect(
        "density-uniform",
        SLIP,
        NOISING,
        'if self.levels != "logit_normal":',
        "if self.levels:",
        "test_preference.py::test_logit_normal_levels_lie_about_the_middle_of_the_grid",
    ),
]
