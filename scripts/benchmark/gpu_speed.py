"""The GPU kit's parts that concern speed: attention's gradients, and epochs at true size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

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


LEVERS: dict[str, tuple[str, ...]] = {  # of epoch.py's rows; the first counts the FLOPs
    "as it comes": (),
    "compile": ("--config.compile=True",),
    "little memory": ("--config.activation_checkpointing=True", "--config.vae_slicing=True"),
}


def epoch(model: str, protocol: str) -> Callable[[Setting, set[str]], Iterator[Row]]:
    """Time a model's epochs by epoch.py; on a CPU a tiny one's."""

    def rows(setting: Setting, known: set[str]) -> Iterator[Row]:
        chosen = (model, protocol)
        if setting.device == "cpu":
            import tiny

            chosen = (str(tiny.save("sd3", setting.scratch / "tiny" / "sd3")), "tiny")
        for lever, options in LEVERS.items():
            label = f"{model} {protocol}, {lever}"
            if label not in known:
                yield timed(setting, label, *chosen, options)

    return rows


def timed(setting: Setting, label: str, model: str, protocol: str, options: tuple[str, ...]) -> Row:
    out = setting.scratch / "epochs" / f"{label}.json"
    counted = out.with_name(f"{label.partition(',')[0]}, {next(iter(LEVERS))}.json")
    command = [sys.executable, "scripts/benchmark/epoch.py", "--model", model, "--label", label]
    command += ["--protocol", protocol, "--scratch", str(setting.scratch), "--out", str(out)]
    command += ["--flops", str(counted)] if options else []
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        log = f"{done.stdout}\n{done.stderr}"[-LOG_CHARACTERS:]
        return Row(label, False, f"ended with status {done.returncode}", log=log)
    cells = done.stdout.splitlines()[-1].strip("| ").split(" | ")[1:]
    return Row(label, True, "; ".join(cells))
