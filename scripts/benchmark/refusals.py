"""How long a user waits to be told of a mistake: train_sd3.py with a wrong key, file or size.

    python scripts/benchmark/refusals.py [--times 5]

Prints a Markdown table with the least of all runs' wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
MISTAKES = {
    "a key that does not exist": "sample.num_stps=3",
    "a value of the wrong type": "seed=x",
    "a data set that is not there": "dataset=/nowhere",
    "a reward that does not exist": "reward_fn={'ocrr': 1.0}",
    "groups that do not fill the batches": "sample.num_image_per_prompt=7",
    "fp16 without a GPU": "mixed_precision=fp16",
    "a size that the model can't draw": "resolution=33",
}


def refused(override: str) -> tuple[float, float]:
    """Return the wall and CPU seconds until a run refuses this. Raises if it does not."""
    command = [sys.executable, "scripts/train_sd3.py", f"--config.{override}"]
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if not status or "ValueError: " not in said:
        raise RuntimeError(f"{override} was not refused:\n{said}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    print("| mistake | wall s | CPU s |\n|---|---|---|")
    for mistake, override in tqdm(MISTAKES.items(), desc="mistakes", disable=None):
        seconds = [refused(override) for _ in range(times)]
        wall, cpu = (min(each) for each in zip(*seconds, strict=True))
        tqdm.write(f"| {mistake} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
