"""What can happen to a LoRA's file and to what is said beside it, in every layout.

Each function does it to a Case, and says whether what is left must be refused.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fuzzing import Payload, flipped, other_than_a_file
from safetensors.torch import save

RANK, ALPHA = 4, 2.0
FILE, PEFT, BESIDE = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
DEEP = '{"a":' * 5000 + "1" + "}" * 5000
MUST, MAY = "must be refused", "may be read as it stands"
ODD = (None, True, -1, 0, 10**30, 1e308, math.nan, math.inf, "3", "", [], {}, [None], {"a": 1})
REGEX = ("(a+)+$", "((((((((((a*)*)*)*)*)*)*)*)*)*)*b", "(", "*", "[", "all-linear", ".*", "", "\0")


@dataclass
class Layout:
    """How a trainer writes a LoRA."""

    name: str
    form: Callable[[str], str]  # a layer's name in the file
    kinds: tuple[str, str] = ("lora_A", "lora_B")
    alpha: bool = False  # a tensor says it
    file: str = FILE
    settings: str = ""  # "metadata", "beside"


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


DOWN_UP = ("lora_down", "lora_up")
LAYOUTS = [
    Layout("peft", lambda n: f"base_model.model.{n}", file=PEFT, settings="beside"),
    Layout("diffusers with metadata", lambda n: f"transformer.{n}", settings="metadata"),
    Layout("diffusers", lambda n: f"transformer.{n}"),
    Layout("diffusers with alphas", lambda n: f"transformer.{n}", alpha=True),
    Layout("ai-toolkit", lambda n: f"diffusion_model.{n}", file="my.safetensors"),
    Layout("ComfyUI", lambda n: f"diffusion_model.{n}", DOWN_UP, alpha=True),
    Layout("bare", lambda n: n, alpha=True),
    Layout("kohya", kohya, DOWN_UP, alpha=True, file="my.safetensors"),
]


@dataclass
class Case:
    """A LoRA's folder, before it is written."""

    draw: random.Random
    folder: Path
    layout: Layout
    layers: dict[str, tuple[int, int]]  # what is adapted: (out, in)
    all_layers: dict[str, tuple[int, int]]  # of the transformer
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    mark: Path = Path()

    @property
    def path(self) -> Path:
        return self.folder / self.layout.file

    def key(self, layer: str, kind: int | None) -> str:
        """Name a tensor of the file: A (0), B (1) or alpha (None)."""
        stem = self.layout.form(layer)
        return f"{stem}.alpha" if kind is None else f"{stem}.{self.layout.kinds[kind]}.weight"

    def add(self, layer: str, rank: int, alpha: float | None = None) -> None:
        out, inside = self.all_layers[layer]
        self.tensors[self.key(layer, 0)] = torch.randn(rank, inside)
        self.tensors[self.key(layer, 1)] = torch.randn(out, rank)
        if self.layout.alpha:
            self.tensors[self.key(layer, None)] = torch.tensor(ALPHA if alpha is None else alpha)

    def write(self, data: bytes | None = None, text: str | None = None) -> None:
        """Write the files. data: the weights' whole file. text: of the settings."""
        self.folder.mkdir(exist_ok=True)
        said, metadata = json.dumps(self.settings) if text is None else text, {"format": "pt"}
        if self.layout.settings == "beside":
            (self.folder / BESIDE).write_text(said, encoding="utf-8", errors="surrogatepass")
        if self.layout.settings == "metadata":
            prefixed = {f"transformer.{key}": value for key, value in self.settings.items()}
            metadata["lora_adapter_metadata"] = json.dumps(prefixed) if text is None else text
        if data is None:
            data = save({k: v.contiguous().clone() for k, v in self.tensors.items()}, metadata)
        self.path.write_bytes(data)

    def layer(self) -> str:
        return self.draw.choice(sorted(self.layers))


def whole(case: Case) -> str:
    case.write()
    return "must be read"


def cut(case: Case) -> str:
    case.write()
    os.truncate(case.path, case.draw.randrange(case.path.stat().st_size))
    return MUST


def lengthen(case: Case) -> str:
    case.write()
    case.path.write_bytes(case.path.read_bytes() + b"\0" * case.draw.randint(1, 99))
    return MUST


def flip(case: Case) -> str:
    case.write()
    data = case.path.read_bytes()
    if case.draw.random() < 0.5:  # of the header
        size = 8 + struct.unpack("<Q", data[:8])[0]
        case.path.write_bytes(flipped(data[:size], case.draw) + data[size:])
    else:
        case.path.write_bytes(flipped(data, case.draw, 40))
    return MAY


def lie(case: Case) -> str:
    """Write a header that says something else."""
    case.write()
    data = case.path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = data[8 : 8 + length].decode()
    made = (
        *("", "{}", "[]", "null", "{", head[:-9], "[" * 100_000, '{"a":' * 5000, "\ufeff" + head),
        *(head.replace("F32", other, 1) for other in ("F64", "I32", "U8", "XX", "BF16", "F8_E5M2")),
        head.replace("data_offsets", "offsets", 1),
        head.replace('"data_offsets":[', '"data_offsets":[4', 1),
        head.replace('"data_offsets":[0', '"data_offsets":[-8', 1),
        head.replace('"shape":[', '"shape":[18446744073709551615,', 1),
        head.replace('"shape":[4,', '"shape":[2,', 1),
        head.replace("{", '{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', 1),
        head.replace("{", '{"__metadata__":{"a":3},', 1),
        head.replace("{", '{"__metadata__":[],', 1),
        head.replace("}", ',"more":1}', 1),
    )
    chosen = case.draw.choice(made).encode()
    size = case.draw.choice((len(chosen),) * 5 + (0, 2**64 - 1, 2**40, len(chosen) + 8))
    case.path.write_bytes(struct.pack("<Q", size) + chosen + data[8 + length :])
    return MAY


def half(case: Case) -> str:
    del case.tensors[case.key(case.layer(), case.draw.choice((0, 1)))]
    case.write()
    return MUST


def reshape(case: Case) -> str:
    key = case.key(case.layer(), case.draw.choice((0, 1)))
    old = case.tensors[key]
    shapes = ([0], [], [1], [len(old)], [*old.shape, 1, 1], [len(old) + 1, old.shape[1]])
    shapes += ([len(old), old.shape[1] + 1], [0, old.shape[1]], [len(old), 0], [1, *old.shape])
    case.tensors[key] = torch.randn(case.draw.choice(shapes))
    case.write()
    return MAY


def ranks(case: Case) -> str:
    """Give each layer a rank of its own, in place of the settings' one."""
    for layer in case.layers:
        rank = case.draw.choice((1, 2, 3, 8))
        case.add(layer, rank, case.draw.choice((None, rank, 0.5)))
        if case.settings and case.draw.random() < 0.8:
            case.settings["rank_pattern"] = case.settings.get("rank_pattern", {}) | {layer: rank}
            if case.draw.random() < 0.4:
                case.settings["alpha_pattern"] = {layer: case.draw.choice((1.0, 8, 0.25))}
    case.write()
    return MAY


def alphas(case: Case) -> str:
    values = (0.0, -1.0, math.nan, math.inf, 1e30, 1e-30, 16, 0.5)
    for layer in case.layers:
        value = torch.tensor(case.draw.choice(values))
        if case.draw.random() < 0.2:
            odd = (value.half(), torch.tensor([2.0]), torch.ones(2), value[None])
            value = case.draw.choice(odd)
        case.tensors[case.key(layer, None)] = value
    if case.settings:
        case.settings["lora_alpha"] = case.draw.choice(values)
    case.write()
    return MAY


def more(case: Case) -> str:
    """Add a layer of the transformer, of none, a text encoder's, or what no LoRA has."""
    other = case.draw.choice(sorted(set(case.all_layers) - set(case.layers)))
    kind = case.draw.choice(("layer", "unknown", "text", "odd", "twice"))
    if kind == "layer":
        case.add(other, RANK)
    elif kind == "unknown":
        case.tensors[f"transformer.blocks.99.{other}.lora_A.weight"] = torch.ones(4, 4)
        case.tensors[f"transformer.blocks.99.{other}.lora_B.weight"] = torch.ones(4, 4)
    elif kind == "text":
        stem = case.draw.choice(("text_encoder.a", "text_encoder_2.b", "lora_te1_c", "lora_te_d"))
        case.tensors |= {f"{stem}.lora_A.weight": torch.ones(4, 4), f"{stem}.alpha": torch.ones(())}
    elif kind == "twice":
        layer = case.layer()
        for part, each in (("lora_A", 0), ("lora_B", 1)):
            old = case.tensors[case.key(layer, each)]
            case.tensors[f"{case.draw.choice(('', 'model.'))}{layer}.{part}.weight"] = 2 * old
    else:
        end = case.draw.choice(
            ("hada_w1_a", "dora_scale", "lora_B.bias", "lora_mid.weight", "diff", "lokr_w1", "")
        )
        case.tensors[f"{case.layout.form(case.layer())}.{end}"] = torch.ones(4, 4)
    case.write()
    return MAY


def prefix(case: Case) -> str:
    prefixes = ("unet.", "x", "text_encoder.", "transformer.transformer.", "lora_", ".")
    wrong = case.draw.choice(prefixes)
    case.tensors = {f"{wrong}{key}": value for key, value in case.tensors.items()}
    case.write()
    return MAY


TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8, torch.uint8)
TYPES = (*TYPES, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64)


def types(case: Case) -> str:
    to = case.draw.choice(TYPES)
    for key in list(case.tensors) if case.draw.random() < 0.5 else [case.key(case.layer(), 1)]:
        case.tensors[key] = case.tensors[key].to(to)
    case.write()
    return MAY if to.is_floating_point else MUST


def not_finite(case: Case) -> str:
    value = case.tensors[case.key(case.layer(), case.draw.choice((0, 1)))]
    at = case.draw.randrange(value.numel())
    value.view(-1)[at] = case.draw.choice((math.nan, math.inf, -math.inf))
    case.write()
    return MUST


def huge(case: Case) -> str:
    """Finite numbers, of which fp32's product is not."""
    for kind in (0, 1):
        case.tensors[case.key(case.layer(), kind)].fill_(3e38)
    case.write()
    return MAY


def payload(case: Case) -> str:
    odd, path = Payload(case.mark), case.path
    if case.draw.random() < 0.3:
        path = case.folder / case.draw.choice(("adapter_model.bin", "x.pt", "lora.ckpt"))
    case.folder.mkdir(exist_ok=True)
    case.draw.choice((lambda: path.write_bytes(pickle.dumps(odd)), lambda: torch.save(odd, path)))()
    return MUST


def no_file(case: Case) -> str:
    case.write()
    name = case.draw.choice([path.name for path in case.folder.iterdir()])
    other_than_a_file(case.folder / name, case.draw)
    return MUST


def hostile(case: Case) -> str:
    """Change what the metadata or adapter_config.json says; layouts without take it along."""
    draw, settings = case.draw, case.settings
    if not settings:
        (case.folder / BESIDE).write_text("{")  # of another file: it is not read
        case.write()
        return "must be read"
    key = draw.choice(
        ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora",
         "use_dora", "peft_type", "bias", "layers_to_transform", "exclude_modules", "new",
         "init_lora_weights", "modules_to_save", "target_parameters", "fan_in_fan_out")
    )  # fmt: skip
    values = (*ODD, *REGEX) if key in ("target_modules", "exclude_modules") else ODD
    if key.endswith("_pattern"):
        values += tuple({word: draw.choice((1, 8, *ODD))} for word in (*REGEX, case.layer()))
    settings[key] = draw.choice(values)
    if draw.random() < 0.2:
        del settings[key]
    texts = (
        "",
        "{}",
        "null",
        "[]",
        "3",
        "{",
        "[" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "NaN",
    )
    case.write(text=draw.choice(texts) if draw.random() < 0.2 else None)
    return MAY


DAMAGES = [whole, cut, lengthen, flip, flip, lie, half, reshape, ranks, alphas, more, prefix, types]
DAMAGES += [not_finite, huge, payload, no_file, hostile, hostile, hostile]
