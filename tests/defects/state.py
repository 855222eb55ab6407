"""Defects of what a run saves, of how it ends, and of keys that nobody reads."""

from defects.defect import SLIP, Defect

LOOP = "flow_grpo/training/loop.py"
DIGESTS = "flow_grpo/training/digests.py"
CHECKPOINT = "flow_grpo/training/checkpoint.py"
ENGINE = "flow_grpo/parallel/engine.py"
OPTIMIZER = "flow_grpo/training/optimizer.py"
SNAPSHOTS = "flow_grpo/training/snapshots.py"
PROVENANCE = "flow_grpo/launch/provenance.py"
WATCH = "flow_grpo/parallel/faults/watch.py"

DEFECTS = [
    Defect(
        "adam-beta2-is-a-constant",
        SLIP,
        OPTIMIZER,
        "betas=(train.adam_beta1, train.adam_beta2)",
        "betas=(train.adam_beta1, 0.999)",
        "test_every_key.py::test_a_key_is_seen_where_it_belongs[train.adam_beta2]",
    ),
    Defect(
        "skipped-updates-forgotten-by-a-resume",
        SLIP,
        CHECKPOINT,
        'run.updater.num_skipped = state["num_skipped"]',
        "pass",
        "test_saved_state.py::test_a_number_that_was_altered_is_the_resumed_run_s[num_skipped]",
    ),
    Defect(
        "skips-in-a-row-forgotten-by-a-resume",
        SLIP,
        CHECKPOINT,
        'run.updater.num_skipped_in_a_row = state.get("num_skipped_in_a_row", 0)',
        "pass",
        "test_saved_state.py::"
        "test_a_number_that_was_altered_is_the_resumed_run_s[num_skipped_in_a_row]",
    ),
    Defect(
        "loss-scale-forgotten-by-a-resume",
        SLIP,
        ENGINE,
        "        self._set_scale(scale)\n",
        "",
        "test_saved_state.py::test_a_number_that_was_altered_is_the_resumed_run_s[scale scale]",
    ),
    Defect(
        "growth-of-the-loss-scale-forgotten",
        "only the scale itself was carried on",
        "flow_grpo/parallel/plain.py",
        "            self.scaler.load_state_dict(scale)\n",
        "            held = self.scaler.state_dict()\n"
        '            self.scaler.load_state_dict(held | {"scale": scale["scale"]})\n',
        "test_saved_state.py::"
        "test_a_number_that_was_altered_is_the_resumed_run_s[scale _growth_tracker]",
    ),
    Defect(
        "held-start-without-its-counts",
        SLIP,
        SNAPSHOTS,
        "        self._updater.num_skipped_in_a_row = self._in_a_row\n",
        "",
        "test_saved_state.py::test_a_held_start_has_every_field_too",
    ),
    Defect(
        "identity-not-compared",
        SLIP,
        "flow_grpo/training/folders.py",
        'if key in state["identity"] and state["identity"][key] != value:',
        "if False:",
        "test_saved_state.py::test_each_part_of_the_identity_that_was_altered_is_refused",
    ),
    Defect(
        "other-versions-not-told",
        SLIP,
        PROVENANCE,
        "if was not in (None, version(package)):",
        "if False:",
        "test_saved_state.py::test_what_only_a_note_needs_is_told[versions]",
    ),
    Defect(
        "ranks-left-asleep",
        "DDP holds the group open, so that the others wait for two hours",
        "flow_grpo/parallel/plain.py",
        "            vars(self.model).update(reducer=None, logger=None, process_group=None)\n",
        "            pass\n",
        "test_rank_errors.py::"
        "test_what_one_rank_met_is_told_by_all_and_the_finished_epoch_is_saved[update-1]",
    ),
    Defect(
        "ranks-that-meet-nobody",
        SLIP,
        WATCH,
        "if store.add(here, 1) == self.num_ranks:",
        "if store.add(here, 1):",
        "test_watch.py::test_no_rank_goes_on_before_all_have_met",
    ),
    Defect(
        "last-failure-for-the-first",
        "the others fail because the first one did",
        WATCH,
        "tuple(min(",
        "tuple(max(",
        "test_watch.py::test_a_failure_is_told_to_those_who_wait",
    ),
    Defect(
        "ended-ranks-missed",
        "the main rank still draws its report when the others are gone",
        WATCH,
        "if not self._ended(n) and self._is_silent(n)]",
        "if self._is_silent(n)]",
        "test_watch.py::test_a_rank_that_has_ended_is_not_missed",
    ),
    Defect(
        "loading-takes-too-long",
        "a rank that reads 40 GB under Python's lock was killed by the others",
        WATCH,
        "LOAD_SILENCE_S if loads else SILENCE_S",
        "SILENCE_S",
        "test_watch.py::test_silence_counts_later_while_a_model_loads",
    ),
    Defect(
        "epoch-finished-on-some-ranks-alone",
        SLIP,
        LOOP,
        "            run.ranks.barrier()  # an epoch is finished on all ranks, or on none\n",
        "",
        "test_rank_errors.py::"
        "test_what_one_rank_met_is_told_by_all_and_the_finished_epoch_is_saved[late-1]",
    ),
    Defect(
        "half-a-checkpoint-left",
        SLIP,
        CHECKPOINT,
        "            if run.ranks.is_main:  # it may hold the room that others need\n",
        "            if False:\n",
        "test_full_disks.py::test_it_is_one_message_and_the_checkpoint_before_is_whole[trainer]",
    ),
    Defect(
        "error-of-safetensors-not-the-system-s",
        "a full disk was a traceback, and hid the error before",
        ENGINE,
        "    except SafetensorError as error:  # its own name for one of the system\n",
        "    except ZeroDivisionError as error:\n",
        "test_full_disks.py::test_it_is_one_message_and_the_checkpoint_before_is_whole[weights]",
        error="safetensors._safetensors_rust.SafetensorError",
    ),
    Defect(
        "digest-not-checked",
        SLIP,
        DIGESTS,
        "if _sha256(folder / name) != digest:",
        "if False:",
        "test_digests.py::test_a_flipped_bit_of_any_file_is_found",
    ),
    Defect(
        "seal-not-checked",
        SLIP,
        DIGESTS,
        "if state.get(SEAL) != _seal({",
        "if False and state.get(SEAL) != _seal({",
        "test_digests.py::test_a_flipped_bit_of_any_file_is_found",
    ),
    Defect(
        "held-start-not-restored",
        "SIGTERM among an epoch's updates saved half of them",
        LOOP,
        "            run.held.restore()\n",
        "            pass\n",
        "test_rescue.py::test_a_run_that_ends_among_its_updates_goes_on_as_if_it_had_not",
    ),
    Defect(
        "moments-of-another-weight-by-other-ranks",
        SLIP,
        "flow_grpo/parallel/recut.py",
        "at_part = at + start - _start(parts, part, name)\n",
        "at_part = start - _start(parts, part, name)\n",
        "test_recut.py::test_any_ranks_of_any_engine_read_what_others_wrote[row-whole]",
    ),
    Defect(
        "place-in-a-row-not-written",
        SLIP,
        "flow_grpo/parallel/deepspeed.py",
        "mapping.hp_fragment_address.start\n",
        "0\n",
        "test_engines.py::test_what_every_engine_saved_goes_on_in_one_process[zero2]",
    ),
]
