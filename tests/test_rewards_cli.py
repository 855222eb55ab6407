"""python -m flow_grpo.rewards: images that are there already, with prompts and without."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flow_grpo.evaluation.intervals import interval
from flow_grpo.rewards import pictures
from flow_grpo.rewards.__main__ import main
from flow_grpo.rewards.base import Reward
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.rewards.rules.jpeg import jpeg_incompressibility

BLUE_SQUARE = {"include": [{"class": "square", "color": "blue", "count": 1}]}


class Pairs(Reward):
    needs_groups = True


def redness(images):
    return [image[..., 0].mean() for image in images]


def picture(x: int) -> np.ndarray:
    """A blue square of the testbed's world at column x."""
    image = np.full((32, 32, 3), 230, np.uint8)
    image[8:20, x : x + 12] = (45, 75, 225)
    return image


@pytest.fixture
def folder(tmp_path) -> Path:
    for n, x in enumerate((2, 10, 18)):
        Image.fromarray(picture(x)).save(tmp_path / f"{n}.png")
    Image.fromarray(np.full((32, 32, 3), 230, np.uint8)).save(tmp_path / "3.png")
    return tmp_path


def write_metadata(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_csv(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_pictures_without_prompts_are_scored_by_rewards_that_need_none(folder, capsys):
    main(["--reward", "jpeg_incompressibility", str(folder), "--batch-size", "3"])
    images = [picture(2), picture(10), picture(18), np.full((32, 32, 3), 230, np.uint8)]
    expected = jpeg_incompressibility(Batch(images, [], []))["jpeg_incompressibility"]
    rows = read_csv(folder / "scores.csv")
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert [float(row["jpeg_incompressibility"]) for row in rows] == expected.tolist()
    low, high = interval(expected, list("abcd"))
    printed = capsys.readouterr().out
    assert f"{expected.mean():.3f} [{low:.3f}, {high:.3f}]" in printed and "4 prompts" in printed


def test_metadata_reaches_the_reward_and_gives_tags_and_prompts(folder, capsys):
    rows = [
        {"file": f"{n}.png", "prompt": "a blue square", "tag": tag} | BLUE_SQUARE
        for n, tag in ((0, "seen"), (3, "empty"), (1, "seen"))
    ]
    write_metadata(folder, rows)
    main(["--reward", "shapes_strict", "--reward", "shapes_dense", str(folder)])
    written = read_csv(folder / "scores.csv")
    assert [row["file"] for row in written] == ["0.png", "3.png", "1.png"]
    assert [float(row["shapes_strict"]) for row in written] == [1, 0, 1]
    header, strict, dense, count = capsys.readouterr().out.splitlines()
    assert header.split() == ["all", "empty", "seen", "mean_of_tags"]
    assert strict.split() == ["shapes_strict", "0.667", "0.000", "1.000", "0.500"]  # no interval
    assert dense.split()[0] == "shapes_dense" and count.startswith("3 images, 1 prompts")


def test_prompts_txt_has_a_line_a_picture_in_the_order_of_names(folder, capsys):
    (folder / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    found = pictures.read(folder)
    assert [(each.file.name, each.prompt) for each in found] == [
        ("0.png", "one"),
        ("1.png", "two"),
        ("2.png", "three"),
        ("3.png", "four"),
    ]
    (folder / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="2 lines and .* 4 images"):
        pictures.read(folder)
    write_metadata(folder, [{"file": "0.png"}])
    with pytest.raises(ValueError, match="both"):
        pictures.read(folder)


@pytest.mark.parametrize("rows", [None, [{"file": "0.png"}], [{"file": "0.png", "prompt": "a"}]])
def test_a_reward_says_what_it_misses(folder, rows):
    if rows:
        write_metadata(folder, rows)
    needed = "metadata row 0 has no 'include'"
    if not rows or "prompt" not in rows[0]:
        needed = "it needs the prompts"
    with pytest.raises(SystemExit, match=f"reward 'shapes': {needed}"):
        main(["--reward", "shapes", str(folder)])
    assert not (folder / "scores.csv").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": "a"}', 'line 2: an object with a "file"'),
        ('{"file": "9.png"}', "line 2: there is no image .*9.png"),
        ('{"file": "0.png", "image": "ref.png"}', "line 2: there is no image .*ref.png"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    (folder / "metadata.jsonl").write_text(f'{{"file": "0.png"}}\n{line}\n')
    with pytest.raises(SystemExit, match=message):
        main(["--reward", "jpeg_compressibility", str(folder)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "FOLDER and at least one --reward"),
        (["--reward", "shaps", "."], "Did you mean 'shapes'"),
        (["--reward", "shapes", "nowhere"], "'nowhere' is no folder"),
        (["--reward", "shapes", ".", "--batch-size", "0"], "--batch-size=0"),
        (["--reward", "shapes", ".", "--set", "clp=x"], "--set=clp=x.*clip"),
        (["--reward", "ocr", ".", "--set", "ocr_side=0"], "config.rewards.ocr_side=0: a whole num"),
        (["--reward", "shapes", ".", "--set", "ocr_processes=x"], "a value like 4"),
        (["--reward", "test_rewards_cli:Pairs", "."], "compares the images"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_videos_and_references_are_read(folder):
    frames = [Image.fromarray(picture(x)) for x in (2, 10, 18)]
    frames[0].save(folder / "video.png", save_all=True, append_images=frames[1:])
    write_metadata(folder, [{"file": "video.png", "prompt": "a", "image": ["0.png", "1.png"]}])
    (found,) = pictures.read(folder)
    assert np.array_equal(
        pictures.load(found.file), np.stack([picture(2), picture(10), picture(18)])
    )
    assert [
        np.array_equal(*pair)
        for pair in zip(
            map(pictures.load, found.references), (picture(2), picture(10)), strict=True
        )
    ] == [True] * 2


def test_a_reward_of_ones_own_is_scored_like_any_other(folder):
    main(["--reward", "test_rewards_cli:redness", str(folder)])
    values = [float(row["test_rewards_cli:redness"]) for row in read_csv(folder / "scores.csv")]
    assert values == pytest.approx([picture(2)[..., 0].mean()] * 3 + [230])


def test_the_list_says_something_of_every_reward():
    command = [sys.executable, "-m", "flow_grpo.rewards", "--list"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = dict(line.split(maxsplit=1) for line in process.stdout.splitlines())
    assert list(listed) == list(REWARDS) and all(listed.values())


@pytest.mark.parametrize("out", ["file/scores.csv", "file/deeper/scores.csv"])
def test_where_no_scores_can_be_written_is_said_before_any_is_made(tmp_path, out, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("flow_grpo.rewards.__main__.score", None)
    with pytest.raises(SystemExit, match="--out: .*file.* can't be written to"):
        main(["--reward", "jpeg_compressibility", "--out", str(tmp_path / out), str(tmp_path)])
