"""ImageReward (arXiv:2304.05977): a BLIP with an MLP, tuned on how people rank pictures.

Runs on transformers' BLIP; the authors' package does not import beside a transformers of today.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flow_grpo.rewards.base import Reward, check_model, only_pictures
from flow_grpo.rewards.batch import Batch

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores over the authors' pictures
MAX_LENGTH = 35  # tokens of a prompt
HEAD_WIDTH = 64  # of every BERT and ViT that BLIP is made of
BATCH_SIZE = 32
VISION_KEYS = (  # the checkpoint's names and transformers', in this order
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".attn.", ".self_attn."),
    (".proj.", ".projection."),
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
)


class ImageReward(Reward):
    """Score as people would, about -2 to 2; their mean over pictures of 2022's models is 0."""

    @classmethod
    def check(cls, settings, prompts, metadata) -> None:
        check_model(settings, "imagereward_tokenizer")
        if not Path(settings["imagereward"]).is_file():
            raise ValueError(
                f"config.rewards.imagereward={settings['imagereward']!r}: there is no such file. "
                f"ImageReward.pt of the hub's zai-org/ImageReward is needed."
            )

    def __init__(self, settings, device):
        from transformers import BertTokenizer

        from flow_grpo.rewards.clip import mlp

        weights = mlp.read(settings["imagereward"])
        self.device = device
        self.tokenizer = BertTokenizer.from_pretrained(settings["imagereward_tokenizer"])
        self.vision = _vision(_below(weights, "blip.visual_encoder."), device)
        self.text = _text(_below(weights, "blip.text_encoder."), device)
        self.head = mlp.build(_below(weights, "mlp."), settings["imagereward"]).to(device)
        self.prepare = _prepare(self.vision.config.image_size)

    def __call__(self, batch: Batch) -> dict:
        images = only_pictures(batch.images, "imagereward")
        parts = [
            self._raw(images[n : n + BATCH_SIZE], batch.prompts[n : n + BATCH_SIZE])
            for n in range(0, len(batch), BATCH_SIZE)
        ]
        return {"imagereward": (np.concatenate(parts) - MEAN) / STD}

    def _raw(self, images: list[np.ndarray], prompts: list[str]) -> np.ndarray:
        import torch
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        pixels = self.prepare(pictures, return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(self.device)
        with torch.inference_mode():
            seen = self.vision(pixel_values=pixels).last_hidden_state
            read = self.text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                is_decoder=False,  # each token sees all others
            ).last_hidden_state
            return self.head(read[:, 0]).squeeze(-1).double().cpu().numpy()


def _below(weights: dict, prefix: str) -> dict:
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(
            f"config.rewards.imagereward: the file has no {prefix}*; that of ImageReward is needed."
        )
    return found


def _vision(weights: dict, device: str):
    """Build the picture's encoder; its sizes are read off its weights."""
    from transformers import BlipVisionConfig, BlipVisionModel

    _, num_tokens, width = weights["pos_embed"].shape
    patch = weights["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(k.split(".")[1]) for k in weights if "blocks." in k),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((num_tokens - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    renamed = {}
    for key, value in weights.items():
        for theirs, ours in VISION_KEYS:
            key = key.replace(theirs, ours)
        renamed["post_layer" + key if key.startswith("norm.") else key] = value
    return _loaded(BlipVisionModel(config), renamed, device)


def _text(weights: dict, device: str):
    """Build the prompt's encoder, which looks at the picture by cross-attention."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in weights if "encoder.layer." in k),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,
    )
    weights = {k: v for k, v in weights.items() if k != "embeddings.position_ids"}
    return _loaded(BlipTextModel(config, add_pooling_layer=False), weights, device)


def _loaded(model, weights: dict, device: str):
    outcome = model.load_state_dict(weights, strict=False)
    missing = [key for key in outcome.missing_keys if not key.endswith("position_ids")]
    if missing or outcome.unexpected_keys:
        raise ValueError(
            f"config.rewards.imagereward does not fit BLIP: {len(missing)} weights are missing and "
            f"{len(outcome.unexpected_keys)} unknown, such as "
            f"{(missing + outcome.unexpected_keys)[0]!r}."
        )
    return model.float().eval().requires_grad_(False).to(device)


def _prepare(side: int):
    """Resize the shorter side, crop the centre, normalise as CLIP does."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
