"""Draw images with a base and what was trained on it, by the stock diffusers pipeline alone.

    python scripts/demo/generate.py --model scripts/testbed/base --size 32 --steps 10 \\
        --guidance 1 --max_sequence_length 10 --prompt "three blue squares" --out images \\
        --transformer logs/NAME/checkpoints/checkpoint-320/transformer

Any diffusers pipeline that draws from a prompt works; for one that edits give --image. Image i
starts from the noise of --seed + i, so other weights draw the same rows from the same noise.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from pathlib import Path

from flow_grpo import inputs
from flow_grpo.cli import make_writable, user_errors, user_path


def main(argv: list[str]) -> None:
    """Draw every prompt, and write single images and a sheet."""
    args = parse(argv)
    with user_errors():
        prompts = check(args)
        pipe = load(args)
        options = call_options(args, pipe)
        make_writable(args.out, "--out")
    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from flow_grpo.report.sheets import captioned_sheet

    pictures = []
    for i, prompt in enumerate(tqdm(prompts, "images", disable=None)):
        generator = torch.Generator().manual_seed(args.seed + i)
        drawn = pipe(prompt=prompt, generator=generator, return_dict=False, **options)[0][0]
        frames = drawn if isinstance(drawn, list) else [drawn]  # a video is a list
        frames[0].save(
            args.out / f"{i:04d}.png", save_all=len(frames) > 1, append_images=frames[1:]
        )
        pictures.append(np.asarray(frames[len(frames) // 2].convert("RGB")))
    sheet: Image.Image = captioned_sheet(pictures, prompts, args.columns)
    sheet.save(args.out / "sheet.png")
    rows = [{"file": f"{i:04d}.png", "prompt": prompt} for i, prompt in enumerate(prompts)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.out / "metadata.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(prompts)} images and sheet.png are in {args.out}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=os.path.expanduser, required=True, help="a pipeline's folder or hub id"
    )
    parser.add_argument(
        "--lora", type=os.path.expanduser, help="a LoRA's folder or .safetensors file"
    )
    parser.add_argument(
        "--transformer", type=os.path.expanduser, help="a full fine-tune's transformer/ folder"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=user_path, help="a text file, a prompt a line")
    parser.add_argument("--image", type=user_path, help="the reference image of an editing model")
    parser.add_argument("--out", type=user_path, required=True, help="a folder")
    parser.add_argument("--steps", type=int, help="default: the pipeline's own, as all below")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--size", help="pixels: 512, or HEIGHTxWIDTH")
    parser.add_argument("--num_frames", type=int, help="of a video")
    parser.add_argument("--max_sequence_length", type=int, help="tokens")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU")
    parser.add_argument("--columns", type=int, default=6, help="of the sheet")
    return parser.parse_args(argv[1:])


def check(args: argparse.Namespace) -> list[str]:
    """Check what needs no torch and return the prompts. Raises ValueError."""
    if args.lora and args.transformer:
        raise ValueError("--lora and --transformer: one of them, or neither for the base.")
    if args.lora and not os.path.exists(args.lora):
        raise ValueError(f"--lora={args.lora}: there is no such folder or file.")
    if args.transformer and not (Path(args.transformer) / "config.json").is_file():
        raise ValueError(
            f"--transformer={args.transformer}: a folder with a config.json is needed, such as "
            f"checkpoints/checkpoint-<step>/transformer of a run."
        )
    for option, path in (("--prompts", args.prompts), ("--image", args.image)):
        if path and not path.is_file():
            raise ValueError(f"{option}={path}: there is no such file.")
    if args.image:
        inputs.size(args.image)
    text = inputs.lines(args.prompts) if args.prompts else []
    prompts = args.prompt + [line for _, line in text]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with a line each.")
    return prompts


def load(args: argparse.Namespace):
    """Load the pipeline as diffusers does, with the trained weights in it."""
    import torch

    from flow_grpo.diffusers_patch import stock

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = names[args.dtype or ("bf16" if device == "cuda" else "fp32")]
    try:
        pipe = stock.load(args.model, dtype, args.transformer)
    except OSError as error:
        raise ValueError(f"--model={args.model}: no diffusers pipeline ({error}).") from error
    if args.lora:
        pipe.load_lora_weights(args.lora)
    return pipe.to(device)


def call_options(args: argparse.Namespace, pipe) -> dict:
    """Translate the options into the pipeline's own. Raises ValueError for one it lacks."""
    known = inspect.signature(pipe.__call__).parameters
    # Some pipelines have both: true_cfg_scale counts where it is on unless told otherwise.
    true = known.get("true_cfg_scale")
    guidance = "true_cfg_scale" if true and true.default > 1 else "guidance_scale"
    options = {
        "num_inference_steps": args.steps,
        guidance: args.guidance,
        "num_frames": args.num_frames,
        "max_sequence_length": args.max_sequence_length,
        "image": args.image,
        # Without one such a pipeline is not guided.
        "negative_prompt": " " if args.guidance and guidance == "true_cfg_scale" else None,
        "output_type": "pil",
    }
    if args.size:
        height, _, width = args.size.partition("x")
        try:
            options |= {"height": int(height), "width": int(width or height)}
        except ValueError:
            raise ValueError(f"--size={args.size}: 512 or 512x768 is needed.") from None
    if args.size and "max_area" in known:  # or Kontext draws a megapixel, whatever was asked for
        options |= {"max_area": options["height"] * options["width"], "_auto_resize": False}
    if args.image:
        from PIL import Image

        options["image"] = Image.fromarray(inputs.picture(args.image))
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in known:
            raise ValueError(
                f"{type(pipe).__name__} takes no {name}; leave that option out. It takes "
                f"{', '.join(known)}."
            )
    return options


if __name__ == "__main__":
    main(sys.argv)
