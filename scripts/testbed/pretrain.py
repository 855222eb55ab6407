"""Pretrain the testbed's base on one CPU thread: autoencoder, then transformer and text encoders.

    python scripts/testbed/pretrain.py vae  --minutes 5  --out /tmp/base
    python scripts/testbed/pretrain.py flow --minutes 40 --out /tmp/base

Both see scenes of dataset/shapes' training prompts only. The flow stage takes the autoencoder from
OUT/vae and writes a complete fp16 pipeline, with averaged (EMA) weights, to OUT/base every
--save_minutes and at its end. Minutes are of CPU time; --steps fixes the number of steps instead.
"""

import argparse
import copy
import math
import random
import runpy
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from build import T5_LENGTH, autoencoder, pipeline
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from measure import DATASET, TAGS, accuracy, read_rows, sample
from torch import Tensor, nn
from tqdm import tqdm
from world import draw_scene, render

TAG_SHARES = (0.16, 0.28, 0.28, 0.28)  # of TAGS in the pretraining scenes: "single" is learnt first
CAPTION_DROP = 0.1  # of the prompts become "", which classifier-free guidance needs
KL_WEIGHT = 5e-4
EMA_DECAY = 0.998


def draw_pictures(num: int, rng: random.Random) -> tuple[Tensor, list[str]]:
    """Draw scenes of training prompts. Returns (num, 3, 32, 32) fp32 in [-1, 1] and the prompts."""
    pools = runpy.run_path(str(DATASET / "generate.py"))["split_prompts"]()["train"]
    rows = [rng.choice(pools[tag]) for tag in rng.choices(TAGS, TAG_SHARES, k=num)]
    pictures = np.stack([render(draw_scene(row, rng)) for row in rows])  # (num, 32, 32, 3)
    prompts = [row["prompt"] for row in rows]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, prompts


def budget(steps: int | None, minutes: float) -> Iterator[float]:
    """Yield, once a step, the share of the run that is done; by CPU time if `steps` is None."""
    start, step = time.process_time(), 0
    layout = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, bar_format=layout, mininterval=10) as bar:
        while True:
            done = step / steps if steps else (time.process_time() - start) / (60 * minutes)
            if done >= 1:
                return
            bar.update(done - bar.n)
            yield done
            step += 1
            bar.set_postfix(step=step, refresh=False)


def set_learning_rate(optimizer: torch.optim.AdamW, peak: float, step: int, done: float) -> None:
    """Warm up over 100 steps and decay to 0 along half a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * done))


def train_vae(args: argparse.Namespace, rng: random.Random) -> None:
    """Train the autoencoder on L1 + MSE + a small KL, and note its latents' mean and scale."""
    pictures, _ = draw_pictures(8000, rng)
    held_out, pictures = pictures[:500], pictures[500:]
    vae = autoencoder().to(memory_format=torch.channels_last)  # 1.5 x faster here
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step, done in enumerate(budget(args.steps, args.minutes)):
        set_learning_rate(optimizer, 2e-3, step, done)
        x = pictures[torch.randint(len(pictures), (32,))]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            decoded = vae.decode(latents).sample.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = (decoded - x).abs().mean() + (decoded - x).pow(2).mean() + KL_WEIGHT * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mean
        error = (vae.decode(latents).sample.clamp(-1, 1) - held_out).pow(2).mean() / 4
    scale, shift = 1 / latents.std().item(), latents.mean().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.save_pretrained(args.out / "vae")
    print(f"{step + 1} steps, PSNR {-10 * error.log10().item():.1f} dB on 500 new scenes")


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the latents that the transformer sees: (B, 16, 8, 8) of mean 0 and variance 1."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(250)])
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


def flow_loss(base: StableDiffusion3Pipeline, clean: Tensor, prompts: list[str]) -> Tensor:
    """Return the rectified-flow loss at logit-normal sigmas (SD3, arXiv:2403.03206)."""
    embeds, _, pooled, _ = base.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    sigma, noise = torch.randn(len(clean)).sigmoid(), torch.randn_like(clean)
    latents = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
    velocity = base.transformer(latents, embeds, pooled, sigma * 1000, return_dict=False)[0]
    return (velocity - (noise - clean)).pow(2).mean()


def save(base: StableDiffusion3Pipeline, averaged: nn.ModuleList, folder: Path) -> None:
    """Write the pipeline in fp16 with the averaged weights, and print its dev accuracy in fp32."""
    parts = {
        name: copy.deepcopy(part) if isinstance(part, nn.Module) else part
        for name, part in base.components.items()
    }
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    for name, part in zip(names, averaged, strict=True):
        parts[name].load_state_dict(part.state_dict())
    StableDiffusion3Pipeline(**parts).to(torch.float16).save_pretrained(folder)
    saved = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    rows = read_rows("dev")
    result = accuracy(sample(saved, [row["prompt"] for row in rows]), rows)
    tqdm.write("dev " + " ".join(f"{name} {value:.3f}" for name, value in result.items()))


def train_flow(args: argparse.Namespace, rng: random.Random) -> None:
    """Train the transformer and the three text encoders together by flow matching."""
    if args.init:
        base = StableDiffusion3Pipeline.from_pretrained(args.init, torch_dtype=torch.float32)
    else:
        base = pipeline(AutoencoderKL.from_pretrained(args.out / "vae"))
    pictures, prompts = draw_pictures(args.num_scenes, rng)
    latents = encode_pictures(base.vae, pictures)
    trained = nn.ModuleList(
        [base.transformer, base.text_encoder, base.text_encoder_2, base.text_encoder_3]
    )
    averaged = copy.deepcopy(trained).requires_grad_(False)
    weights = list(trained.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    smooth, num_saved, start = 1.0, 0, time.process_time()
    for step, done in enumerate(budget(args.steps, args.minutes)):
        set_learning_rate(optimizer, args.learning_rate, step, done)
        rows = torch.randint(len(latents), (args.batch_size,))
        texts = ["" if rng.random() < CAPTION_DROP else prompts[row] for row in rows.tolist()]
        loss = flow_loss(base, latents[rows], texts)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), weights, 1 - decay)
        smooth = 0.99 * smooth + 0.01 * loss.item()
        minutes = (time.process_time() - start) / 60
        if (step + 1) % 500 == 0:
            tqdm.write(f"step {step + 1} {minutes:.1f} min loss {smooth:.4f}")
        if minutes > args.save_minutes * (num_saved + 1):
            num_saved += 1
            save(base, averaged, args.out / "base")
    save(base, averaged, args.out / "base")
    print(f"{step + 1} steps of {args.batch_size}, {minutes:.1f} min, loss {smooth:.4f}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("stage", choices=("vae", "flow"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="flow: go on from this saved pipeline")
    parser.add_argument("--steps", type=int, help="stop after so many steps, not by the clock")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--save_minutes", type=float, default=8.0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_scenes", type=int, default=40_000)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    stages = {"vae": train_vae, "flow": train_flow}
    stages[arguments.stage](arguments, random.Random(arguments.seed))
