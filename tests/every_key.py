"""Ignore a key of the config, as code would that took its default: the test named here must fail.

    python tests/every_key.py [key ...] [--jobs 2]

A key that its test lets be ignored is a hole in the tests.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_collections
import mutants

from config.base import COMMON
from flow_grpo.objectives.registry import OBJECTIVES
from flow_grpo.rewards import loading

TESTS = Path(__file__).parent
DECLARED = dict(COMMON)
for each in OBJECTIVES.values():
    DECLARED |= each.keys

SEEN = "every_key.py::test_a_key_is_seen_where_it_belongs"  # by the key
BY_TEST = {  # the keys that a test needs, "test_" left out before each; {key} is the key
    f"{SEEN}[{{key}}]": "seed num_epochs eval_split eval_max_samples height width run_name "
    "max_sequence_length mixed_precision allow_tf32 use_lora compile reward_fn "
    "objective sample.num_steps sample.eval_num_steps sample.guidance_scale "
    "sample.eval_guidance_scale sample.noise_level sample.sde_type sample.same_latent "
    "sample.train_batch_size sample.num_batches_per_epoch sample.num_image_per_prompt "
    "sample.solver sample.clean_grid "
    "train.batch_size train.gradient_accumulation_steps train.num_inner_epochs train.ema "
    "train.learning_rate train.adam_beta1 train.adam_beta2 train.adam_epsilon "
    "train.adam_weight_decay train.ema_decay train.lora_rank train.lora_alpha train.lora_targets",
    "every_key.py::test_eight_bits_are_those_of_bitsandbytes": "train.use_8bit_adam",
    "every_key.py::test_wandb_gets_the_project_s_name": "project_name",
    "every_key.py::test_a_server_is_called_as_it_is_told": "reward_urls reward_timeout "
    "reward_token_file reward_encoding",
    "every_key.py::test_a_judge_is_asked_as_it_is_told[unifiedreward]": "rewards.judge_concurrency "
    "rewards.unifiedreward_url rewards.unifiedreward_model rewards.judge_timeout_s",
    "every_key.py::test_a_judge_is_asked_as_it_is_told[qwenvl]": "rewards.qwenvl_url "
    "rewards.qwenvl_model",
    "every_key.py::test_a_judge_is_asked_as_it_is_told[vlm]": "rewards.vlm_url rewards.vlm_model",
    "every_key.py::test_a_judge_of_the_process_is_the_one_that_it_is_told": "rewards.vlm "
    "rewards.vlm_revision rewards.vlm_batch_size",
    "probability.py::test_a_rubric_is_the_weighted_mean_of_its_questions": "rewards.rubric",
    "every_key.py::test_processes_read_as_they_are_told": "rewards.ocr_processes rewards.ocr_side "
    "ocr_engine",
    "every_key.py::test_embeddings_are_kept_where_it_is_told": "encoder_cache logdir",
    "every_key.py::test_a_reward_loads_from_where_it_is_told[{key}]": "rewards.clip "
    "rewards.pickscore rewards.hpsv2 rewards.imagereward rewards.geneval_detector "
    "rewards.siglip",
    "preflight.py::test_a_model_of_the_hub_comes_with_the_command_that_downloads_it": ""
    "pretrained.revision",
    "names.py::test_a_tracker_whose_package_is_missing_is_refused": "tracker",
    "resume.py::test_four_epochs_equal_two_and_a_resume_and_two": "save_freq resume_from",
    "report.py::test_a_browser_shows_the_curves_the_images_and_the_numbers": "eval_freq",
    "preflight.py::test_the_plan_is_the_epochs_arithmetic": "dataset",
    "state.py::test_a_learning_rate_of_zero_changes_no_weight_and_no_evaluation": ""
    "pretrained.model resolution",
    "eval_sizes.py::test_the_script_draws_at_that_size_too": "sample.eval_sizes",
    "state.py::test_old_checkpoints_are_pruned_and_nothing_half_written_stays": ""
    "num_checkpoint_limit",
    "watch.py::test_a_collective_waits_as_long_as_it_is_told": "collective_timeout",
    "full_disks.py::test_a_run_may_go_on_without_a_checkpoint": "on_save_error",
    "reward_runs.py::test_gdpo_trains_its_own_sum_and_masks_what_lacks_a_reward": ""
    "reward_aggregation",
    "reward_runs.py::test_a_server_s_own_comparing_reward_gets_whole_groups": "eval_reward_fn",
    "reward_runs.py::test_the_alarm_is_raised_when_the_held_out_reward_falls": "hacking_alarm",
    "reward_runs.py::test_masked_pictures_leave_their_groups_and_the_others_train": ""
    "on_reward_error",
    "reward_runs.py::test_the_fraction_is_of_the_pictures_of_an_epoch": "max_masked_fraction",
    "reward_runs.py::test_a_run_scored_over_http_is_the_run_scored_here": "sample.test_batch_size",
    "encoders.py::test_the_key_follows_all_that_an_embedding_depends_on": "reference_area",
    "encoders.py::test_the_three_modes_draw_the_same_pictures[sd3]": "encoders",
    "models_run.py::"
    "test_a_model_trains_and_its_lora_gives_the_same_picture_in_a_stock_pipeline[wan]": ""
    "num_frames",
    "memory_keys.py::test_checkpointed_activations_give_the_same_gradient[sd3]": ""
    "activation_checkpointing",
    "bagel_folder.py::test_the_interval_of_a_config_reaches_the_model": "sample.guidance_interval",
    "memory_keys.py::test_what_waits_on_the_host_changes_no_bit[nft]": "offload",
    "memory_keys.py::test_the_keys_reach_the_model": "attention_backend vae_tiling vae_slicing "
    "sample.batched_guidance",
    "windows.py::test_starts_cover_the_range_evenly_and_nothing_else": "sample.sde_window_size "
    "sample.sde_window_range",
    "windows.py::test_fixed_steps_are_those_of_every_group": "sample.sde_steps",
    "advantages.py::test_targets_are_clamped_group_advantages": "sample.global_std "
    "train.adv_clip_max",
    "state.py::test_warm_up_and_decay_reach_the_optimizer": "train.lr_scheduler "
    "train.lr_warmup_steps",
    "rescue.py::test_a_run_that_ends_among_its_updates_goes_on_as_if_it_had_not": ""
    "train.hold_start",
    "accumulation.py::test_the_update_is_the_weighted_mean_of_unequal_micro_batches": ""
    "train.max_grad_norm",
    "overflow.py::test_updates_that_stay_non_finite_stop_the_run": "train.max_nonfinite_updates",
    "guidance.py::test_a_run_trains_the_guidance_of_its_model": "train.cfg",
    "guidance.py::test_the_reference_may_be_guided_where_neither_images_nor_policy_are": ""
    "train.reference_guidance",
    "state.py::test_the_ema_follows_every_update_by_its_schedule": "train.ema_update_every",
    "toy.py::test_the_reward_stays_where_advantages_are_dealt_at_random": ""
    "train.shuffle_advantages",
    "lora.py::test_a_peft_adapter_gives_the_velocity_that_it_gave_when_it_was_saved": ""
    "train.lora_path",
    "clip_rewards.py::test_score_is_the_scaled_cosine_of_picture_and_prompt": ""
    "rewards.pickscore_processor",
    "clip_rewards.py::test_aesthetic_is_the_mlp_on_the_unit_features": "rewards.aesthetic_head",
    "hacking.py::test_diversity_by_features_is_the_mean_distance_from_the_others_of_a_group": ""
    "rewards.dino",
    "trained_judges.py::test_aesthetic_v2_5_is_the_mlp_on_siglips_unit_features": ""
    "rewards.aesthetic_v2_5_head",
    "hpsv2.py::test_score_is_the_cosine_of_open_clips_model_done_by_hand": ""
    "rewards.hpsv2_processor",
    "hpsv3.py::test_score_is_the_mean_of_the_packages_distribution": "rewards.hpsv3",
    "imagereward.py::test_score_is_the_authors_model_done_by_hand": "rewards.imagereward_tokenizer",
    "geneval.py::test_scores_are_the_rules_verdicts_on_what_was_found": "rewards.geneval_score",
    "deqa.py::test_score_is_the_opinion_divided_by_five": "rewards.deqa",
    "deqa.py::test_that_commit_is_of_the_weights_and_of_the_code": "rewards.deqa_revision",
    "judges.py::test_a_template_of_ones_own_replaces_the_reward_s": "rewards.judge_templates",
    "grpo.py::test_a_ratio_beyond_the_clip_range_keeps_only_the_gradient_that_leads_back": ""
    "train.clip_range",
    "grpo.py::test_rows_at_different_steps_have_the_loss_that_they_have_alone": ""
    "train.old_log_prob",
    "grpo.py::"
    "test_a_run_may_start_with_a_tenth_of_the_clip_range_or_replaying_with_its_tolerance": ""
    "train.gate_tolerance",
    "grpo.py::test_std_weights_are_each_steps_std_over_their_mean": "train.step_weight",
    "grpo.py::test_the_kl_to_the_reference_has_this_value_and_gradient": "train.beta train.kl_mode",
    "ratio_objectives.py::test_a_side_of_the_clip_range_may_have_its_own_width": ""
    "train.clip_range_lt train.clip_range_gt",
    "ratio_objectives.py::test_the_gate_then_measures_nats": "train.clip_nats dppo.threshold",
    "preference.py::test_online_the_weights_that_sample_become_the_policys_every_so_many_steps": ""
    "train.ref_update_step",
    "preference.py::test_rows_that_do_not_train_are_not_counted_as_forwards": "dpo.num_times "
    "sft.num_times",
    "preference.py::test_levels_may_be_drawn_evenly[{key}]": "dpo.density sft.density",
    "preference.py::test_levels_may_be_those_of_fixed_steps_for_every_image[dpo]": "dpo.steps",
    "preference.py::test_levels_may_be_those_of_fixed_steps_for_every_image[sft]": "sft.steps",
    "preference.py::test_rwr_trains_all_scored_rows_by_their_raw_rewards": "sft.weights",
    "windows.py::test_a_subset_holds_distinct_ascending_steps_each_as_often_as_another": ""
    "sample.sde_window",
    "windows.py::test_a_progressive_window_moves_on_and_rolls_back_as_mixgrpos": ""
    "sample.window_stride sample.window_rolls_back",
    "windows.py::test_a_progressive_windows_dwell_falls_as_mixgrpos": "sample.window_decay "
    "sample.window_decay_from",
    "windows.py::test_a_progressive_window_stays_as_long_as_it_is_told": "sample.window_dwell",
    "windows.py::test_an_impossible_branching_is_refused_with_key_value_and_remedy": ""
    "sample.branching",
    "advantages.py::test_an_objective_divides_as_its_keys_say": "sample.advantage_std "
    "sample.unbiased_std",
    "branching.py::test_groups_of_equal_scores_are_dropped_and_cost_nothing": ""
    "train.drop_equal_groups",
    "branching.py::test_the_best_and_the_worst_of_a_group_train_with_the_advantages_of_all": ""
    "train.best_and_worst",
    "stacking.py::test_stacked_points_give_the_same_update_in_fewer_calls[nft]": ""
    "train.stacked_points",
    "branching.py::test_of_a_tree_some_depths_train_that_move_on_with_the_epochs": ""
    "train.tree_depths train.tree_dwell",
    "collect.py::test_a_reward_is_less_by_its_paths_distance_from_the_reference": "train.reward_kl",
    "merged.py::test_a_rollout_is_that_of_the_adapter_which_it_does_not_call[epg]": ""
    "sample.merged_lora",
    "refill.py::test_as_many_groups_train_as_planned": "sample.max_refills",
    "offline.py::test_it_trains_without_drawing_or_asking_a_reward": "sample.source",
    "nft.py::test_the_fixture_has_these_losses": "nft.beta nft.kl_beta",
    "nft.py::test_an_epoch_moves_the_old_policy_towards_the_policy": "nft.decay",
    "nft.py::test_a_noising_depends_on_epoch_pass_group_member_and_time_alone": "nft.num_times",
    "nft.py::test_fixed_steps_give_every_picture_the_same_noise_levels": "nft.steps",
    "noising.py::test_as_many_noisings_are_drawn_as_asked_for": "forward.num_times forward.steps",
    "noising.py::test_strata_have_one_level_each_anywhere_in_it": "forward.levels",
    "noising.py::test_a_shift_moves_every_level_by_the_same_formula": "forward.shift",
    "noising.py::test_levels_may_be_a_groups_or_everyones": "forward.levels_of",
    "noising.py::test_a_noise_may_be_a_groups": "forward.noise_of",
    "noising.py::test_an_antithetic_pair_has_one_level_and_opposite_noises": "forward.antithetic",
    "forward.py::test_what_a_loss_is_anchored_to_is_held_and_pulls": "forward.kl_beta "
    "forward.ema_beta",
    "forward.py::"
    "test_the_fast_average_and_the_reference_move_with_updates_and_the_old_policy_with_epochs": ""
    "forward.decay forward.reset_every",
    "forward.py::test_the_reference_becomes_the_policy_where_it_is_too_far": "forward.reset_kl",
    "forward.py::test_the_ratio_of_velocities_norms_is_measured_and_its_excess_costs": ""
    "forward.norm_beta",
    "forward.py::"
    "test_uncertain_images_are_those_of_the_run_that_a_reward_of_weight_0_sees_lower": ""
    "forward.uncertain",
    "forward.py::test_awm_has_this_loss": "awm.weighting awm.clip_range",
    "forward.py::test_awm_takes_another_power_and_divides_its_advantages_by_their_bound": ""
    "awm.power",
    "forward.py::test_vgrpo_has_this_loss": "vgrpo.clip_range vgrpo.old_beta",
    "forward.py::test_vgrpos_advantages_may_be_bounded_by_a_tanh": "vgrpo.squash",
    "forward.py::test_epg_has_this_loss": "epg.weighting epg.proximal",
    "forward.py::test_ram_has_this_loss_and_gradient": "ram.scale",
    "forward.py::test_crd_has_this_loss": "crd.beta crd.loss crd.temperature",
    "forward.py::test_crds_pull_to_the_reference_grows_with_the_reward": "crd.least_pull",
    "forward.py::test_dgpos_exact_loss_of_a_pair_is_dpos_and_its_gradient_beta_times_ours": ""
    "dgpo.beta",
    "forward.py::test_dgpo_drops_the_gradient_of_rows_that_went_on_where_they_were_pushed": ""
    "dgpo.clip_range",
    "forward.py::test_a_fast_average_may_roll_out_and_be_compared_with": "dgpo.reference "
    "dgpo.fast_from",
}
FOUND_BY = {
    key: "test_" + test.format(key=key) for test, keys in BY_TEST.items() for key in keys.split()
}


def give_default(name: str) -> None:
    """From now on let every config, and all settings of rewards, have a key's default."""
    section, _, last = name.rpartition(".")
    before, default = f"{section}." if section else "", DECLARED[name].default
    if isinstance(default, dict):
        default = ml_collections.ConfigDict(default)
    names = [key.removeprefix(before) for key in COMMON if key.startswith(before)]
    names = names or [key.removeprefix(before) for key in DECLARED if key.startswith(before)]
    beside = {key.partition(".")[0] for key in names} - {last}  # by which its section is known
    honest = ml_collections.ConfigDict.__getitem__

    def get(config, key):
        return default if key == last and beside <= config._fields.keys() else honest(config, key)

    ml_collections.ConfigDict.__getitem__ = get
    if section == "rewards":
        for function in (loading.load, loading.check):
            vars(loading)[function.__name__] = lambda reward, settings, *rest, f=function: f(
                reward, {**settings, last: default}, *rest
            )


def ignore(key: str) -> tuple[bool, str]:
    """Run a key's test where all code ignores it; return whether it failed, and what was said."""
    with mutants.copied() as folder:
        with (folder / "tests" / "conftest.py").open("a") as file:
            file.write(f"\nimport every_key\n\nevery_key.give_default({key!r})\n")
        cases, output = mutants.run_tests(folder, [FOUND_BY[key]])
    found = [each for case in cases for kind in ("failure", "error") for each in case.iter(kind)]
    return bool(found), " ".join((found[0].get("message", "") if found else output).split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("keys", nargs="*", metavar="key", help="all of them, if none is named")
    parser.add_argument("--jobs", type=int, default=1, help="keys tried out at a time")
    arguments = parser.parse_args()
    chosen, num_found = arguments.keys or list(FOUND_BY), 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for key, (failed, said) in zip(chosen, pool.map(ignore, chosen), strict=True):
            print(f"{key}: {'found' if failed else 'IGNORED'} by {FOUND_BY[key]}: {said:.150}")
            num_found += failed
    print(f"{num_found} of {len(chosen)} found")
    return 0 if num_found == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
