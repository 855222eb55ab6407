import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import plan_of

from flow_grpo.prompts import (
    Prompt,
    check,
    deal,
    epoch_prompts,
    eval_batches,
    read,
    rollout_rows,
)

ROOT = Path(__file__).parent.parent
# (prompts, groups an epoch, epochs until every prompt came equally often)
LAPS = [(10, 4, 5), (7, 7, 3), (5, 12, 5), (64, 48, 4), (1, 3, 2)]


@pytest.mark.parametrize("num_prompts, num_groups, num_epochs", LAPS)
def test_every_slot_is_filled_and_every_prompt_comes_equally_often(
    num_prompts, num_groups, num_epochs
):
    epochs = [epoch_prompts(num_prompts, num_groups, 3, epoch) for epoch in range(num_epochs)]
    assert all(len(epoch) == num_groups for epoch in epochs)
    often = num_groups * num_epochs // num_prompts
    count = Counter(number for epoch in epochs for number in epoch)
    assert count == dict.fromkeys(range(num_prompts), often)


def test_no_prompt_comes_again_before_all_have_come():
    slots = [n for epoch in range(25) for n in epoch_prompts(10, 4, 0, epoch)]
    for lap in range(10):
        assert sorted(slots[10 * lap : 10 * lap + 10]) == list(range(10))


def test_an_epochs_prompts_depend_on_seed_and_epoch_alone():
    expected = epoch_prompts(50, 20, 1, 7)
    for epoch in (0, 7, 3, 7):  # neither on what was drawn before nor on the global generator
        random.seed(epoch)
        drawn = epoch_prompts(50, 20, 1, epoch)
    assert drawn == expected
    state = random.getstate()
    epoch_prompts(50, 20, 1, 7)
    assert random.getstate() == state
    assert epoch_prompts(50, 20, 2, 7) != expected


def test_epochs_and_laps_come_in_different_orders():
    laps = {tuple(epoch_prompts(20, 20, 0, epoch)) for epoch in range(50)}
    assert len(laps) == 50


def test_an_epoch_of_twice_the_groups_is_two_epochs():
    halves = epoch_prompts(13, 6, 4, 10) + epoch_prompts(13, 6, 4, 11)
    assert epoch_prompts(13, 12, 4, 5) == halves


# (ranks, batches of each, batch size, group size)
LAYOUTS = [(1, 8, 8, 8), (4, 8, 8, 16), (8, 48, 3, 24), (2, 3, 4, 6), (32, 4, 9, 24)]


@pytest.mark.parametrize("world, num_batches, batch_size, group_size", LAYOUTS)
def test_ranks_share_out_every_member_of_every_group_once(
    world, num_batches, batch_size, group_size
):
    ranks = [list(rollout_rows(r, num_batches, batch_size, group_size)) for r in range(world)]
    assert all(len(calls) == num_batches for calls in ranks)
    assert all(len(call) == batch_size for calls in ranks for call in calls)
    rows = [row for calls in ranks for call in calls for row in call]
    num_groups = world * num_batches * batch_size // group_size
    everyone = [(group, member) for group in range(num_groups) for member in range(group_size)]
    assert sorted(rows) == everyone


def test_two_ranks_make_the_calls_of_one_rank_with_twice_the_batches():
    two = [call for rank in (0, 1) for call in rollout_rows(rank, 3, 4, 6)]
    assert two == list(rollout_rows(0, 6, 4, 6))


def prompts_of(*sizes):
    return [Prompt(str(n), {}, ("x",), ((s, s),)) for n, s in enumerate(sizes)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
@pytest.mark.parametrize("sizes", [[64] * 10, [64, 32, 64, 64, 32, 64, 48], [64]])
def test_evaluation_reaches_every_prompt_in_equal_batches_of_one_size(world, batch_size, sizes):
    prompts = prompts_of(*sizes)
    ranks = [deal(eval_batches(prompts, batch_size), rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert {len(batch) for batch in batches} == {min(batch_size, len(sizes))}
    assert {number for batch in batches for number in batch} == set(range(len(sizes)))
    assert all(len({sizes[number] for number in batch}) == 1 for batch in batches)
    fewest = sum(-(-count // min(batch_size, len(sizes))) for count in Counter(sizes).values())
    assert len(batches) == -(-fewest // world) * world  # no more work than needed


# (micro-batches of each rank, updates)
PASSES = [(4, 2), (8, 4), (6, 1), (6, 6), (12, 3)]


def dealt(num_micro_batches, num_updates, world=1, seed=0, epoch=3, inner=0):
    """Which micro-batches of one row each update has, as [update][rank]."""
    plan = replace(
        plan_of(4, 4),
        micro_batch_size=1,
        num_updates=num_updates,
        num_inner_epochs=inner + 1,
        seed=seed,
    )
    rows = np.split(np.arange(world * num_micro_batches), world)
    updates = plan.in_order(rows, epoch)[inner]
    return [[np.concatenate(of_rank).tolist() for of_rank in update] for update in updates]


@pytest.mark.parametrize("num_micro_batches, num_updates", PASSES)
def test_a_pass_uses_every_micro_batch_once_and_updates_are_equal(num_micro_batches, num_updates):
    updates = [of_ranks[1] for of_ranks in dealt(num_micro_batches, num_updates, world=2)]
    assert len(updates) == num_updates
    assert {len(update) for update in updates} == {num_micro_batches // num_updates}
    used = sorted(number for update in updates for number in update)
    assert used == list(range(num_micro_batches, 2 * num_micro_batches))


@pytest.mark.parametrize("num_micro_batches, num_updates", PASSES)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_make_the_updates_of_one_rank_with_all_micro_batches(
    world, num_micro_batches, num_updates
):
    ranks = dealt(num_micro_batches, num_updates, world, inner=1)
    one = dealt(world * num_micro_batches, num_updates, inner=1)
    for together, (alone,) in zip(ranks, one, strict=True):
        assert sorted(sum(together, [])) == sorted(alone)


def test_passes_epochs_and_seeds_mix_micro_batches_differently():
    orders = {
        str(dealt(24, 4, 1, seed, epoch, inner))
        for seed in range(3)
        for epoch in range(3)
        for inner in range(3)
    }
    assert len(orders) == 27


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    (tmp_path / "train.txt").write_text("  a cat \n\n \t\nzwei Vögel\u2028im Baum\r\nlast", "utf-8")
    texts = [prompt.text for prompt in read(str(tmp_path), "train")]
    assert texts == ["a cat", "zwei Vögel\u2028im Baum", "last"]
    assert read(str(tmp_path), "train")[0] == Prompt("a cat", {}, (), ())


def write_rows(folder, *rows, split="test"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{split}_metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_metadata_row_reaches_the_rewards_whole(tmp_path):
    rows = [{"prompt": "Öl\u2028auf Leinwand", "tag": "one", "count": 3}, {"prompt": "b", "x": [1]}]
    write_rows(tmp_path, rows[0], "", rows[1])
    prompts = read(str(tmp_path), "test")
    assert [prompt.text for prompt in prompts] == ["Öl\u2028auf Leinwand", "b"]
    assert [prompt.metadata for prompt in prompts] == rows
    assert prompts[0].images == prompts[0].image_sizes == ()


def test_reference_pictures_are_found_beside_the_file_with_their_sizes(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    Image.new("RGBA", (5, 7)).save(tmp_path / "b.png")
    write_rows(
        tmp_path,
        {"prompt": "p", "image": "in/a.png"},
        {"prompt": "q", "image": ["b.png", "in/a.png"]},
    )
    one, two = read(str(tmp_path), "test")
    assert one.image_sizes == ((6, 4),) and two.image_sizes == ((5, 7), (6, 4))
    np.testing.assert_array_equal(one.load_images()[0], pixels)
    assert [image.shape for image in two.load_images()] == [(7, 5, 3), (4, 6, 3)]


@pytest.mark.parametrize("files, found", [([], "neither"), (["txt", "jsonl"], "both")])
def test_exactly_one_prompt_file_is_needed(tmp_path, files, found):
    for name in files:
        (tmp_path / {"txt": "dev.txt", "jsonl": "dev_metadata.jsonl"}[name]).write_text("x\n")
    with pytest.raises(ValueError, match="exactly one of dev.txt and dev_metadata.jsonl") as error:
        read(str(tmp_path), "dev")
    assert f"there is {found}" in str(error.value) and f"{str(tmp_path)!r}" in str(error.value)


def test_a_file_of_blank_lines_has_no_prompts(tmp_path):
    (tmp_path / "train.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="train.txt has no prompts"):
        read(str(tmp_path), "train")


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"prompt": "a"', "not JSON"),
        ({"text": "a"}, 'an object with a "prompt" text is needed'),
        ({"prompt": 3}, 'an object with a "prompt" text is needed'),
        ("[1, 2]", 'an object with a "prompt" text is needed'),
        ({"prompt": "a", "image": "no.png"}, "cannot read the image"),
        ({"prompt": "a", "image": "test_metadata.jsonl"}, "cannot read the image"),
        ({"prompt": "a", "image": None}, '"image" must be a path or a list of paths'),
        ({"prompt": "a", "image": [3]}, '"image" must be a path or a list of paths'),
    ],
)
def test_a_wrong_row_is_refused_with_its_file_and_line(tmp_path, row, complaint):
    write_rows(tmp_path, {"prompt": "fine"}, "", row)
    with pytest.raises(ValueError) as error:
        read(str(tmp_path), "test")
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/test_metadata.jsonl, line 3: ") and complaint in message


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_a_picture_that_was_cut_short_is_named_at_the_start(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    write_rows(tmp_path, {"prompt": "fine"}, {"prompt": "p", "image": name})
    assert read(str(tmp_path), "test")[1].image_sizes == ((64, 64),)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"line 2: cannot read the image .*{name}"):
        read(str(tmp_path), "test")


def test_a_flipped_byte_of_a_png_is_found(tmp_path):
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    write_rows(tmp_path, {"prompt": "p", "image": "a.png"})
    with pytest.raises(ValueError, match="line 1: cannot read the image .*a.png"):
        read(str(tmp_path), "test")


def test_check_counts_repeated_and_shared_rows(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    write_rows(tmp_path, {"prompt": "a", "tag": "x"}, {"prompt": "b", "tag": "x"}, split="train")
    edit = {"prompt": "a", "image": "a.png", "tag": "y"}
    write_rows(tmp_path, {"prompt": "b", "tag": "x"}, edit, edit, split="test")
    assert check(str(tmp_path)) == [
        "train: 2 rows, 0 of them repeated",
        "train tags: x 2",
        "test: 3 rows, 1 of them repeated",
        "test tags: y 2, x 1",
        "test images: 1 files of 1 sizes (6 x 4: 2)",
        "train and test share 1 rows, such as 'b'",
    ]


@pytest.mark.slow
def test_the_command_leaves_with_1_and_a_message(tmp_path):
    command = [sys.executable, "-m", "flow_grpo.prompts", "check"]
    done = subprocess.run([*command, "dataset/shapes"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "train: 2000 rows, " in done.stdout
    assert "train and test share 0 rows\n" in done.stdout
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"{tmp_path}: no train.txt" in done.stderr
