"""Score a base, a LoRA or a fine-tuned transformer on a data set's prompts, or compare two.

    python scripts/evaluate.py --config config/testbed.py:shapes_sd3 --out logs/evaluation \\
        --checkpoint base --checkpoint logs/NAME/checkpoints/checkpoint-320

The config's flags are those of training (config.dataset, config.eval_split, config.reward_fn,
config.sample.eval_num_steps ...), and so are the numbers: each row is drawn from the noise that a
run of the same seed evaluates it with. Runs on several processes under `accelerate launch` too, to
the same bits. docs/evaluate.md has the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np
from tqdm import tqdm

from flow_grpo.cli import redacted, user_errors, user_path
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation import tables
from flow_grpo.evaluation.evaluate import score_prompts, spread
from flow_grpo.launch import entry, model_files, preflight, provenance, settings, weights
from flow_grpo.launch.build import build_evaluator
from flow_grpo.launch.weights import Weights
from flow_grpo.parallel import choose
from flow_grpo.parallel.stop import Stopped
from flow_grpo.prompts import Prompt
from flow_grpo.report.sheets import captioned_sheet, side_by_side
from flow_grpo.training.checkpoint import PACKAGES
from flow_grpo.training.claim import Results

MUST_AGREE = (  # for an evaluation to repeat that of the run
    "pretrained.model",
    "dataset",
    "eval_split",
    "reward_fn",
    "seed",
    "resolution",
    "height",
    "width",
    "num_frames",
    "reference_area",
    "max_sequence_length",
    "mixed_precision",
    "use_lora",
    "sample.eval_num_steps",
    "sample.guidance_scale",
    "sample.eval_guidance_scale",
    "sample.guidance_interval",
    "sample.batched_guidance",
    "sample.test_batch_size",
)


class Job(NamedTuple):
    """What the command line asks for, checked."""

    config: ml_collections.ConfigDict
    family: type[PatchedPipeline]
    checkpoints: list[Weights]  # one or two
    prompts: list[Prompt]
    out: Path
    write_images: bool
    claim: Results | None  # of `out`, which the main process has


class Result(NamedTuple):
    scores: dict[str, np.ndarray]  # (N,) each
    images: dict[int, np.ndarray]  # some rows' images


def main(argv: list[str]) -> None:
    """Evaluate, and leave with 0, or 1 and a message, or 128 + a signal's number."""
    status = 0
    with user_errors():
        job = read(argv)
        try:
            results = [score(job, i) for i in range(len(job.checkpoints))]
            if is_main_process():
                if len(results) == 2:
                    write_comparison(job, *results)
                print(f"\nEverything is in {job.out}", flush=True)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            status = stopped.exit_status
        finally:
            if job.claim:
                job.claim.release()
    if status or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        entry.leave(status)


def read(argv: list[str]) -> Job:
    """Check the command line and all that needs no weights. Raises ValueError."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=settings.USAGE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        help="'base' (the default), a run's checkpoint-N folder, or a LoRA's or transformer's; "
        "a second one is compared with the first, row by row",
    )
    parser.add_argument("--out", type=user_path, required=True, help="a new folder for the results")
    parser.add_argument("--write-images", action="store_true", help="every image, losslessly")
    args, rest = parser.parse_known_args(argv[1:])
    config, _ = settings.load([argv[0], *rest], "config/testbed.py:shapes_sd3")
    names = args.checkpoint or [weights.BASE]
    if len(names) > 2:
        raise ValueError(f"--checkpoint was given {len(names)} times: one or two are needed.")
    choose.refuse_shards()
    prompts = preflight.check_evaluation(config)
    found = [weights.find(name) for name in names]
    for each in found:
        weights.check_class(each, model_files.index(config))
        if each.kind == "lora":
            model_files.check_lora(config, "--checkpoint", str(each.path))
    family, claim = model_files.family(config), None
    if is_main_process():
        for each in found:
            note_differences(each, config)
        claim = Results(args.out, "--out")
    return Job(config, family, found, prompts, args.out, args.write_images, claim)


def note_differences(checkpoint: Weights, config: ml_collections.ConfigDict) -> None:
    """Say where the evaluation is not that of the run that wrote the checkpoint."""
    run, here = weights.run_config(checkpoint), json.loads(config.to_json_best_effort())
    for key in MUST_AGREE:
        section, _, name = key.rpartition(".")
        theirs, ours = ((each.get(section, {}) if section else each) for each in (run, here))
        known = isinstance(theirs, dict) and name in theirs  # an older run may lack the key
        if known and theirs[name] != ours[name]:
            print(
                f"note: {checkpoint.name} was trained with config.{key}={theirs[name]}, "
                f"not {ours[name]}"
            )


def score(job: Job, number: int) -> Result:
    """Draw and score every prompt with one checkpoint; write and print what came of it."""
    checkpoint, prompts = job.checkpoints[number], job.prompts
    folder = job.out / ("first", "second")[number] if len(job.checkpoints) == 2 else job.out
    evaluator = build_evaluator(job.config, job.family, checkpoint, prompts)
    evaluator.ranks.barrier()  # all have seen --out empty
    pictures = folder / "images"
    (pictures if job.write_images else folder).mkdir(parents=True, exist_ok=True)

    def keep(row: int, image: np.ndarray) -> None:
        if job.write_images:
            write_image(pictures / f"{row:06d}.png", image)

    result = Result(*score_prompts(evaluator, prompts, spread(len(prompts)), keep))
    evaluator.scorer.close()
    evaluator.ranks.barrier()
    evaluator.ranks.watch.end()
    if is_main_process():
        tqdm.write(f"\n{checkpoint.name} ({checkpoint.kind}), {len(prompts)} rows")
        write_result(job, checkpoint, folder, result)
    return result


def write_result(job: Job, checkpoint: Weights, folder: Path, result: Result) -> None:
    """Write a checkpoint's scores, their table, a sheet, and what they were made with."""
    texts, tags = [p.text for p in job.prompts], [p.tag for p in job.prompts]
    summaries = tables.summarise(result.scores, tags, texts)
    print(tables.table(summaries))
    tables.write_csv(folder / "table.csv", summaries)
    tables.write_scores(folder / "scores.csv", result.scores, job.prompts)
    name = shown_score(job)
    captions = [f"{texts[n]}\n{name} {result.scores[name][n]:.3f}" for n in result.images]
    captioned_sheet(list(result.images.values()), captions, 8).save(folder / "sheet.png")
    if job.write_images:
        with (folder / "images" / "metadata.jsonl").open("w", encoding="utf-8") as file:
            for n, prompt in enumerate(job.prompts):
                row = prompt.metadata | {"file": f"{n:06d}.png", "prompt": prompt.text}
                if prompt.images:
                    row["image"] = [str(Path(path).resolve()) for path in prompt.images]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    made_with = {
        "checkpoint": checkpoint.name,
        "kind": checkpoint.kind,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "revision": provenance.revision(),
        "machine": provenance.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "config": redacted(json.loads(job.config.to_json_best_effort())),
    }
    (folder / "evaluation.json").write_text(json.dumps(made_with, indent=2) + "\n")


def write_comparison(job: Job, first: Result, second: Result) -> None:
    """Compare two checkpoints row by row."""
    texts, tags = [p.text for p in job.prompts], [p.tag for p in job.prompts]
    comparisons = tables.compare(first.scores, second.scores, tags, texts)
    print(f"\n{job.checkpoints[1].name} less {job.checkpoints[0].name}")
    print(f"{tables.table(comparisons)}\n{tables.outcomes(comparisons)}")
    tables.write_csv(job.out / "pairwise.csv", comparisons)
    rows, name = list(first.images)[::2], shown_score(job)
    before, after = first.scores[name], second.scores[name]
    captions = [f"{texts[n]}\n{name} {before[n]:.3f} -> {after[n]:.3f}" for n in rows]
    pairs = [side_by_side(first.images[n], second.images[n]) for n in rows]
    captioned_sheet(pairs, captions, 4).save(job.out / "pairs.png")


def shown_score(job: Job) -> str:
    """Name the score of a caption: the weighted sum, or the only reward of it."""
    trained = [name for name, weight in job.config.reward_fn.items() if weight]
    return trained[0] if len(trained) == 1 else "avg"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as PNG; a video (F, H, W, 3) as an animated one."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in (image if image.ndim == 4 else image[None]))
    first.save(path, save_all=bool(rest), append_images=rest)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main(sys.argv)
