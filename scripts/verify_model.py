"""Check a checkpoint before training it: PASS or FAIL with figures; exit status 1 if any fails.

    python scripts/verify_model.py --model scripts/testbed/base --size 32 --max_sequence_length 10

Any local folder or hub id of a model that flow_grpo/diffusers_patch/registry.py lists. In fp32 our
images must equal the stock pipeline's bit for bit; in 16 bits the latents may differ by the bound
that is printed, because the stock pipeline rounds them between steps. docs/add_a_model.md says what
each line is for.
"""

from __future__ import annotations

import argparse
import sys

from config.base import base
from flow_grpo.cli import user_errors
from flow_grpo.launch import tools, verify

PROMPTS = ("a photo of a red apple", 'two green cubes and a sign that says "Grüße 42"')


def main(argv: list[str]) -> int:
    """Check one checkpoint, print a line for each check, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools.add_options(parser)
    parser.add_argument(
        "--prompt", action="append", help="give two or more, of unequal length; default: ours"
    )
    args, config = parser.parse_args(argv[1:]), base(None)
    with user_errors():
        if args.prompt and len(args.prompt) < 2:
            raise ValueError(f"--prompt={args.prompt[0]!r}: two prompts are needed, or none.")
        loaded = tools.load(args, tuple(args.prompt or PROMPTS), config)
    pipeline = loaded.pipeline
    where = f"{pipeline.input_dtype} on {pipeline.device}, {loaded.task.size}"
    print(f"{args.model}: {loaded.family.__name__}, {where}", flush=True)
    failed = 0
    for check in verify.verify(pipeline, loaded.task, config):
        print(check, flush=True)
        failed += not check.passed
    print(f"{failed} failed" if failed else "all passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
