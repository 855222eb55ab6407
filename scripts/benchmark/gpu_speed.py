"""The GPU kit's parts that concern speed: attention's gradients, and epochs at true size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from scripts.benchmark.gpu_rows import LOG_CHARACTERS, ROOT, Row, Setting


def attention(setting: Setting, known: set[str]) -> Iterator[Row]:
    """Compare the gradients of torch's attention, as a run uses it, with the formula's in fp32.

    In FLUX one shape gets output gradients of two strides: whole, and a part of a wider tensor.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.backends.cuda.enable_cudnn_sdp(False)  # as Weights.from_pretrained does
    torch.manual_seed(0)
    kind = {"device": setting.device, "dtype": torch.bfloat16}
    heads = (4, 64)
    inputs = [torch.randn(2, 200, *heads, **kind).transpose(1, 2) for _ in range(3)]
    wide = torch.randn(2, 200, 5 * 256, **kind)
    strides = {
        "whole": torch.randn(2, 200, *heads, **kind).transpose(1, 2),
        "a part of a wider tensor": wide[..., :256].unflatten(2, heads).transpose(1, 2),
    }

    def gradients(above: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
        torch.nn.functional.scaled_dot_product_attention(*leaves).backward(above.to(dtype))
        return torch.cat([leaf.grad.flatten().double() for leaf in leaves])

    for name, above in strides.items():
        ours = gradients(above, torch.bfloat16)
        with sdpa_kernel(SDPBackend.MATH):
            wanted = gradients(above, torch.float32)
        apart = ((ours - wanted).norm() / wanted.norm()).item()
        yield Row(f"output gradient {name}", apart < 0.01, f"differs by {apart:.2g} (at most 0.01)")


SMALL_CALLS = (  # three of which, stacked, fit where calls of 16 do
    "--config.sample.train_batch_size=4",
    "--config.sample.num_batches_per_epoch=16",
    "--config.train.gradient_accumulation_steps=8",
    "--config.train.old_log_prob=replay",
)
LEVERS: dict[str, tuple[str, ...]] = {  # of epoch.py's rows
    "as it comes": (),
    "compile": ("--config.compile=True",),
    "little memory": ("--config.activation_checkpointing=True", "--config.vae_slicing=True"),
    "small calls, replayed": SMALL_CALLS,
    "the same, stacked points": (*SMALL_CALLS, "--config.train.stacked_points=3"),
}
FLOPS_OF = {  # counted by another lever's run
    "compile": "as it comes",
    "little memory": "as it comes",
    "the same, stacked points": "small calls, replayed",
    "NFT, merged LoRA": "NFT",
}
NFT = ("--config.objective=nft", "--config.sample.noise_level=0.0")
LEVERS_OF_NFT = {"NFT": NFT, "NFT, merged LoRA": (*NFT, "--config.sample.merged_lora=True")}
ENGINES = ("multi_gpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
ONE_CALL = (
    "--config.sample.num_batches_per_epoch=1",
    "--config.train.gradient_accumulation_steps=1",
)
TRAINED = {
    "LoRA": (),
    "full": ("--config.use_lora=False", "--config.activation_checkpointing=True"),
}
Rows = Callable[[Setting, set[str]], Iterator[Row]]


def epoch(model: str, protocol: str, levers: dict[str, tuple[str, ...]] = LEVERS) -> Rows:
    """Time a model's epochs by epoch.py; on a CPU a tiny one's."""

    def rows(setting: Setting, known: set[str]) -> Iterator[Row]:
        labels = {lever: f"{model} {protocol}, {lever}" for lever in levers}
        for lever, options in levers.items():
            counted = labels.get(FLOPS_OF.get(lever))
            if labels[lever] not in known:
                yield timed(setting, labels[lever], model, protocol, options, flops_of=counted)

    return rows


def engines(setting: Setting, known: set[str]) -> Iterator[Row]:
    """Time them with one rank; on a CPU those alone that are torch's own."""
    for engine in ENGINES[:2] if setting.device == "cpu" else ENGINES:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        launch += ["--config_file", f"scripts/accelerate_configs/{engine}.yaml"]
        for kind, options in TRAINED.items():
            options = (*options, *ONE_CALL) if setting.device == "cuda" else options
            label = f"{engine}, {kind}"
            if label not in known:
                yield timed(setting, label, "sd3_5_medium", "fast64", options, launch)


def timed(
    setting: Setting,
    label: str,
    model: str,
    protocol: str,
    options: tuple[str, ...],
    launch: Sequence[str] = (sys.executable,),
    flops_of: str | None = None,
) -> Row:
    """Run epoch.py; flops_of: the label of the run that counted its FLOPs."""
    env = dict(os.environ)
    if setting.device == "cpu":
        import tiny

        model, protocol = str(tiny.save("sd3", setting.scratch / "tiny" / "sd3")), "tiny"
        env["ACCELERATE_USE_CPU"] = "true"
    out = setting.scratch / "epochs"
    command = [*launch, "scripts/benchmark/epoch.py", "--model", model, "--label", label]
    command += ["--protocol", protocol, "--scratch", str(setting.scratch)]
    command += ["--out", str(out / f"{label}.json")]
    command += ["--flops", str(out / f"{flops_of}.json")] if flops_of else []
    done = subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        log = f"{done.stdout}\n{done.stderr}"[-LOG_CHARACTERS:]
        return Row(label, False, f"ended with status {done.returncode}", log=log)
    cells = done.stdout.splitlines()[-1].strip("| ").split(" | ")[1:]
    return Row(label, True, "; ".join(cells))
