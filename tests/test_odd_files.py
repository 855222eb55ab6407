"""Data sets that no editor wrote: what would hang, fill the memory or be misread is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zlib
from pathlib import Path

import fuzzing
import numpy as np
import pytest
from fuzz_pictures import BACK, EPS, on_white
from PIL import Image

from config.base import base
from flow_grpo import inputs
from flow_grpo.launch import model_files, provenance
from flow_grpo.prompts import read
from flow_grpo.rewards import pictures
from flow_grpo.rewards.remote.servers import read_token

ROOT = Path(__file__).parent.parent
GREY = np.arange(30, dtype=np.uint8).reshape(6, 5) * 8  # higher than it is wide


def in_place_of(path: Path, kind: str) -> None:
    """Put what is no regular file at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": "nowhere", "loop": path.name}.get(kind, kind))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "loop", "/dev/zero"])
def test_only_a_regular_file_is_read_as_text(kind, tmp_path):
    path = tmp_path / "token"
    in_place_of(path, kind)
    with fuzzing.guarded(), pytest.raises(ValueError, match="config.key=.*token.* can't be read"):
        read_token(str(path), "config.key")


@pytest.mark.parametrize("name", ["prompts.txt", "metadata.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "loop", "/dev/zero"])
def test_what_says_the_prompts_of_pictures_is_not_passed_over(kind, name, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    in_place_of(tmp_path / name, kind)
    with fuzzing.guarded(), pytest.raises(ValueError, match=f"{name} can't be read"):
        pictures.read(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "x/" * 3000, "a\0b", "", "/"])
def test_a_name_that_no_file_can_have_is_refused_with_its_row(name, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for row in ({"file": name or "."}, {"file": "a.png", "image": name}):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match="metadata.jsonl, line 1: "):
            pictures.read(tmp_path)


@pytest.mark.parametrize(
    "row", ['{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "x": [{"y": 1, "z": 2, "y": 1}]}']
)
def test_a_key_that_stands_twice_is_refused(row, tmp_path):
    (tmp_path / "test_metadata.jsonl").write_text(f'{{"prompt": "fine"}}\n{row}\n')
    with pytest.raises(ValueError, match="line 2: .*the key '(prompt|y)' stands twice"):
        read(str(tmp_path), "test")


@pytest.mark.parametrize("orientation", BACK)
@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
def test_a_turned_tiff_is_read_whatever_its_mode(mode, orientation, tmp_path):
    """PIL 13 maps these modes into memory by the turned size, which scrambles their rows."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = np.repeat(GREY[..., None], 3, axis=2)
    image = Image.fromarray(GREY.astype(np.uint16) * 257 if mode == "I;16" else GREY)
    if mode == "RGBA":
        image, seen = Image.fromarray(np.dstack([seen, GREY])), on_white(seen, GREY)
    elif mode == "P":
        image.putpalette(bytes(range(256)))
        image, seen = Image.frombytes("P", (5, 6), GREY.tobytes()), seen
        image.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    image.save(tmp_path / "a.tif", exif=exif)
    shown = BACK[orientation](seen)
    np.testing.assert_array_equal(inputs.picture(tmp_path / "a.tif"), shown)
    assert inputs.size(tmp_path / "a.tif") == shown.shape[1::-1]


def png(width: int, height: int) -> bytes:
    """A picture of one bit, whole and well compressed."""
    head = b"".join(n.to_bytes(4, "big") for n in (width, height)) + b"\1\0\0\0\0"
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", head), (b"IDAT", deflated(width, height)), (b"IEND", b"")):
        data += len(body).to_bytes(4, "big") + name + body
        data += zlib.crc32(name + body).to_bytes(4, "big")
    return data


def deflated(width: int, height: int) -> bytes:
    packer = zlib.compressobj()
    rows = (packer.compress(bytes((width + 7) // 8 + 1)) for _ in range(height))
    return b"".join(rows) + packer.flush()


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("width, height", [(8193, 8192), (2**20, 65), (9000, 9000)])
def test_a_small_file_of_an_enormous_picture_is_refused_unread(width, height, tmp_path):
    (tmp_path / "a.png").write_bytes(png(width, height))
    assert (tmp_path / "a.png").stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for look in (inputs.size, inputs.picture, pictures.load):
        with pytest.raises(ValueError, match=r"a.png \(.* pixels, more than 67,108,864"):
            look(tmp_path / "a.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


def test_a_long_and_narrow_picture_is_none(tmp_path):
    (tmp_path / "a.png").write_bytes(png(16, 4096))
    assert inputs.size(tmp_path / "a.png") == (16, 4096)
    assert inputs.picture(tmp_path / "a.png").shape == (4096, 16, 3)


def test_an_animation_that_no_memory_holds_is_refused_unread(tmp_path, monkeypatch):
    frames = [Image.new("L", (64, 64), n) for n in range(17)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pictures.load(tmp_path / "a.gif").shape == (17, 64, 64, 3)
    monkeypatch.setattr(inputs, "MAX_PIXELS", 64 * 64)
    with pytest.raises(ValueError, match="a.gif .17 frames of 64 x 64 pixels are too many"):
        pictures.load(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg"])
def test_a_picture_that_is_a_program_is_not_run(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(EPS)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # calling it is a TypeError
    for look in (inputs.size, inputs.picture):
        with pytest.raises(ValueError, match=f"{name} .EPS is a program that would be run"):
            look(tmp_path / name)


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "\0",
    "[" * 10**5,
    '{"a":' * 10**4,
    "\ud800",
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "index"])
def test_a_model_s_damaged_json_is_named(name, text, tmp_path):
    name = "vae/diffusion_pytorch_model.safetensors.index.json" if name == "index" else name
    shutil.copytree(ROOT / "scripts/testbed/base", tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    config = base(None)
    config.pretrained.model = str(tmp_path / "model")
    with pytest.raises(ValueError, match=f"{name} is (damaged|not UTF-8)"):
        model_files.check(config)


@pytest.mark.parametrize("text", ["", "{}", "3", "[" * 10**5])
def test_a_damaged_list_of_launches_begins_anew(text, tmp_path, capsys):
    path = tmp_path / provenance.FILE
    path.write_text(text)
    provenance.record(tmp_path, ["train.py"], 1, tmp_path / "checkpoints" / "checkpoint-2")
    assert f"{path} is damaged; it begins anew." in capsys.readouterr().out
    assert len(json.loads(path.read_text())) == 1
