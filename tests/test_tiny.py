"""The tiny pipelines fit their purpose: alike in every process, sensitive to all their inputs."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import LENGTH
from waiting import HANG_S

from flow_grpo.conditioning import collate
from flow_grpo.randomness import Randomness
from flow_grpo.records import Guidance, Size

APPLE, SIGN = "a photo of a red apple", 'a sign that says "Grüße 42"'
SIZE = Size(64, 64)


@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_the_velocity_responds_to_each_input(name):
    model = tiny.patched(name)
    randomness, images, others = (
        Randomness(seed=7, coordinates=()),
        tiny.pictures(name),
        tiny.pictures(name, 2),
    )

    def conditioning(text=APPLE, references=images, guidance=model.unguided):
        batch = tiny.prompt_batch(model, SIZE, [text], [references], guidance)
        return collate(model, batch, LENGTH)

    alone = conditioning()
    first, second = (
        model.initial_latents(SIZE, randomness.normal("init", [row], model.noise_shape(SIZE)))
        for row in ((0, 0), (1, 0))
    )

    @torch.no_grad()
    def velocity(latents=first, sigma=0.7, given=alone):
        return model.velocity(model.transformer, latents, torch.tensor([sigma]), given)

    changed = {
        "prompt": velocity(given=conditioning(SIGN)),
        "sigma": velocity(sigma=0.5),
        "latents": velocity(latents=second),
        "guidance": velocity(given=conditioning(guidance=Guidance(4.5))),
    }
    for n in range(len(images)):
        mixed = (*images[:n], others[n], *images[n + 1 :])
        changed[f"reference {n}"] = velocity(given=conditioning(references=mixed))
    base = velocity()
    change = {key: ((v - base).norm() / base.norm()).item() for key, v in changed.items()}
    deaf = {"guidance"} if name in ("flux_schnell", "flux2_klein_distilled") else set()
    assert {key for key, value in change.items() if value == 0} == deaf
    assert min(value for key, value in change.items() if key not in deaf) > 0.01, change


@pytest.mark.slow
def test_two_processes_build_the_same_pipeline():
    code = "import test_tiny, tiny; print(test_tiny.fingerprint(tiny.sd3.sd3()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "11"},
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )
    assert done.stdout.strip() == fingerprint(tiny.sd3.sd3())


def fingerprint(pipe) -> str:
    """Hash what a prompt becomes and the weights that read it."""
    ids = [pipe.tokenizer(SIGN).input_ids, pipe.tokenizer_3(SIGN).input_ids]
    digest = hashlib.sha256(repr(ids).encode())
    for module in (pipe.text_encoder, pipe.text_encoder_3, pipe.transformer, pipe.vae):
        for value in module.state_dict().values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()
