"""The entry of every training script: read the config, refuse what can't work, then train."""

from __future__ import annotations

import os
import sys
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flow_grpo.training.run import Run


def main(family: str, default_config: str) -> None:
    """Run a training script.

    family: "module:class" of the model's pipeline patch. default_config: FILE.py:RUN.
    Exits with 1 and one message where the config, the data or the checkpoint is at fault, and with
    128 + the signal's number after SIGTERM or SIGINT.
    """
    try:
        run = prepare(sys.argv, family, default_config)
    except ValueError as error:
        # A bad setting is the user's to mend: the message is enough. FLOW_GRPO_TRACEBACK shows all.
        if os.environ.get("FLOW_GRPO_TRACEBACK"):
            raise
        sys.exit(f"ValueError: {error}")
    leave(execute(run))


def leave(status: int) -> None:
    """End the process. The interpreter's own way out aborts in gloo's threads, now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def prepare(argv: list[str], family: str, default_config: str) -> Run:
    """Check everything, the cheapest first, then load the model. Raises ValueError."""
    from flow_grpo.training import folders, preflight, settings  # no torch: it takes seconds

    config, name = settings.load(argv, default_config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    plan = preflight.check(config, world_size)
    folders.resume_point(config, folders.identity(config, family.split(":")[1], world_size))

    from flow_grpo.training.build import build

    return build(config, name, plan, resolve_name(family))


def execute(run: Run) -> int:
    """Train, say what came of it, and return the exit status."""
    from flow_grpo.training import loop, report
    from flow_grpo.training.stop import Stopped

    main_process = run.accelerator.is_main_process
    if main_process:
        print(f"{run.folder}: {run.plan}", flush=True)
    status = 0
    try:
        loop.train(run)
        if main_process:
            print(f"\n{report.table(run.folder)}\n\nEverything is in {run.folder}", flush=True)
    except Stopped as stopped:
        print(f"{stopped}; saved in {run.folder}", flush=True)
        status = stopped.exit_status
    finally:
        run.scorer.close()
        run.tracker.close()
    run.accelerator.end_training()
    return status
