"""What users bring, by the one reader: marks that can't be seen, rows of JSON, pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fuzz_pictures import TURNS
from PIL import Image

from flow_grpo import inputs
from flow_grpo.prompts import check, read
from flow_grpo.rewards import pictures
from flow_grpo.rewards.__main__ import main
from flow_grpo.rewards.remote.servers import read_token

RNG = np.random.default_rng(0)
BOM = b"\xef\xbb\xbf"
# Written by editors on Windows, joined by `cat`, padded: always these two lines.
FILES = [
    BOM + b"a cat\r\na dog\r\n",
    BOM + b"a cat\n" + BOM + b"a dog\n",
    b"a cat\n\xe2\x80\x8b\n\0\0\n" + BOM + b"\n \xe2\x80\xa8 \n\f\na dog",
    "\u2060\n\u200ba cat\u200b\n\u3000a dog\0".encode(),
    b"a cat\ra dog\r",
]


@pytest.mark.parametrize("data", FILES)
def test_prompts_and_rows_and_lines_of_pictures_are_read_by_one_rule(data, tmp_path):
    (tmp_path / "train.txt").write_bytes(data)
    assert [prompt.text for prompt in read(str(tmp_path), "train")] == ["a cat", "a dog"]
    row = b'{"prompt": "%s"}'
    quoted = data.replace(b"a cat", row % b"a cat").replace(b"a dog", row % b"a dog")
    (tmp_path / "test_metadata.jsonl").write_bytes(quoted)
    assert [prompt.text for prompt in read(str(tmp_path), "test")] == ["a cat", "a dog"]
    for name in ("1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_bytes(data)
    assert [each.prompt for each in pictures.read(tmp_path)] == ["a cat", "a dog"]


@pytest.mark.parametrize("inside", ["\u2028", "\f", "\x0b", "\x85", "\u200b"])
def test_a_line_ends_at_a_line_feed_alone(inside, tmp_path):
    text = f"one{inside}two"
    (tmp_path / "train.txt").write_text(f"{text}\nthree\n", encoding="utf-8")
    (tmp_path / "test_metadata.jsonl").write_text(
        f"{json.dumps({'prompt': text}, ensure_ascii=inside < ' ')}\n", encoding="utf-8"
    )
    assert [prompt.text for prompt in read(str(tmp_path), "train")] == [text, "three"]
    assert [prompt.text for prompt in read(str(tmp_path), "test")] == [text]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "prompts.txt").write_text(f"{text}\n", encoding="utf-8")
    assert [each.prompt for each in pictures.read(tmp_path)] == [text]


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_of_another_coding_is_refused(coding, tmp_path):
    (tmp_path / "train.txt").write_text("a cat\na dog\n", encoding=coding)
    with pytest.raises(ValueError, match="train.txt.* (Save it|Save the file) as UTF-8"):
        read(str(tmp_path), "train")


@pytest.mark.parametrize("before, after", [(BOM, b"\n"), (b"", b"\r\n"), (BOM, b"")])
def test_a_token_has_no_mark(before, after, tmp_path):
    (tmp_path / "token").write_bytes(before + b"0123456789abcdef" + after)
    assert read_token(str(tmp_path / "token"), "key") == "0123456789abcdef"


@pytest.mark.parametrize("token", ["0123456789abcdé", "\u200b0123456789abcdef", "0123456789abcdéf"])
def test_a_token_is_ascii(token, tmp_path):
    (tmp_path / "token").write_text(token, encoding="utf-8")
    with pytest.raises(ValueError, match="key=.*16 characters") as error:
        read_token(str(tmp_path / "token"), "key")
    assert token not in str(error.value)


def metadata(folder: Path, *rows: str) -> str:
    (folder / "test_metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"prompt": ""}', 'a "prompt" text is needed'),
        ('{"prompt": " \\u200b"}', 'a "prompt" text is needed'),
        ('{"prompt": "\\ufeff"}', 'a "prompt" text is needed'),
        ('{"prompt": "a\\u0000b"}', 'a "prompt" text is needed'),
        ('{"prompt": "a", "tag": "all"}', "can't head a column"),
        ('{"prompt": "a", "tag": "mean_of_tags"}', "can't head a column"),
        ('{"prompt": "a", "tag": "x\\ny"}', "can't head a column"),
        ('{"prompt": "a", "tag": "x\\r"}', "can't head a column"),
        ('{"prompt": "a", "tag": "x\\u2028y"}', "can't head a column"),
        ('{"prompt": "a", "x": ' + "[" * 65 + "]" * 65 + "}", "more than 64 deep"),
        ('{"prompt": "a", "x": ' + "[" * 99999 + "]" * 99999 + "}", "more than 64 deep"),
        ('{"prompt": "a", "x": ' + '{"b":' * 5000 + "1" + "}" * 5001, "more than 64 deep"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "x": ["\\udc00b"]}', "half of a surrogate pair"),
        ('{"prompt": "a", "\\ud83d": 1}', "half of a surrogate pair"),
        ('{"prompt": "a", "x": NaN}', "not JSON"),
        ('{"prompt": "a", "x": [{"y": -Infinity}]}', "not JSON"),
        ('{"prompt": "a", "x": 1e999}', "not JSON"),
    ],
    ids=range(18),
)
def test_a_row_that_would_fail_later_is_refused_at_the_start(row, complaint, tmp_path):
    folder = metadata(tmp_path, '{"prompt": "fine"}', row)
    with pytest.raises(ValueError, match="test_metadata.jsonl, line 2: ") as error:
        read(folder, "test")
    message = str(error.value)
    assert complaint in message and len(message) < 500
    message.encode()  # can be printed
    rows = [json.loads(r) for r in ('{"prompt": "fine"}', row)] if len(row) < 200 else []
    if "prompt" in complaint and rows:
        (tmp_path / "metadata.jsonl").write_text(
            "".join(json.dumps(r | {"file": "a.png"}) + "\n" for r in rows)
        )
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: .*\"prompt\" text"):
            pictures.read(tmp_path)


def test_rows_that_are_odd_but_fine_are_read(tmp_path):
    deep = "[" * 63 + "]" * 63
    wide = json.dumps([[n] for n in range(200)])
    folder = metadata(
        tmp_path,
        '{"prompt": "\\ufeff a ", "tag": null}',
        '{"prompt": "\\ud83d\\ude00", "tag": "", "x": ' + deep + "}",
        '{"prompt": "b", "tag": " \\u200b", "x": ' + wide + "}",
        '{"prompt": "c", "tag": 3}',
        '{"prompt": "d", "tag": "All\\u3000 of it"}',
    )
    found = read(folder, "test")
    assert [prompt.text for prompt in found] == [" a ", "😀", "b", "c", "d"]
    assert [prompt.tag for prompt in found] == ["", "", "", "3", "All\u3000 of it"]


def test_a_null_tag_of_a_picture_is_none(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png", "tag": null}\n')
    main(["--reward", "jpeg_compressibility", str(tmp_path)])
    assert capsys.readouterr().out.split()[0] == "all"
    assert "None" not in (tmp_path / "scores.csv").read_text()


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png", "10.png"],
        ["a.png", "a1.png", "a2.jpg", "a11.png"],
        ["step-9_1.png", "step-9_12.png", "step-80_3.png"],
        ["x.png", "007.png", "07.png", "7.bmp", "8.png"][1:] + ["x.png"],
    ],
)
def test_numbered_pictures_are_sorted_as_numbers(names, tmp_path):
    for name in sorted(names, reverse=True):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / f"._{names[0]}").write_bytes(b"\0\5\x16\7")  # macOS leaves such files
    (tmp_path / "folder.png").mkdir()
    assert [each.file.name for each in pictures.read(tmp_path)] == names


# What a person sees, as pixels.
SEEN = RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_as_its_exif_says(orientation, suffix, tmp_path):
    """Stored is the inverse of how it is shown, which EXIF 2.32 defines."""
    stored = np.ascontiguousarray(TURNS[orientation](SEEN))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **lossless)
    np.testing.assert_array_equal(inputs.picture(path), SEEN)
    np.testing.assert_array_equal(pictures.load(path), SEEN)
    assert inputs.size(path) == (10, 6)
    (prompt,) = read(metadata(tmp_path, f'{{"prompt": "a", "image": "a.{suffix}"}}'), "test")
    assert prompt.image_sizes == ((10, 6),)
    np.testing.assert_array_equal(prompt.load_images()[0], SEEN)


def test_a_jpeg_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24), "red").save(tmp_path / "a.jpg", exif=exif)
    assert inputs.size(tmp_path / "a.jpg") == (24, 40)
    assert inputs.picture(tmp_path / "a.jpg").shape == (40, 24, 3)


DEPTH = np.array([[0, 1], [128, 255]], np.uint8)


@pytest.mark.parametrize(
    "name, values",
    [
        ("a.png", DEPTH.astype(np.uint16) * 257),
        ("a.tif", DEPTH.astype(np.uint16) * 257),
        ("b.tif", DEPTH.astype(np.int32) * 257),
        ("c.tif", DEPTH.astype(np.float32) / 255),
        ("d.tif", DEPTH.astype(np.float32)),
        ("a.png", DEPTH),
    ],
)
def test_deeper_pictures_are_scaled(name, values, tmp_path):
    Image.fromarray(values).save(tmp_path / name)
    found = inputs.picture(tmp_path / name)
    np.testing.assert_array_equal(found, np.repeat(DEPTH[..., None], 3, axis=2))
    assert inputs.size(tmp_path / name) == (2, 2)


@pytest.mark.parametrize("wrong", [np.nan, -1.0, 256.0, np.inf])
def test_floats_without_a_known_white_are_refused_at_the_start(wrong, tmp_path):
    Image.fromarray(np.array([[0, wrong]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="line 1: cannot read the image .*a.tif .its values"):
        read(metadata(tmp_path, '{"prompt": "a", "image": "a.tif"}'), "test")


def transparent(kind: str, path: Path) -> list:
    """Write red, half of it red or none, and nothing; return the three colours that are seen."""
    if kind == "RGBA":
        colours = np.array([[(255, 0, 0, 255), (255, 0, 0, 51), (9, 9, 9, 0)]], np.uint8)
        Image.fromarray(colours).save(path)
        return [(255, 0, 0), (255, 204, 204), (255, 255, 255)]
    if kind == "LA":
        Image.fromarray(np.array([[(0, 255), (0, 51), (9, 0)]], np.uint8)).save(path)
        return [(0, 0, 0), (204, 204, 204), (255, 255, 255)]
    if kind == "RGB":
        colours = np.array([[(255, 0, 0), (0, 255, 0), (1, 2, 3)]], np.uint8)
        Image.fromarray(colours).save(path, transparency=(1, 2, 3))
        return [(255, 0, 0), (0, 255, 0), (255, 255, 255)]
    if kind == "I;16":
        Image.fromarray(np.array([[0, 65535, 7]], np.uint16)).save(path, transparency=7)
        return [(0, 0, 0), (255, 255, 255), (255, 255, 255)]
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(path, transparency=2)
    return [(255, 0, 0), (0, 255, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    "kind, suffix",
    [("RGBA", "png"), ("RGBA", "tif"), ("LA", "png"), ("RGB", "png"), ("I;16", "png"),
     ("P", "png"), ("P", "gif")],
)  # fmt: skip
def test_what_is_transparent_shows_white(kind, suffix, tmp_path):
    seen = transparent(kind, tmp_path / f"a.{suffix}")
    assert [tuple(map(int, p)) for p in inputs.picture(tmp_path / f"a.{suffix}")[0]] == seen
    assert pictures.load(tmp_path / f"a.{suffix}").tolist() == [[list(each) for each in seen]]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animated_reference_the_first_frame_counts(suffix, tmp_path):
    first, *rest = (Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue"))
    more = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=rest, **more)
    assert inputs.picture(path).shape == (6, 8, 3) and (inputs.picture(path) == (255, 0, 0)).all()
    assert pictures.load(path)[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    (prompt,) = read(metadata(tmp_path, f'{{"prompt": "a", "image": "a.{suffix}"}}'), "test")
    assert prompt.load_images()[0].shape == (6, 8, 3) and prompt.image_sizes == ((8, 6),)


def test_further_pages_are_no_frames(tmp_path):
    pages = [Image.new("RGB", (8, 6), "red"), Image.new("RGB", (4, 4), "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert pictures.load(tmp_path / "a.tif").shape == (6, 8, 3)


@pytest.mark.parametrize("name", ["a.gif", "a.bmp", "a.tif", "a.png", "a.jpg", "a.webp", "a.ppm"])
def test_a_cut_picture_is_refused_at_the_start_by_all(name, tmp_path):
    pixels = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    whole, seen = (tmp_path / name).read_bytes(), inputs.picture(tmp_path / name)
    for left in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 20):
        (tmp_path / name).write_bytes(whole[:left])
        with pytest.raises(ValueError, match=f"line 1: cannot read the image .*{name}"):
            read(metadata(tmp_path, f'{{"prompt": "a", "image": "{name}"}}'), "test")
        if name != "a.ppm":
            with pytest.raises(SystemExit, match=f"cannot read the image .*{name}"):
                main(["--reward", "jpeg_compressibility", str(tmp_path)])
    for left in range(len(whole) - 20, len(whole)):  # what passes is whole
        (tmp_path / name).write_bytes(whole[:left])
        try:
            inputs.size(tmp_path / name)
        except ValueError:
            continue
        np.testing.assert_array_equal(inputs.picture(tmp_path / name), seen)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "device"])
def test_only_a_regular_file_is_a_picture(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": tmp_path / "nowhere.png", "device": Path("/dev/zero")}[kind])
    folder = metadata(tmp_path, '{"prompt": "a", "image": "a.png"}')
    for look in (lambda: read(folder, "test"), lambda: check(folder), lambda: inputs.picture(path)):
        with pytest.raises(ValueError, match="cannot read the image .*a.png"):
            look()
    with pytest.raises(ValueError, match="a.png|has no images"):
        pictures.read(tmp_path)
