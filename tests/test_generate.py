"""scripts/demo/generate.py draws by the stock pipeline, with what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from scripts.demo import generate


def draw(files, out, *more, model="sd3") -> Path:
    argv = ["generate.py", "--model", files / model, "--out", out, "--prompt", "a cat"]
    generate.main([*map(str, argv), "--size", "32", "--steps", "2", *map(str, more)])
    return out


def test_generate_draws_by_the_stock_pipeline_with_the_trained_weights(files, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n\nthree cats\n")
    more = ("--prompts", prompts, "--guidance", 3, "--seed", 5, "--max_sequence_length", 16)
    stock = StableDiffusion3Pipeline.from_pretrained(files / "sd3")
    stock.load_lora_weights(files / "lora")
    stock.fuse_lora()
    stock.unload_lora_weights()
    stock.transformer.save_pretrained(tmp_path / "transformer")
    base = draw(files, tmp_path / "base", *more)
    lora = draw(files, tmp_path / "lora", "--lora", files / "lora", *more)
    full = draw(files, tmp_path / "full", "--transformer", tmp_path / "transformer", *more)
    rows = [json.loads(line) for line in (lora / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "three cats"]
    assert (lora / "sheet.png").is_file()
    for row in rows:
        drawn = [np.asarray(Image.open(d / row["file"])).astype(int) for d in (base, lora, full)]
        assert np.abs(drawn[1] - drawn[2]).max() <= 1  # fused weights round otherwise
        assert np.abs(drawn[0] - drawn[1]).max() > 1
    again = draw(files, tmp_path / "again", "--lora", files / "lora", *more)
    assert (again / "0002.png").read_bytes() == (lora / "0002.png").read_bytes()


def test_generate_takes_videos_and_references(files, tmp_path):
    tiny.save("wan", files / "wan")
    video = draw(files, tmp_path / "video", "--num_frames", 5, model="wan")
    assert Image.open(video / "0000.png").n_frames == 5
    tiny.save("flux_kontext", files / "kontext")
    Image.fromarray(tiny.picture(32, 32)).save(tmp_path / "a.png")
    edited = draw(files, tmp_path / "edit", "--image", tmp_path / "a.png", model="kontext")
    assert Image.open(edited / "0000.png").size == (32, 32)


def test_generate_names_an_option_that_the_pipeline_lacks(files, tmp_path):
    with pytest.raises(SystemExit, match="StableDiffusion3Pipeline takes no num_frames"):
        draw(files, tmp_path / "out", "--num_frames", 5)
    for option in (("--lora", "nowhere"), ("--transformer", tmp_path), ("--size", "big")):
        with pytest.raises(SystemExit, match=f"{option[0]}={option[1]}"):
            draw(files, tmp_path / "out", *option)
    assert not (tmp_path / "out").exists()
