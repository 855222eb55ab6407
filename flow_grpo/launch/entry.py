"""The entry of every training script: read the config, refuse what can't work, then train."""

from __future__ import annotations

import os
import sys

from flow_grpo.cli import user_errors
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.launch import model_files, preflight, provenance, settings, space
from flow_grpo.launch.build import build, start
from flow_grpo.objectives.registry import find
from flow_grpo.parallel import choose
from flow_grpo.parallel.faults.stop import Stopped
from flow_grpo.report import output
from flow_grpo.training import folders, loop
from flow_grpo.training.claim import Claim
from flow_grpo.training.run import Run


def main(family: type[PatchedPipeline], default_config: str) -> None:
    """Run a training script. default_config: FILE.py:RUN.

    Exits with 1 and one message where the config, the data or the checkpoint is at fault, and with
    128 + the signal's number after SIGTERM or SIGINT.
    """
    with user_errors():
        run = prepare(sys.argv, family, default_config)
    leave(execute(run))


def leave(status: int) -> None:
    """End the process. The interpreter's own way out aborts in the ranks' threads, now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def prepare(argv: list[str], family: type[PatchedPipeline], default_config: str) -> Run:
    """Check everything, the cheapest first, then load the model. Raises ValueError."""
    config, name = settings.load(argv, default_config)
    world_size, rank = choose.promised()
    plan = preflight.check(config, world_size, argv)
    find(config.objective).check(config, family)
    if rank == 0:
        published = plan.beside_published(config.sample.num_batches_per_epoch)
        notes = (plan, published, model_files.to_download(config))
        print(*filter(None, notes), sep="\n", flush=True)
    identity = folders.identity(config, family.__name__, world_size)
    engine = start(config, family, plan.train_prompts + plan.eval_prompts)
    claim = Claim(config, name, engine.ranks)
    try:
        # Of the main rank alone, for it reads the whole checkpoint.
        resume_from = engine.ranks.on_main(lambda: folders.resume_point(config, identity))
        note = resume_from and provenance.differences(config, plan, resume_from)
        if rank == 0 and note:
            print(note, flush=True)
        named = family.lora_target_modules, claim.folder, resume_from, family.trained_part
        engine.ranks.on_main(lambda: space.check(config, *named))
        run = build(config, plan, family, identity, resume_from, engine, claim)
    except BaseException as error:
        claim.release()
        engine.ranks.watch.post(f"{type(error).__name__}: {error}")
        raise
    run.again = provenance.command(
        argv,
        world_size,
        run_name=run.folder.relative_to(config.logdir),
        resume_from="latest",
    )
    if run.ranks.is_main:
        provenance.record(run.folder, argv, world_size, resume_from)
    return run


def execute(run: Run) -> int:
    """Train, say what came of it, and return the exit status."""
    main_process = run.ranks.is_main
    if main_process:
        passes = ", ".join(f"{count} {name}" for name, count in run.passes().items() if count)
        print(f"{run.folder}; passes of an image an epoch: {passes}", flush=True)
        if excess := run.excess_noise():
            print(
                f"a stochastic step leaves up to {excess:.3f} more noise than the schedule's next "
                f"sigma (docs/noise.md)",
                flush=True,
            )
    status = 0
    try:
        loop.train(run)
        if main_process:
            table = output.table(run.folder)
            print(f"\n{table}\n\nEverything is in {run.folder}; report.html shows it.", flush=True)
    except Stopped as stopped:
        if main_process:
            outcome = "; ".join([str(stopped), *getattr(stopped, "__notes__", ())])
            print(f"{outcome}. To continue it: {run.again}", file=sys.stderr)
        status = stopped.exit_status
    except Exception as error:
        if run.saved:
            error.add_note(f"To continue it: {run.again}")
        raise
    finally:
        run.close()
    run.engine.leave()
    return status
