"""Score images that are there already, whoever made them.

python -m flow_grpo.rewards --reward shapes [--reward jpeg_compressibility] FOLDER

FOLDER has images and, for rewards that need them, prompts: a metadata.jsonl with an object a
line, {"file": "a.png", "prompt": "...", "tag": "..."}, as scripts/evaluate.py --write-images
writes it, or a prompts.txt with a line an image in the order of their names (2.png, 10.png).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flow_grpo import inputs
from flow_grpo.cli import make_writable, user_errors, user_path
from flow_grpo.evaluation import tables
from flow_grpo.rewards import loading, options, pictures
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.combine import Scorer
from flow_grpo.rewards.pictures import Missing, Picture
from flow_grpo.rewards.registry import REWARDS


def main(argv: list[str]) -> None:
    """Print means with 95 % intervals and write a csv; leave with 1 and a message at a mistake."""
    args = _parse(argv)
    if args.list:
        for name, reward in REWARDS.items():
            print(f"{name:24} {reward.__doc__.splitlines()[0]}")
        return
    with user_errors():
        if args.folder is None or not args.reward:
            raise ValueError("a FOLDER and at least one --reward NAME are needed; see --list.")
        if args.batch_size < 1:
            raise ValueError(f"--batch-size={args.batch_size}: at least 1 is needed.")
        for name in args.reward:
            if loading.find(name).needs_groups:
                raise ValueError(f"--reward={name} compares the images of a rollout's group.")
        settings = options.settings(args.set, args.reward)
        found = pictures.read(args.folder)
        columns = [each.prompt for each in found], [each.metadata for each in found]
        if None in columns[0]:
            columns = Missing(args.folder), Missing(args.folder)
        for name in args.reward:
            loading.check(name, settings, *columns)
        out = args.out or args.folder / "scores.csv"
        make_writable(out.parent, "--out")
        device = args.device or options.device(args.reward)
        scorer = Scorer(dict.fromkeys(args.reward, 1.0), settings, device)
        report(found, score(found, scorer, columns, args.batch_size), out)


def score(
    found: list[Picture], scorer: Scorer, columns: tuple, batch_size: int
) -> dict[str, np.ndarray]:
    """Return {name: (N,)}. columns: prompts and metadata. Raises ValueError if a reward fails."""
    parts = []
    for start in tqdm(range(0, len(found), batch_size), "score", leave=False, disable=None):
        rows = slice(start, start + batch_size)
        images = [pictures.load(picture.file) for picture in found[rows]]
        references = [tuple(map(inputs.picture, each.references)) for each in found[rows]]
        known = (column[rows] for column in columns)
        try:
            parts.append(
                scorer.score(Batch(images, *known, references if any(references) else None))
            )
        except RuntimeError as error:  # names the reward
            raise ValueError(str(error)) from error
    scorer.close()
    names = [name for name in parts[0] if name != "avg"]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def report(found: list[Picture], scores: dict[str, np.ndarray], out: Path) -> None:
    """Print a table and write the rows. Images without a prompt count as one each."""
    tags = [inputs.tag_of(picture.metadata or {}) for picture in found]
    prompts = [str(picture.file) if picture.prompt is None else picture.prompt for picture in found]
    print(tables.table(tables.summarise(scores, tags, prompts)))
    rows = [
        {"file": picture.file.name, "prompt": picture.prompt or "", "tag": tag}
        | {name: values[n].item() for name, values in scores.items()}
        for n, (picture, tag) in enumerate(zip(found, tags, strict=True))
    ]
    tables.write_rows(out, rows)
    print(f"{len(found)} images, {len(set(prompts))} prompts; each one's scores: {out}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flow_grpo.rewards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=user_path, nargs="?")
    parser.add_argument("--reward", action="append", default=[], help="may be given several times")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of config.rewards"
    )
    parser.add_argument(
        "--out", type=user_path, help="of a line an image; default: FOLDER/scores.csv"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", help="of rewards that are models; default: cuda, or cpu")
    parser.add_argument("--list", action="store_true", help="list the rewards and end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
