"""Score a base, a LoRA or a fine-tuned transformer on a data set's prompts, or compare two.

    python scripts/evaluate.py --config config/testbed.py:shapes_sd3 --out logs/evaluation \\
        --checkpoint base --checkpoint logs/NAME/checkpoints/checkpoint-320

With --protocol NAME the prompts, sizes, steps, judge and the rest are those of
flow_grpo/evaluation/protocols/NAME.toml.

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

from config.base import keys_of
from flow_grpo import keys
from flow_grpo.cli import redacted, user_errors, user_path
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.evaluation import protocol as protocols
from flow_grpo.evaluation import results, tables
from flow_grpo.evaluation.evaluate import at_sizes, score_prompts, sizes, spread
from flow_grpo.evaluation.kept import Kept
from flow_grpo.evaluation.protocol import Protocol
from flow_grpo.launch import entry, model_files, preflight, provenance, settings, weights
from flow_grpo.launch.build import build_evaluator
from flow_grpo.launch.weights import Weights
from flow_grpo.parallel import choose
from flow_grpo.parallel.faults.stop import Stopped
from flow_grpo.prompts import Prompt
from flow_grpo.report.sheets import captioned_sheet
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
    "sample.eval_sizes",
    "sample.guidance_scale",
    "sample.eval_guidance_scale",
    "sample.guidance_interval",
    "sample.batched_guidance",
    "sample.clean_grid",
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
    protocol: Protocol | None
    copy: str  # of the protocol's prompts: their checksum, and which one that is
    earlier: Path | None  # an evaluation's folder, to compare with
    claim: Results | None  # of `out`, which the main process has
    kept: list[Kept]  # by checkpoint, of the main process


def main(argv: list[str]) -> None:
    """Evaluate, and leave with 0, or 1 and a message, or 128 + a signal's number."""
    status = 0
    with user_errors():
        job = read(argv)
        try:
            found = [score(job, i) for i in range(len(job.checkpoints))]
            if is_main_process():
                compare(job, [each.scores for each in found], [each.images for each in found])
                for kept in job.kept:
                    kept.end()
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
    parser.add_argument("--protocol", help="of flow_grpo/evaluation/protocols/, or a .toml file")
    parser.add_argument("--compare", type=user_path, help="an earlier --out, row by row")
    parser.add_argument("--resume", action="store_true", help="go on in --out after a kill")
    args, rest = parser.parse_known_args(argv[1:])
    config, _ = settings.load([argv[0], *rest], "config/testbed.py:shapes_sd3")
    names = args.checkpoint or [weights.BASE]
    if len(names) > 2:
        raise ValueError(f"--checkpoint was given {len(names)} times: one or two are needed.")
    choose.refuse_shards()
    protocol, copy = args.protocol and protocols.load(args.protocol), ""
    if protocol:
        keys.check(config, keys_of(config))
        model_files.check(config)
        given = {name.removeprefix("config.") for name in settings.parse(rest)}
        protocol.pin(config, given, model_files.family(config).stock_name())
    prompts = preflight.check_evaluation(config)
    if len(sizes(config)) > 1:
        raise ValueError(
            f"config.sample.eval_sizes={tuple(config.sample.eval_sizes)}: this script draws at one "
            f"size; name one."
        )
    if protocol:
        copy = protocol.check(prompts)
    if args.compare:
        results.check_earlier(args.compare, config, prompts)
    found = [weights.find(name) for name in names]
    for each in found:
        weights.check_class(each, model_files.index(config))
        if each.kind == "lora":
            model_files.check_lora(config, "--checkpoint", str(each.path))
    given = (args.out, args.write_images, protocol, copy, args.compare)
    job = Job(config, model_files.family(config), found, prompts, *given, None, [])
    return claimed(job, args.resume) if is_main_process() else job


def claimed(job: Job, goes_on: bool) -> Job:
    """Close --out to others and find what is scored already. Raises ValueError."""
    for each in job.checkpoints:
        note_differences(each, job.config)
    first = folder_of(job, 0)
    if goes_on and (first / "scores.csv").exists() and not Kept.is_in(first):
        raise ValueError(f"--resume: the evaluation in --out={job.out} came to its end.")
    claim = Results(job.out, "--out", goes_on)
    try:
        kept = [Kept(folder_of(job, n), asked(job, each)) for n, each in enumerate(job.checkpoints)]
    except ValueError:
        claim.release()
        raise
    return job._replace(claim=claim, kept=kept)


def folder_of(job: Job, number: int) -> Path:
    return job.out / ("first", "second")[number] if len(job.checkpoints) == 2 else job.out


def asked(job: Job, checkpoint: Weights) -> dict:
    """Return what the scores depend on, for those of a part to be used in another process."""
    config = redacted(json.loads(job.config.to_json_best_effort()))
    for name in ("reward_urls", "reward_token_file", "logdir", "run_name"):
        del config[name]
    config["rewards"] = {k: v for k, v in config["rewards"].items() if not k.endswith("_url")}
    return {
        "config": config,
        "checkpoint": [checkpoint.name, *weights.stamps(checkpoint)],
        "dataset": protocols.checksum(job.prompts),
        "--write-images": job.write_images,
        "package": {name: version(name) for name in PACKAGES},
    }


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


def score(job: Job, number: int) -> results.Result:
    """Draw and score every prompt with one checkpoint; write and print what came of it."""
    checkpoint, prompts = job.checkpoints[number], job.prompts
    folder, kept = folder_of(job, number), job.kept[number] if job.kept else None
    (evaluator,) = at_sizes(build_evaluator(job.config, job.family, checkpoint, prompts))
    evaluator.ranks.watch.phase = "eval"
    evaluator.ranks.barrier()  # all have seen --out empty
    pictures = folder / "images"
    (pictures if job.write_images else folder).mkdir(parents=True, exist_ok=True)

    def keep(row: int, image: np.ndarray) -> None:
        if job.write_images:
            results.write_image(pictures / f"{row:06d}.png", image)

    result = results.Result(*score_prompts(evaluator, prompts, spread(len(prompts)), keep, kept))
    evaluator.scorer.close()
    evaluator.ranks.barrier()
    evaluator.ranks.watch.end()
    if is_main_process():
        tqdm.write(f"\n{checkpoint.name} ({checkpoint.kind}), {len(prompts)} rows")
        write_result(job, checkpoint, folder, result)
    return result


def write_result(job: Job, checkpoint: Weights, folder: Path, result: results.Result) -> None:
    """Write a checkpoint's scores, their table, a sheet, and what they were made with."""
    texts, tags = [p.text for p in job.prompts], [p.tag for p in job.prompts]
    summaries = tables.summarise(result.scores, tags, texts)
    print(tables.table(summaries))
    tables.write_csv(folder / "table.csv", summaries)
    tables.write_scores(folder / "scores.csv", result.scores, job.prompts)
    name = results.shown_score(job.config)
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
        "sizes": results.sizes(job.prompts),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "revision": provenance.revision(),
        "machine": provenance.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "config": redacted(json.loads(job.config.to_json_best_effort())),
    }
    if job.protocol:
        value = job.protocol.value(summaries)
        made_with |= {"protocol": job.protocol.name, "prompts": job.copy, "score": value}
        model = f"{Path(job.config.pretrained.model).name}, {checkpoint.name}"
        stated = job.protocol.markdown(job.config, job.copy, value, model, made_with["revision"])
        (folder / "protocol.md").write_text(stated)
        print(f"\n{stated}")
    (folder / "evaluation.json").write_text(json.dumps(made_with, indent=2) + "\n")


def compare(job: Job, scores: list[dict], images: list[dict]) -> None:
    """Compare two checkpoints row by row, or the first with an earlier evaluation."""
    names = [each.name for each in job.checkpoints]
    if len(names) == 2:
        print(f"\n{names[1]} less {names[0]}")
        results.compare(job.out / "pairwise.csv", scores, job.prompts)
        name = results.shown_score(job.config)
        results.draw_pairs(job.out / "pairs.png", name, scores, images, job.prompts)
    if job.earlier:
        print(f"\n{names[0]} less {job.earlier}")
        before = tables.read_scores(job.earlier / "scores.csv")[1]
        results.compare(job.out / "compared.csv", [before, scores[0]], job.prompts)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main(sys.argv)
