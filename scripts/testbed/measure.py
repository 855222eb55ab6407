"""Measure a pipeline's accuracy per task, with the stock pipeline call.

python scripts/testbed/measure.py scripts/testbed/base --split test
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build import T5_LENGTH
from diffusers import StableDiffusion3Pipeline

from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.rules.shapes import shapes

DATASET = Path(__file__).parents[2] / "dataset" / "shapes"
TAGS = ("single", "count", "two", "position")


def read_rows(split: str) -> list[dict[str, Any]]:
    """Read a split of dataset/shapes."""
    return [
        json.loads(line) for line in (DATASET / f"{split}_metadata.jsonl").read_text().splitlines()
    ]


def sample(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    num_steps: int = 10,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
) -> np.ndarray:
    """Sample with the stock deterministic sampler. Returns (B, 32, 32, 3) uint8."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(
            prompts[start : start + batch_size],
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=T5_LENGTH,
            generator=generator,
            output_type="np",
        ).images
        for start in range(0, len(prompts), batch_size)
    ]
    return (np.concatenate(batches) * 255).round().astype(np.uint8)


def accuracy(images: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the strict accuracy per tag, its mean over the tags, and the mean dense credit."""
    scores = shapes(Batch(list(images), [row["prompt"] for row in rows], rows))
    tags = np.array([row["tag"] for row in rows])
    result = {tag: float(scores["shapes_strict"][tags == tag].mean()) for tag in TAGS}
    return result | {
        "mean": float(np.mean(list(result.values()))),
        "dense": float(scores["shapes_dense"].mean()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a saved pipeline")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = read_rows(args.split)
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    images = sample(
        pipeline, [row["prompt"] for row in rows], args.num_steps, args.guidance_scale, args.seed
    )
    print(json.dumps({name: round(value, 3) for name, value in accuracy(images, rows).items()}))
