"""The released folder: one file of the transformer, one of FLUX.1's VAE, no model_index.json."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Tokenizer

from flow_grpo.diffusers_patch.bagel.transformer import GENERATION, BagelTransformer
from flow_grpo.diffusers_patch.disk import files
from flow_grpo.diffusers_patch.disk.released import FLUX1_DEV
from flow_grpo.inputs import json_object

CONFIG, WEIGHTS, VAE = "llm_config.json", "ema.safetensors", "ae.safetensors"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")
SIZES = (  # of CONFIG. Norms of queries and keys, and untied embeddings, the authors' code adds.
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta"),
)
TABLE, PATCH = "latent_pos_embed.pos_embed", "vae2llm.weight"  # whose shapes tell the rest
TEXT_ONLY = ("language_model.lm_head.weight", "language_model.model.norm.weight")
RELEASED_VAE = (  # what diffusers' names of its weights are in the file
    (r"decoder\.up_blocks\.(\d)\.resnets", lambda m: f"decoder.up.{3 - int(m[1])}.block"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample"),
    (r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{1 + int(m[1])}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def find(path: str, revision: str = "main") -> Path:
    """Return the folder of a path or a hub id, downloaded if need be. Raises OSError."""
    if Path(path).is_dir():
        return Path(path)
    wanted = [CONFIG, WEIGHTS, VAE, *TOKENIZER]
    return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))


def sizes(folder: Path) -> dict[str, float]:
    """Return a BagelTransformer's arguments, but for the marks. Raises ValueError naming a file."""
    stated, told = json_object(folder / CONFIG), files.header(folder / WEIGHTS)
    try:
        found = {key: stated[key] for key in SIZES}
        if odd := [key for key, value in found.items() if not isinstance(value, (int, float))]:
            raise ValueError(f"{folder / CONFIG}: {odd[0]} is {found[odd[0]]!r:.60}, no number.")
        side, patch = math.isqrt(told[TABLE]["shape"][0]), told[PATCH]["shape"][1]
    except KeyError as error:
        file = CONFIG if error.args[0] in SIZES else WEIGHTS
        raise ValueError(f"{folder / file} has no {error.args[0]}. Fetch it again.") from None
    return found | {"max_latent_size": side, "patch_dim": patch}


def read_tokenizer(folder: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(folder)


def mark_ids(tokenizer: Qwen2Tokenizer, kind: str) -> list[int]:
    """Return the ids of <|kind_start|> and <|kind_end|>. Raises ValueError if they are unknown."""
    marks = [f"<|{kind}_{end}|>" for end in ("start", "end")]
    ids = tokenizer.convert_tokens_to_ids(marks)  # another's where it does not know one
    if None in ids or tokenizer.convert_ids_to_tokens(ids) != marks:
        raise ValueError(f"the tokenizer lacks {' or '.join(marks)}. Fetch its files again.")
    return ids


def read_transformer(
    folder: Path,
    tokenizer: Qwen2Tokenizer,
    dtype: torch.dtype,
    trained_dtype: torch.dtype,
    device: str = "cpu",
) -> BagelTransformer:
    """Read what draws of the weights. trained_dtype: of the generation expert's.

    Raises ValueError where a weight is missing or has another shape.
    """
    start, end = mark_ids(tokenizer, "vision")
    with torch.device("meta"):
        model = BagelTransformer(**sizes(folder), start_of_image=start, end_of_image=end)
    state, file = model.state_dict(), folder / WEIGHTS
    told = files.header(file)
    for name, empty in state.items():
        place, shape = told.get(name, {}), list(empty.shape)
        if place.get("shape") != shape or place.get("dtype") not in DTYPES:
            raise ValueError(
                f"{file} has as {name} {place or 'nothing'}, and floats of the shape {shape} are "
                f"needed by {CONFIG}. Fetch both files again."
            )
    for name, value in _values(file, told, state):
        kind = trained_dtype if GENERATION in name else dtype
        state[name] = value.to(device, kind, copy=True)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Read FLUX.1's VAE from its authors' file, whose shapes say how wide it is.

    Raises ValueError if it has other weights.
    """
    held, state = files.tensors(folder / VAE), {}
    first = "encoder.down.{}.block.{}.conv1.weight".format
    try:
        widths = [len(held[first(i, 0)]) for i in range(4)]
        num_blocks = sum(first(0, j) in held for j in range(9))
        num_channels = held["decoder.conv_in.weight"].shape[1]
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(vae_config(widths, num_blocks, num_channels))
        for name, empty in vae.state_dict().items():
            value = held.pop(released_vae_name(name))
            state[name] = value.reshape(empty.shape).to(dtype, copy=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder / VAE} is no VAE as FLUX.1's: {error}. Fetch it again."
        ) from None
    if held:
        raise ValueError(f"{folder / VAE} has {min(held)}, which FLUX.1's VAE lacks.")
    vae.load_state_dict(state, assign=True)
    return vae.eval()


def vae_config(widths: Sequence[int], num_blocks: int, num_channels: int) -> dict:
    """Return the VAE's config. num_blocks: of each level. num_channels: of latents."""
    own = {"block_out_channels": list(widths), "norm_num_groups": min(32, widths[0])}
    return FLUX1_DEV.vae | own | {"layers_per_block": num_blocks, "latent_channels": num_channels}


def released_vae_name(name: str) -> str:
    """Return what a weight that diffusers calls so is called in the file."""
    for pattern, replacement in RELEASED_VAE:
        name = re.sub(pattern, replacement, name)
    return name


def write(
    folder: Path, transformer: BagelTransformer, vae: AutoencoderKL, tokenizer: Qwen2Tokenizer
) -> None:
    """Write a folder that find() and the authors' text-to-image code read."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {key: transformer.config[key] for key in SIZES}
    (folder / CONFIG).write_text(json.dumps(stated, indent=2) + "\n")
    state = {name: value.contiguous() for name, value in transformer.state_dict().items()}
    words = state["language_model.model.embed_tokens.weight"]
    state |= {TEXT_ONLY[0]: torch.zeros_like(words), TEXT_ONLY[1]: torch.zeros_like(words[0])}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    save_file(
        {released_vae_name(name): _released(name, v) for name, v in vae.state_dict().items()},
        folder / VAE,
    )
    tokenizer.save_pretrained(folder)


def _released(name: str, value: Tensor) -> Tensor:
    """A projection of the VAE's attention is a convolution of 1 x 1 there."""
    is_projection = ".attentions." in name and value.ndim == 2
    return (value[:, :, None, None] if is_projection else value).contiguous()


def export(base: Path, transformer: Path, out: Path) -> int:
    """Copy the released file, its trained weights replaced; return how many these are.

    base: a folder with WEIGHTS. transformer: a fine-tune's folder. Raises ValueError.
    """
    told, found = files.header(base / WEIGHTS), {}
    for file in (transformer / name for name in files.weights(transformer)[1]):
        ours = {name: each for name, each in files.header(file).items() if GENERATION in name}
        found |= {name: (file, each["shape"]) for name, each in ours.items()}
    needed = {name: each["shape"] for name, each in told.items() if GENERATION in name}
    if wrong := [n for n in needed | found if n not in found or needed.get(n) != found[n][1]]:
        raise ValueError(f"{transformer} is not trained from {base}: {wrong[0]} differs.")
    shutil.copyfile(base / WEIGHTS, out)
    start = _start(out)
    with out.open("r+b") as opened:
        for file in {file for file, _ in found.values()}:
            names = [name for name, (place, _) in found.items() if place == file]
            for name, value in _values(file, files.header(file), names):
                released = value.to(DTYPES[told[name]["dtype"]]).contiguous()
                opened.seek(start + told[name]["data_offsets"][0])
                opened.write(released.view(torch.uint8).numpy().tobytes())
    return len(found)


def _values(file: Path, told: dict, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Give each weight as it lies in the file. told: its header.

    Each by a map of its own: one of 27 GiB counts as so much memory asked for.
    """
    start = _start(file)
    for name in list(names):
        begin, end = told[name]["data_offsets"]
        raw = np.memmap(file, np.uint8, "c", start + begin, (end - begin,))
        value = torch.from_numpy(raw).view(DTYPES[told[name]["dtype"]])
        yield name, value.view(told[name]["shape"])


def _start(file: Path) -> int:
    """Return where the weights begin in a .safetensors file."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")
