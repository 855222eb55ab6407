"""Draw a run's report.html by hand.

python -m flow_grpo.report logs/RUN [--compare logs/OTHER ...]
"""

from __future__ import annotations

import argparse
import sys

from flow_grpo.cli import user_errors, user_path
from flow_grpo.report.output import write


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Draw a run's report.html.")
    parser.add_argument("run", type=user_path, help="a run's folder")
    parser.add_argument(
        "--compare", type=user_path, nargs="+", default=[], help="runs to draw over its evaluations"
    )
    given = parser.parse_args(argv)
    with user_errors():
        print(write(given.run, given.compare))


if __name__ == "__main__":
    main(sys.argv[1:])
