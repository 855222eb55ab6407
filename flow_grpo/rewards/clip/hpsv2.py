"""HPSv2 (arXiv:2306.09341): a CLIP ViT-H/14 tuned on how people rank pictures of one prompt.

Runs on transformers' CLIP; the authors' package wants versions that nothing of today works beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPModel

HEAD_WIDTH = {"vision": 80, "text": 64}  # of a ViT-H/14, which its weights do not tell
LAYER_KEYS = (  # of a layer: the checkpoint's names, which are open_clip's, and transformers'
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
KEYS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}


class HPSv2(Reward):
    """Score the cosine of picture and prompt; about 0.2 to 0.35."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "hpsv2_processor")
        if not Path(settings["hpsv2"]).is_file():
            raise ValueError(
                f"config.rewards.hpsv2={settings['hpsv2']!r}: there is no such file. "
                f"HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt) of the hub's xswu/HPSv2 is "
                f"needed."
            )

    def __init__(self, settings, device):
        from flow_grpo.rewards.clip import encoder, mlp

        weights = mlp.read(settings["hpsv2"])
        try:
            model = read_open_clip(weights.get("state_dict", weights))
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"config.rewards.hpsv2={settings['hpsv2']!r} is no CLIP in open_clip's layout "
                f"({error}); the file of HPSv2 is needed."
            ) from error
        self.clip = encoder.Clip(model, settings["hpsv2_processor"], device)

    def __call__(self, batch: Batch) -> dict:
        return {"hpsv2": self.clip.cosines(only_pictures(batch.images, "hpsv2"), batch.prompts)}


def read_open_clip(weights: dict[str, Tensor]) -> CLIPModel:
    """Build transformers' CLIP from open_clip's weights; its sizes are read off them.

    The text's state is taken where the token of the highest number stands, as open_clip does.
    Raises KeyError or RuntimeError if they are another model's.
    """
    from transformers import CLIPConfig, CLIPModel

    positions, width = weights["visual.positional_embedding"].shape
    patch = weights["visual.conv1.weight"].shape[-1]
    vocabulary, text_width = weights["token_embedding.weight"].shape
    config = CLIPConfig(
        vision_config=_layers(weights, "visual.transformer.", width, "vision")
        | {"patch_size": patch, "image_size": round((positions - 1) ** 0.5) * patch},
        text_config=_layers(weights, "transformer.", text_width, "text")
        | {
            "vocab_size": vocabulary,
            "max_position_embeddings": len(weights["positional_embedding"]),
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
        projection_dim=weights["text_projection"].shape[1],
    )
    model = CLIPModel(config)
    model.load_state_dict(_renamed(weights))
    return model


def _layers(weights: dict[str, Tensor], prefix: str, width: int, kind: str) -> dict:
    number = prefix.count(".") + 1
    blocks = [key for key in weights if key.startswith(f"{prefix}resblocks.")]
    return {
        "hidden_size": width,
        "intermediate_size": len(weights[f"{prefix}resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": 1 + max(int(key.split(".")[number]) for key in blocks),
        "num_attention_heads": width // HEAD_WIDTH[kind],
        "hidden_act": "gelu",
    }


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        if key in ("visual.proj", "text_projection"):
            value = value.T
        if key in KEYS:
            renamed[KEYS[key]] = value.float()
        elif ".resblocks." in f".{key}":
            renamed |= _layer(key, value.float())
    return renamed


def _layer(key: str, value: Tensor) -> dict[str, Tensor]:
    part = "vision_model" if key.startswith("visual.") else "text_model"
    key = f"{part}.encoder.layers.{key.split('resblocks.')[1]}"
    if ".attn.in_proj_" in key:
        name = key.replace(".attn.in_proj_", ".self_attn.{}_proj.")
        return {name.format(n): v for n, v in zip("qkv", value.chunk(3), strict=True)}
    for theirs, ours in LAYER_KEYS:
        key = key.replace(theirs, ours)
    return {key: value}
