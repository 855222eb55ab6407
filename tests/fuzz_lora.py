"""Damaged LoRAs: in place as an independent reading of their file has them, or refused by name.

    python tests/fuzz_lora.py --count 1000 --seed 0

Prints what came of them; exit status 1 if anything else did.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import struct
import sys
import warnings
from pathlib import Path

import fuzzing
import tiny
import torch
from damaged_lora import ALPHA, BESIDE, DAMAGES, LAYOUTS, MUST, RANK, Case
from fuzzing import EQUAL, REFUSED
from safetensors.torch import load

MODELS = ("sd3", "flux", "zimage", "wan", "qwenimage")


def independent(case: Case) -> dict[str, torch.Tensor]:
    """Return alpha / rank x B A of each layer, float64, from the file's own bytes."""
    held = load(case.path.read_bytes())
    settings = None
    if case.layout.settings == "beside":
        settings = json.loads((case.folder / BESIDE).read_text())
    elif case.layout.settings == "metadata":
        data = case.path.read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        said = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
        settings = {key.removeprefix("transformer."): value for key, value in said.items()} or None
    found = {}
    for layer in case.all_layers:
        stems = {case.layout.form(layer), layer, f"model.{layer}"}
        stems |= {f"{'transformer.' * times}{stem}" for stem in stems for times in (1, 2)}
        for stem in sorted(stems):
            a, b = (
                next((held[f"{stem}.{k}.weight"] for k in ks if f"{stem}.{k}.weight" in held), None)
                for ks in (("lora_A", "lora_down"), ("lora_B", "lora_up"))
            )
            if a is None or b is None:
                continue
            alpha = held.get(f"{stem}.alpha")
            if alpha is None and settings is not None:
                alpha = settings.get("lora_alpha", 8)  # PEFT's default
                for pattern, value in reversed((settings.get("alpha_pattern") or {}).items()):
                    if re.match(rf"(.*\.)?({pattern})$", layer):
                        alpha = value  # the first one's
                if settings.get("use_rslora"):
                    alpha *= math.sqrt(len(a))
            scale = len(a) if alpha is None else float(alpha)
            found[layer] = scale / len(a) * (b.double().flatten(1) @ a.double().flatten(1))
    return found


class Loras:
    """A fuzzer."""

    def __init__(self, folder: Path, models: tuple[str, ...] = MODELS):
        self.models = {name: tiny.patched(name) for name in models}
        self.folder = folder

    def __call__(self, draw: random.Random) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "lora").mkdir(parents=True)
        torch.manual_seed(draw.randrange(2**31))
        model = copy.copy(self.models[draw.choice(list(self.models))])
        model.transformer = copy.deepcopy(model.transformer)
        ends = tuple(f".{target}" for target in model.lora_target_modules)
        known = {
            name: (each.out_features, each.in_features)
            for name, each in model.transformer.named_modules()
            if isinstance(each, torch.nn.Linear)
        }
        targets = [name for name in sorted(known) if name.endswith(ends)]
        layout = draw.choice(LAYOUTS)
        layers = {name: known[name] for name in draw.sample(targets, draw.choice((1, 2, 3)))}
        mark = self.folder / "executed"
        case = Case(draw, self.folder / "lora", layout, layers, known, mark=mark)
        for layer in layers:
            case.add(layer, RANK)
        if layout.settings:
            case.settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
            case.settings["target_modules"] = sorted(layers)
        damage = DAMAGES[draw.number % len(DAMAGES)]
        expected = damage(case)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.judge(case, model, expected)
        except BaseException as error:
            error.add_note(f"{layout.name}, {damage.__name__}, {sorted(case.folder.iterdir())}")
            raise

    def judge(self, case: Case, model, expected: str) -> str:
        transformer = model.transformer
        trained = {"rank": RANK, "alpha": 2 * RANK} if case.draw.random() < 0.3 else {}
        before = {name: value.clone() for name, value in transformer.state_dict().items()}
        try:
            model.load_lora(str(case.folder), **trained)
        except ValueError as error:
            said = str(error)
            assert str(case.folder) in said, f"names no file: {said}"
            assert len(said) < 3000, "the message is too long"
            assert expected != "must be read" or trained, f"refused, though it is whole: {said}"
            after = transformer.state_dict()
            assert after.keys() == before.keys(), f"refused ({said}), and an adapter is there"
            assert all(torch.equal(after[n], v) for n, v in before.items()), "weights changed"
            return REFUSED
        finally:
            assert not case.mark.exists(), "a payload was executed"
        assert expected != MUST, "read, though it must be refused"
        truth = independent(case)
        found = {n: m for n, m in transformer.named_modules() if hasattr(m, "lora_A")}
        assert found.keys() == truth.keys(), f"in {sorted(found)}, not in {sorted(truth)}"
        for layer, module in found.items():
            a, b = (each["default"].weight.double() for each in (module.lora_A, module.lora_B))
            ours = module.scaling["default"] * (b.flatten(1) @ a.flatten(1)).detach()
            error = (ours - truth[layer]).abs().max()
            assert error <= 1e-5 * truth[layer].abs().max(), f"{layer} adds other weights"
            assert ours.isfinite().all() and a.isfinite().all() and b.isfinite().all(), layer
        return EQUAL


if __name__ == "__main__":
    sys.exit(fuzzing.main("LoRAs", Loras, sys.argv))
