"""Draw one step by BAGEL's true width from random bf16 weights, and say what it took.

    PYTHONPATH=.:tests python scripts/benchmark/bagel_forward.py --layers 14

Half the depth, 14 of 28 layers, takes 13 GiB of a CPU's memory. Prompts are read, then a guided
velocity predicted and checked: finite, another one for another prompt, equal when asked again. The
vocabulary is that of the tests' tokenizer, as no other words are read.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from flow_grpo.conditioning import Conditioner, Item
from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.records import Conditioning, Guidance, Size
from scripts.benchmark import true_size

PROMPTS = ("a photo of a red apple", 'two green cubes and a sign that says "42"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = timed("built", lambda: Bagel(true_size.bagel(args.layers, vocab_size=1000)))
    torch.set_default_dtype(torch.float32)
    count = sum(param.numel() for param in model.transformer.parameters())
    print(f"{args.layers} layers, {count:,} parameters, {model.transformer.dtype}")
    encoder, size = Conditioner(model, 256), Size(args.size, args.size)
    conds = timed("two prompts read", lambda: [encoder.cond(Item(p), ()) for p in PROMPTS])
    negative, noise = encoder.cond(Item(None), ()), torch.randn(1, *model.noise_shape(size))

    def velocity(number: int) -> torch.Tensor:
        branches = {"positive": conds[number], "negative": negative}
        rows = {name: model.collate([cond], 0) for name, cond in branches.items()}
        given = Conditioning(rows, Guidance(4.0), size)
        with torch.no_grad():
            return model.velocity(model.transformer, noise, torch.tensor([0.9]), given)

    first, again, other = (timed("guided velocity", lambda i=i: velocity(i)) for i in (0, 0, 1))
    assert first.isfinite().all() and torch.equal(first, again)
    print(
        f"rms {first.square().mean().sqrt():.3g}; another prompt moves it by "
        f"{(other - first).norm() / first.norm():.2%}"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"at most {peak:.1f} GiB of memory")


def timed(what: str, act: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = act()
    print(f"{what} in {time.perf_counter() - start:.1f} s", flush=True)
    return result


if __name__ == "__main__":
    main()
