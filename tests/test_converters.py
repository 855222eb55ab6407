"""The converters of dataset/: a user's own download becomes a data set, split by a hash."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from config.base import base
from dataset.files import held_out, read_tables
from flow_grpo.prompts import read
from flow_grpo.rewards import loading

SETTINGS = loading.settings(base())


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def old_set(tmp_path) -> tuple[Path, Path, Path]:
    """The layout of existing sets: a zip of images, and rows that were split by row."""
    rows = [
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": wanted}],
            "exclude": [{"class": "clock", "count": wanted + 1}],
            "t2i_prompt": "a photo of three clocks",
            "prompt": f"Change the number of clock in the image to {wanted}.",
            "image": f"generated_images/image_{n}.jpg",
        }
        for n in range(10)
        for wanted in (1, 2, 4)
    ]
    archive = tmp_path / "generated_images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for n in range(12):  # two are of no row
            path = tmp_path / f"{n}.jpg"
            Image.new("RGB", (8 + n, 8), (n, 9, 9)).save(path)
            file.write(path, f"generated_images/image_{n}.jpg")
    for split, part in (("train", rows[:25:2] + rows[25:]), ("test", rows[1:25:2])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{split}_metadata.jsonl").write_text(text)
    return archive, tmp_path / "train_metadata.jsonl", tmp_path / "test_metadata.jsonl"


def test_an_old_counting_set_is_split_anew_by_picture(old_set, tmp_path, call):
    out = tmp_path / "out"
    call("counting_edit/convert.py", *old_set, "--out", out, "--test", 3)
    splits = {}
    for split in ("train", "test"):
        splits[split] = rows_of(out / f"{split}_metadata.jsonl")
        prompts = [row["prompt"] for row in splits[split]]
        loading.check("geneval", SETTINGS, prompts, splits[split])
    images = {split: {row["image"] for row in rows} for split, rows in splits.items()}
    assert (len(images["train"]), len(images["test"])) == (7, 3)
    assert not images["train"] & images["test"]
    assert [len(rows) for rows in splits.values()] == [21, 9]
    old = [row | {"image": ""} for path in old_set[1:] for row in rows_of(path)]
    new = [row | {"image": ""} for rows in splits.values() for row in rows]
    assert sorted(map(str, old)) == sorted(map(str, new))
    assert len(list((out / "images").iterdir())) == 10
    for prompt in read(str(out), "test"):
        number = int(Path(prompt.images[0]).stem.removeprefix("image_"))
        assert prompt.image_sizes == ((8 + number, 8),)


def test_an_old_counting_set_that_is_broken_is_named(old_set, tmp_path, call):
    out = tmp_path / "out"
    with zipfile.ZipFile(tmp_path / "few.zip", "w") as file:
        file.writestr("a/../../image_0.jpg", "x")
    with pytest.raises(SystemExit, match="lacks 9 images that rows name, such as image_1.jpg"):
        call("counting_edit/convert.py", tmp_path / "few.zip", *old_set[1:], "--out", out)
    with pytest.raises(SystemExit, match="30 of 10 can't be held out"):
        call("counting_edit/convert.py", *old_set, "--out", out)
    with pytest.raises(SystemExit, match="not a zip file"):
        call("counting_edit/convert.py", old_set[1], *old_set[1:], "--out", out)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "image": "b.jpg"}\n')
    with pytest.raises(SystemExit, match='rows.jsonl, line 1: .*no "include"'):
        call("counting_edit/convert.py", old_set[0], tmp_path / "rows.jsonl", "--out", out)


def test_a_hostile_zip_writes_nothing_outside_its_folder(old_set, tmp_path, call):
    out = tmp_path / "deep" / "out"
    row = rows_of(old_set[1])[0]
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        for name in ("../../evil.jpg", "/evil2.jpg"):
            file.write(tmp_path / "0.jpg", name)
    rows = [row | {"image": "../../evil.jpg"}, row | {"image": "/evil2.jpg"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call("counting_edit/convert.py", tmp_path / "evil.zip", tmp_path / "rows.jsonl", "--out", out,
         "--test", 1)  # fmt: skip
    assert {path.name for path in (out / "images").iterdir()} == {"evil.jpg", "evil2.jpg"}
    assert not (tmp_path / "evil.jpg").exists() and not Path("/evil2.jpg").exists()


CAPTIONS = [f"a painting of {n} ships on a stormy sea" for n in range(40)]
DIRTY = [
    *CAPTIONS,
    CAPTIONS[3],  # again
    "  A Painting of 4 SHIPS   on a stormy sea ",  # again, but for case and spaces
    "too short",
    "many words " * 100,
    "",
]


def write_table(folder: Path, suffix: str) -> Path:
    path = folder / f"captions{suffix}"
    if suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"jpg_0": [b"x"] * len(DIRTY), "caption": DIRTY})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"Caption": text, "x": 1}) + "\n" for text in DIRTY))
    elif suffix == ".txt":
        path.write_text("\n".join(DIRTY))
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            out = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            out.writerows([("id", "caption"), *enumerate(DIRTY)])
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt", ".parquet"])
def test_preference_prompts_become_two_disjoint_splits(tmp_path, call, suffix):
    out = tmp_path / "out"
    call("pickscore/convert.py", write_table(tmp_path, suffix), "--out", out, "--test", 10)
    train, test = ([prompt.text for prompt in read(str(out), s)] for s in ("train", "test"))
    assert sorted(train + test) == sorted(CAPTIONS) and len(test) == 10
    least = sorted(CAPTIONS, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:10]
    assert set(test) == set(least)


def test_a_folder_of_tables_is_read_whole_and_a_column_may_be_named(tmp_path, call):
    (tmp_path / "data").mkdir()
    for n in range(2):
        text = "".join(json.dumps({"caption": "no", "mine": c}) + "\n" for c in CAPTIONS[n::2])
        (tmp_path / "data" / f"{n}.jsonl").write_text(text)
    call(
        "pickscore/convert.py", tmp_path, "--column", "mine", "--test", "4", "--out", tmp_path / "o"
    )
    assert len(read(str(tmp_path / "o"), "train")) == 36


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.csv", "id,words\n1,x\n", "has the columns id, words; a column 'caption' or 'prompt'"),
        ("a.jsonl", "{oops", "is not a UTF-8 .jsonl file"),
        ("a.jsonl", "[1]", "row 1: an object is needed"),
        ("a.parquet", "oops", "is not a parquet file|pip install pyarrow"),
        ("a.zip", "x", "one of .parquet, .jsonl, .csv, .tsv, .txt is needed"),
        ("a.txt", "only one short line of seven words", "2048 of 1 can't be held out"),
    ],
)
def test_a_table_without_prompts_is_named(tmp_path, call, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=complaint):
        call("pickscore/convert.py", tmp_path / name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ValueError, match="a file or folder of"):
            list(read_tables(path, {"prompt": ("prompt",)}))


def test_the_test_split_does_not_depend_on_the_order_and_grows_slowly():
    keys = [str(n) for n in range(1000)]
    chosen = held_out(keys, 100)
    assert chosen == held_out(reversed(keys), 100) and len(chosen) == 100
    assert len(chosen & held_out([*keys, *(f"new {n}" for n in range(50))], 100)) >= 85


def test_drawbench_becomes_a_test_split_with_its_categories_as_tags(tmp_path, call):
    table = tmp_path / "DrawBench.csv"
    table.write_text(
        "Prompts,Category\nA red car.,Colors\n"
        '"Two dogs, three cats.",Counting\n"A sign that says ""Hi"".",Text\nA red car.,Colors\n'
    )
    call("drawbench/convert.py", table, "--out", tmp_path / "out", "--copies", 2)
    prompts = read(str(tmp_path / "out"), "test")
    texts = ["A red car.", "Two dogs, three cats.", 'A sign that says "Hi".']
    assert [prompt.text for prompt in prompts] == texts * 2
    assert [prompt.tag for prompt in prompts] == ["Colors", "Counting", "Text"] * 2
    table.write_text("Prompts,Kind\na,b\n")
    with pytest.raises(SystemExit, match="a column 'category' or 'tag' is needed"):
        call("drawbench/convert.py", table, "--out", tmp_path / "other")


def test_geneval_2_keeps_its_atoms(tmp_path, call):
    row = {
        "prompt": "four white bicycles",
        "atom_count": 3,
        "vqa_list": [["How many bicycles are in the image?", "four"], ["Are they white?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    call("geneval2/convert.py", tmp_path / "data.jsonl", "--out", tmp_path)
    (prompt,) = read(str(tmp_path), "test")
    assert (prompt.text, prompt.tag) == ("four white bicycles", "3 atoms")
    assert prompt.metadata["vqa_list"] == row["vqa_list"]
    loading.check("soft_tifa", SETTINGS, [prompt.text], [prompt.metadata])
    (tmp_path / "data.jsonl").write_text(json.dumps(row | {"vqa_list": "none"}) + "\n")
    with pytest.raises(SystemExit, match="row 1: it lacks a prompt or a list"):
        call("geneval2/convert.py", tmp_path / "data.jsonl", "--out", tmp_path)


DPG = (
    "item_id,text,keywords,proposition_id,dependency,question_natural_language\n"
    'b,"A cat, and a red hat.",,1,0,Is there a cat?\nb,"A cat, and a red hat.",,2,0,A hat?\n'
    'b,"A cat, and a red hat.",,3,"1,2",Is the hat on the cat?\na,Rain.,,1,0,Does it rain?\n'
)


def test_dpgs_questions_of_a_prompt_become_its_row(tmp_path, call):
    (tmp_path / "dpg.csv").write_text(DPG)
    call("dpg/convert.py", tmp_path / "dpg.csv", "--out", tmp_path, "--copies", 2)
    prompts = read(str(tmp_path), "test")
    assert [prompt.text for prompt in prompts] == ["A cat, and a red hat.", "Rain."] * 2
    row = prompts[0].metadata
    assert row["parents"] == [[], [], [0, 1]] and row["vqa_list"][1] == ["A hat?", "Yes"]
    loading.check("dpg", SETTINGS, [p.text for p in prompts], [p.metadata for p in prompts])
    (tmp_path / "dpg.csv").write_text(DPG.replace("1,2", "1,9"))
    with pytest.raises(SystemExit, match="the item 'b': KeyError.9. is no question's number"):
        call("dpg/convert.py", tmp_path / "dpg.csv", "--out", tmp_path)


def test_parti_prompts_have_their_categories_as_tags(tmp_path, call):
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\tChallenge\na  car\tVehicles\tBasic\n")
    call("parti/convert.py", tmp_path / "p.tsv", "--out", tmp_path)
    assert [(p.text, p.tag) for p in read(str(tmp_path), "test")] == [("a car", "Vehicles")]
