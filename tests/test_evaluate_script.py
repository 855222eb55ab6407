"""scripts/evaluate.py draws and scores what a run and what diffusers would."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import running
import tiny
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from waiting import HANG_S

from flow_grpo.launch import weights
from flow_grpo.randomness import Randomness
from flow_grpo.report.output import read_metrics
from flow_grpo.rewards.__main__ import main as score_folder
from scripts import evaluate as script

ROOT = Path(__file__).parent.parent
ROWS = [
    {"prompt": prompt, "tag": tag}
    for tag in ("fruit", "sign")
    for prompt in ("a red apple", "a cat", "two green cubes")
] + [{"prompt": "a cat", "tag": "fruit"}]


@pytest.fixture(scope="module")
def tagged(files):
    """A data set with tags and repeated prompts."""
    folder = files / "tagged"
    folder.mkdir()
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (folder / f"{split}_metadata.jsonl").write_text(lines)
    return folder


def options(files, out, *more, **overrides) -> list[str]:
    overrides = {"dataset": files / "tagged"} | overrides
    config = running.arguments(files, **overrides)[1:]
    return ["evaluate.py", "--out", str(out), *map(str, more), *config]


def evaluate(files, out, *more, **overrides) -> Path:
    with running.fresh_process():
        script.main(options(files, out, *more, **overrides))
    return out


def read_csv(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def same_as_logged(table: list[dict], logged: dict) -> bool:
    found = {}
    for row in table:
        suffix = f"/{row['tag']}" if row["tag"] else ""
        for end, column in {"": "mean", "_low": "low", "_high": "high"}.items():
            found[f"{row['score']}{end}{suffix}"] = float(row[column])
    return found == {k: v for k, v in logged.items() if k not in ("kind", "epoch", "step")}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_evaluation_repeats_the_rows_that_a_run_logged(files, tagged, tmp_path, kind, capsys):
    settings = {"train__ema": True, "train__ema_update_every": 1, "train__learning_rate": 1e-2}
    settings |= running.lora(files) if kind == "lora" else {}
    settings |= {"dataset": tagged, "mixed_precision": "bf16", "sample__eval_guidance_scale": 3.0}
    argv = running.arguments(files, run_name=f"eval-{kind}", num_epochs=1, **settings)
    run = running.train(argv)
    first, last = read_metrics(run.folder, "eval")
    assert {"avg_low", "avg_high", "avg_low/sign", "avg_high/fruit"} <= set(first)
    assert first["avg"] != last["avg"]
    start = files / "lora" if kind == "lora" else "base"
    for name, row in {start: first, run.folder / "checkpoints" / "checkpoint-2": last}.items():
        out = evaluate(files, tmp_path / Path(name).name, "--checkpoint", name, **settings)
        assert same_as_logged(read_csv(out / "table.csv"), row)
        assert "note:" not in capsys.readouterr().out
    script.read(options(files, tmp_path / "other", "--checkpoint", name, **settings | {"seed": 7}))
    assert "was trained with config.seed=42, not 7" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_what_one_writes(files, tagged, tmp_path):
    more = ("--checkpoint", files / "lora", "--write-images")
    one = evaluate(files, tmp_path / "one", *more, sample__test_batch_size=2)  # 4 batches
    launcher = [
        "--config_file",
        "scripts/accelerate_configs/multi_gpu.yaml",
        "--num_processes",
        "2",
    ]
    argv = options(files, tmp_path / "two", *more, sample__test_batch_size=2)[1:]
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *launcher,
            "scripts/evaluate.py",
            *argv,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["num_processes"] == 2
    names = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
    assert names >= {"scores.csv", "table.csv", "sheet.png", "images/000006.png"}
    for name in names - {"evaluation.json"}:
        assert (tmp_path / "two" / name).read_bytes() == (one / name).read_bytes(), name


def test_a_lora_draws_what_it_draws_in_a_stock_pipeline(files, tagged, tmp_path):
    settings = {"sample__test_batch_size": 1, "sample__eval_guidance_scale": 3.0}
    more = ("--checkpoint", "base", "--checkpoint", files / "lora", "--write-images")
    out = evaluate(files, tmp_path / "out", *more, **settings)
    stock = StableDiffusion3Pipeline.from_pretrained(files / "sd3")
    stock.set_progress_bar_config(disable=True)
    for folder in ("first", "second"):
        for n, row in enumerate(ROWS):
            drawn = stock(
                row["prompt"],
                height=32,
                width=32,
                num_inference_steps=3,
                guidance_scale=3.0,
                max_sequence_length=16,
                latents=Randomness(42, ()).normal(
                    "init", [(n, -1)], (tiny.parts.LATENT_CHANNELS, 4, 4)
                ),
            ).images[0]
            ours = np.asarray(Image.open(out / folder / "images" / f"{n:06d}.png"))
            assert np.array_equal(ours, np.asarray(drawn)), (folder, n)
        stock.load_lora_weights(files / "lora")
    pairs = read_csv(out / "pairwise.csv")
    scores = [
        np.array([float(row["avg"]) for row in read_csv(out / folder / "scores.csv")])
        for folder in ("first", "second")
    ]
    everything = next(row for row in pairs if row["score"] == "avg" and not row["tag"])
    difference = scores[1] - scores[0]
    assert float(everything["difference"]) == pytest.approx(difference.mean(), abs=1e-12)
    counted = [int(everything[name]) for name in ("wins", "ties", "losses")]
    assert counted == [(difference > 0).sum(), (difference == 0).sum(), (difference < 0).sum()]
    assert counted[1] < len(ROWS)


def test_a_checkpoint_ties_with_itself_on_every_row(files, tagged, tmp_path):
    more = ("--checkpoint", files / "lora", "--checkpoint", files / "lora")
    out = evaluate(files, tmp_path / "out", *more)
    for row in read_csv(out / "pairwise.csv"):
        num_rows = {"": 7, "fruit": 4, "sign": 3, "mean_of_tags": 7}[row["tag"]]
        assert int(row["ties"]) == int(row["num_rows"]) == num_rows
        assert float(row["difference"]) == float(row["low"]) == float(row["high"]) == 0
    assert (out / "pairs.png").is_file()


def test_written_pictures_score_the_same_afterwards(files, tagged, tmp_path, capsys):
    out = evaluate(files, tmp_path / "out", "--write-images")
    score_folder(["--reward", "jpeg_incompressibility", str(out / "images")])
    again, before = read_csv(out / "images" / "scores.csv"), read_csv(out / "scores.csv")
    assert len(again) == len(ROWS)
    for one, other in zip(again, before, strict=True):
        for key in ("prompt", "tag", "jpeg_incompressibility"):
            assert one[key] == other[key]


def test_pictures_of_an_editing_model_keep_their_references(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    Image.fromarray(tiny.picture(32, 32)).save(folder / "a.png")
    row = {"prompt": "add a hat", "image": "a.png"}
    (folder / "test_metadata.jsonl").write_text(json.dumps(row) + "\n")
    tiny.save("flux_kontext", tmp_path / "kontext")
    changed = {"pretrained__model": tmp_path / "kontext", "dataset": folder}
    out = evaluate(tmp_path, tmp_path / "out", "--write-images", **changed)
    written = json.loads((out / "images" / "metadata.jsonl").read_text())
    assert written["prompt"] == "add a hat" and written["image"] == [str(folder / "a.png")]


BAD = {
    "no such checkpoint": (["--checkpoint", "nowhere"], {}, "'nowhere' holds neither"),
    "three": (["--checkpoint", "base"] * 3, {}, "3 times"),
    "reward": ([], {"reward_fn": {"shaps": 1.0}}, "Did you mean 'shapes'"),
    "data": ([], {"dataset": "/nowhere"}, "/nowhere"),
    "flag": (["--checkpont", "base"], {}, "checkpont"),
    "whole pipeline": (["--checkpoint", "sd3"], {}, "--config.pretrained.model"),
    "another class": (["--checkpoint", "flux"], {}, "FluxTransformer2DModel"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_before_weights_load(files, tagged, tmp_path, monkeypatch, case):
    more, changed, message = BAD[case]
    monkeypatch.chdir(ROOT)
    if case in ("whole pipeline", "another class"):
        more = [more[0], files / more[1]]
    if case == "another class":
        (files / "flux").mkdir()
        (files / "flux" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
        save_file({}, files / "flux" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message):
        script.read(options(files, tmp_path / "out", *more, **changed))
    assert not (tmp_path / "out").exists()


def test_results_are_never_mixed(files, tagged, tmp_path):
    (tmp_path / "scores.csv").write_text("of yesterday")
    with pytest.raises(ValueError, match="not empty"):
        script.read(options(files, tmp_path))


@pytest.mark.parametrize("name", ["another model", "no transformer"])
def test_a_lora_of_another_model_is_refused(files, tagged, tmp_path, name):
    held = load_file(files / "lora" / "pytorch_lora_weights.safetensors")
    if name == "no transformer":
        held = {key.replace("transformer.", "text_encoder."): value for key, value in held.items()}
    else:
        held = {key.replace("transformer_blocks.0", "blocks.9"): v for key, v in held.items()}
    save_file(held, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(SystemExit, match="does not fit SD3Transformer2DModel"):
        evaluate(files, tmp_path / "out", "--checkpoint", tmp_path)


def test_weights_are_found_wherever_a_run_or_diffusers_puts_them(files, tmp_path):
    state = tmp_path / "checkpoints" / "checkpoint-2"
    for part in ("lora", "transformer"):
        (state / part).mkdir(parents=True)
    (state / "trainer.json").write_text("{}")
    save_file({}, state / "weights.safetensors")
    save_file({}, state / "lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for name in (state, state / "lora", state / "lora" / "pytorch_lora_weights.safetensors"):
        found = weights.find(str(name))
        assert found.kind == "lora" and weights.run_config(found) == {"seed": 3}
    (state / "lora" / "pytorch_lora_weights.safetensors").rename(tmp_path / "my.safetensors")
    (state / "transformer" / "config.json").write_text("{}")
    save_file({}, state / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in (state, state / "transformer"):
        assert weights.find(str(name)).path == state / "transformer"
    assert weights.find(str(tmp_path / "my.safetensors")).kind == "lora"
    assert weights.run_config(weights.find("base")) == {}
    with pytest.raises(ValueError, match="holds neither"):
        weights.find(str(tmp_path / "checkpoints"))


def test_one_folder_takes_the_results_of_one_evaluation(files, tagged, tmp_path):
    """Another process has it, from before the weights load until all is written."""
    out, free = tmp_path / "out", tmp_path / "free"
    code = "import sys; from pathlib import Path; from flow_grpo.training.claim import Results\n"
    code += "mine = Results(Path(sys.argv[1]), '--out'); print('has it', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(SystemExit, match=f"--out={out}: in use by host .*, pid {other.pid}."):
            evaluate(files, out)
        assert [path.name for path in out.iterdir()] == ["run.lock"]
        evaluate(files, free)
        other.kill()
    evaluate(files, out)  # what a killed process left behind is no result
    assert (out / "scores.csv").read_bytes() == (free / "scores.csv").read_bytes()
    assert not (out / "run.lock").exists()
    with pytest.raises(SystemExit, match=f"--out={out} is not empty"):
        evaluate(files, out)


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_out_folder_that_can_not_be_is_named_at_the_start(files, tagged, tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out=.*file.*: it can't be written to .*Name a folder"):
        evaluate(files, f"{tmp_path}/file{below}")
