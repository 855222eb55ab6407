"""The data sets of dataset/: shipped files are the generators', splits are apart, rewards take all.

dataset/shapes has its tests in test_shapes.py, the converters theirs in test_converters.py.
"""

from __future__ import annotations

import hashlib
import json
import random
import runpy
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from config.base import base
from flow_grpo.prompts import read
from flow_grpo.rewards import loading
from flow_grpo.rewards.rules import ocr
from flow_grpo.rewards.rules.geneval_rules import CLASSES, COLORS, Found

ROOT = Path(__file__).parents[1]
DATASET = ROOT / "dataset"
SETTINGS = loading.settings(base())
OCR, GENEVAL, COUNTING = (
    runpy.run_path(str(DATASET / name / "generate.py"))
    for name in ("ocr", "geneval", "counting_edit")
)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def accepted(reward: str, folder: Path, split: str) -> list[dict]:
    """Read a split as a run does, have the reward check every prompt, and return the rows."""
    prompts = read(str(folder), split)
    loading.check(reward, SETTINGS, [p.text for p in prompts], [p.metadata for p in prompts])
    return [{"prompt": p.text} | p.metadata for p in prompts]


def test_the_ocr_files_are_the_generators(tmp_path):
    OCR["write"](tmp_path)
    for split in ("train", "test"):
        shipped = (DATASET / "ocr" / f"{split}.txt").read_bytes()
        assert shipped == (tmp_path / f"{split}.txt").read_bytes()


def test_every_ocr_prompt_quotes_one_text_and_splits_share_neither_text_nor_surroundings():
    texts, carriers = {}, {}
    for split, number in (("train", 20_000), ("test", 1_000)):
        prompts = [row["prompt"] for row in accepted("ocr", DATASET / "ocr", split)]
        assert len(prompts) == len(set(prompts)) == number
        assert {prompt.count('"') for prompt in prompts} == {2}
        targets = [prompt.split('"')[1] for prompt in prompts]
        assert targets == [ocr.target(prompt) for prompt in prompts]
        texts[split] = Counter("".join(target.lower().split()) for target in targets)
        carriers[split] = {
            '"'.join(prompt.split('"')[::2]) for prompt in prompts
        }  # what stands around the quotes
        lengths = [len(target) for target in targets]
        assert min(lengths) >= 2 and max(lengths) <= 40 and np.std(lengths) > 4
        assert 0.3 < np.mean([any(c.isdigit() for c in t) for t in targets]) < 0.6
        assert 0.3 < np.mean([any(c in "!?.,:'&$%-+=" for c in t) for t in targets]) < 0.6
        assert not any("{" in prompt or "}" in prompt or "  " in prompt for prompt in prompts)
    assert not set(texts["train"]) & set(texts["test"])
    assert not carriers["train"] & carriers["test"]
    assert len(texts["test"]) > 700 and texts["test"].most_common(1)[0][1] <= 2
    assert len(texts["train"]) > 10_000 and texts["train"].most_common(1)[0][1] <= 8


def test_another_seed_of_ocr_leaves_the_splits_apart():
    other = OCR["draw_prompts"]("test", 300, 1)
    train = (DATASET / "ocr" / "train.txt").read_text()
    known = {"".join(line.split('"')[1].lower().split()) for line in train.splitlines()}
    assert not known & {"".join(p.split('"')[1].lower().split()) for p in other}
    assert other != OCR["draw_prompts"]("test", 300, 0)


@pytest.fixture(scope="module")
def geneval(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("geneval")
    GENEVAL["write"](folder)
    return folder


def test_the_geneval_files_are_the_generators(geneval):
    test = (geneval / "test_metadata.jsonl").read_bytes()
    assert test == (DATASET / "geneval" / "test_metadata.jsonl").read_bytes()
    pinned = (DATASET / "geneval" / "README.md").read_text()
    train = (geneval / "train_metadata.jsonl").read_bytes()
    assert hashlib.sha256(train).hexdigest() in pinned


def test_geneval_has_the_mix_of_its_kinds_and_the_reward_takes_every_row(geneval):
    train, test = (accepted("geneval", geneval, split) for split in ("train", "test"))
    weights = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    found = Counter(row["tag"] for row in train)
    assert len(train) == 50_000 and set(found) == set(weights)
    for tag, weight in weights.items():
        assert abs(found[tag] - 50_000 * weight / 17) < 1
    assert Counter(row["tag"] for row in test) == {
        "single_object": 320,
        "two_object": 396,
        "counting": 320,
        "colors": 376,
        "position": 400,
        "color_attr": 400,
    }
    copies = Counter(row["prompt"] for row in test)
    assert len(copies) == 553 and set(copies.values()) == {4}
    for tag in weights:  # within a tag each prompt equally often
        often = Counter(row["prompt"] for row in train if row["tag"] == tag).values()
        assert max(often) - min(often) <= 1


def test_no_scene_of_genevals_test_is_trained_on_under_any_name(geneval):
    train, test = (
        {row["prompt"] for row in rows_of(geneval / f"{s}_metadata.jsonl")}
        for s in ("train", "test")
    )
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    other = set()
    for prompt in test:
        words = prompt.removeprefix("a photo of ")
        for joint, back in (*mirrored.items(), ("and", "and")):
            a, found, b = words.partition(f" {joint} ")
            if found:
                other.add(f"a photo of {b} {back} {a}")
    assert len(other) == 99 + 100 + 100
    assert not train & (test | other)


def test_a_geneval_row_says_what_its_prompt_says(geneval):
    def named(clause):
        name = f"{clause.get('color', '')} {clause['class']}".strip()
        if clause["class"] in ("skis", "scissors"):
            return f"a pair of {name}"
        return f"an {name}" if name[0] in "aeiou" else f"a {name}"

    number = {2: "two", 3: "three", 4: "four"}
    for row in rows_of(geneval / "test_metadata.jsonl") + rows_of(geneval / "train_metadata.jsonl"):
        first, *second = row["include"]
        assert ("exclude" in row) == (row["tag"] == "counting")
        if row["tag"] == "counting":
            assert row["exclude"] == [{"class": first["class"], "count": first["count"] + 1}]
            assert row["prompt"].startswith(f"a photo of {number[first['count']]} ")
            continue
        assert all(clause["count"] == 1 for clause in row["include"])
        if row["tag"] == "position":
            relation, target = second[0]["position"]
            assert target == 0
            text = f"{named(second[0])} {relation} {named(first)}"
        else:
            text = " and ".join(named(clause) for clause in row["include"])
        assert row["prompt"] == f"a photo of {text}"
        colors = [clause["color"] for clause in row["include"] if "color" in clause]
        assert len(colors) == {"colors": 1, "color_attr": 2}.get(row["tag"], 0)
        assert set(colors) <= set(COLORS) and len(set(colors)) == len(colors)


def test_the_benchmarks_own_rows_can_be_kept_out_of_training():
    official = {
        "tag": "position",
        "include": [
            {"class": "skis", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a dog right of a skis",
    }
    mirrored = [GENEVAL["row"]("position", ("skis", "left of", "dog"))]
    same = [GENEVAL["row"]("position", ("dog", "right of", "skis"))]
    keys = {GENEVAL["scene_key"](official)}
    assert keys == {GENEVAL["scene_key"](row) for row in mirrored + same}
    assert GENEVAL["scene_key"](GENEVAL["row"]("position", ("dog", "left of", "skis"))) not in keys
    everything = GENEVAL["scenes"]("position")
    drawn = GENEVAL["draw"]("position", len(everything), keys, random.Random(0))
    left = {row["prompt"] for row in drawn}
    assert len(left) == len(everything) - 2


def test_a_file_to_exclude_must_be_genevals(tmp_path, call):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "include": [{"class": "gnome", "count": 1}]}\n')
    with pytest.raises(SystemExit, match="line 1: not a row of GenEval's metadata .*gnome"):
        call("geneval/generate.py", "--exclude", path)


@pytest.mark.parametrize("maker", ["generate.py", "convert.py"])
def test_a_missing_split_is_named_with_what_makes_it(tmp_path, maker):
    (tmp_path / maker).touch()
    with pytest.raises(ValueError, match=f"there is neither. {tmp_path}/{maker} makes it"):
        read(str(tmp_path), "train")


def things(picture: np.ndarray) -> int:
    """Count what is apart on plain ground, whose color is that of the corner."""
    return ndimage.label((picture != picture[0, 0]).any(-1), np.ones((3, 3)))[1]


def test_the_rendered_pictures_are_the_generators_and_show_the_number_in_their_name(tmp_path):
    COUNTING["write_rendered"](tmp_path)
    shipped = sorted((DATASET / "counting_edit" / "images").iterdir())
    assert len(shipped) == 48
    for path in shipped:
        pixels, again = (np.asarray(Image.open(p)) for p in (path, tmp_path / "images" / path.name))
        np.testing.assert_allclose(pixels.astype(int), again, atol=16)  # a sample of 16 a pixel
        name, count, size = path.stem.rsplit("_", 2)
        assert things(pixels) == int(count)
        assert f"{pixels.shape[1]}x{pixels.shape[0]}" == size
        assert name.replace("_", " ") in CLASSES
    for split in ("train", "test"):
        name = f"{split}_metadata.jsonl"
        shipped = (DATASET / "counting_edit" / name).read_bytes()
        assert shipped == (tmp_path / name).read_bytes()


def test_counting_edit_asks_for_each_other_number_and_is_split_by_picture():
    images = {}
    for split, number in (("train", 36), ("test", 12)):
        rows = accepted("geneval", DATASET / "counting_edit", split)
        assert rows == accepted("image_similarity", DATASET / "counting_edit", split)
        images[split] = {row["image"] for row in rows}
        assert len(images[split]) == number and len(rows) == 3 * number
        for image in images[split]:
            asked = {row["include"][0]["count"] for row in rows if row["image"] == image}
            assert asked == {1, 2, 3, 4} - {int(image.split("_")[-2])}
        words = {1: "one.", 2: "two.", 3: "three.", 4: "four."}
        assert all(row["prompt"].endswith(words[row["include"][0]["count"]]) for row in rows)
        sizes = {image.rsplit("_", 1)[1] for image in images[split]}
        assert sizes == {"128x128.png", "160x96.png"}
    assert not images["train"] & images["test"]


def test_pictures_stay_whose_count_a_detector_confirms():
    pictures = sorted((DATASET / "counting_edit" / "images").glob("*128x128.png"))
    truth = [(p.stem.rsplit("_", 2)[0].replace("_", " "), int(p.stem[-9])) for p in pictures]

    def detect(images):  # finds things of every kind, and unsure ones, which must not count
        found = [Found((0, 0, 1, 1), 0.95)] * things(images[0]) + [Found((0, 0, 1, 1), 0.85)]
        return [{name: found for name in COUNTING["THINGS"]}]

    assert len(list(COUNTING["confirmed"](pictures, truth, detect))) == 24
    wrong = [(name, count % 4 + 1) for name, count in truth]
    assert not list(COUNTING["confirmed"](pictures, wrong, detect))


def test_what_can_not_be_drawn_is_refused_before_the_model_is_looked_at(call, tmp_path):
    name, more = "counting_edit/generate.py", ("--model", "nowhere", "--out", tmp_path)
    with pytest.raises(SystemExit, match="--classes: .'gnome'. are none of the detector's"):
        call(name, *more, "--classes", "gnome", "clock")
    with pytest.raises(SystemExit, match="--test=5 and --pictures=5"):
        call(name, *more, "--test", 5, "--pictures", 5)
    with pytest.raises(SystemExit, match="--out: a folder is needed"):
        call(name, "--model", "nowhere")


@pytest.mark.slow
def test_a_pipeline_draws_and_a_detector_chooses(files, tmp_path, call):
    """The weights are random, and the detector sees two clocks in everything: the count is void."""
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    from tests import test_geneval
    from tests.tiny.parts import seeded

    config = test_geneval.build(len(CLASSES)).config
    config.num_queries = 2
    model = seeded(Mask2FormerForUniversalSegmentation, config)
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.zero_()[CLASSES.index("clock")] = 50.0
        for name, parameter in model.named_parameters():
            if "mask_embedder" in name and name.endswith("weight"):
                parameter *= 30  # masks that are sure
    model.save_pretrained(tmp_path / "detector")
    size = {"shortest_edge": 64, "longest_edge": 128}
    test_geneval.Mask2FormerImageProcessorPil(size=size).save_pretrained(tmp_path / "detector")
    out = tmp_path / "out"
    arguments = ["--model", files / "sd3", "--detector", tmp_path / "detector", "--out", out]
    arguments += ["--classes", "clock", "kite", "--pictures", 16, "--test", 1]
    call("counting_edit/generate.py", *arguments, "--size", 32, "--steps", 1)
    rows = [row for split in ("train", "test") for row in accepted("geneval", out, split)]
    assert len(list((out / "drawn").glob("0*.png"))) == 16
    assert len({row["image"] for row in rows}) == 2  # the prompts of two clocks
    assert {row["t2i_prompt"] for row in rows} == {"a photo of two clocks"}
    with pytest.raises(SystemExit, match="0 images were confirmed"):
        arguments[-3:] = ["4", "--test", "1"]
        arguments[7] = "kite"
        call("counting_edit/generate.py", *arguments, "--size", 32, "--steps", 1)


def test_every_data_set_says_where_it_is_from_and_all_are_small():
    folders = [p for p in DATASET.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(folders) >= 6
    for folder in folders:
        assert "**Licence**" in (folder / "README.md").read_text(), folder
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "dataset"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    sizes = [(ROOT / name.decode()).stat().st_size for name in names if name]
    assert sum(sizes) < 4e6
