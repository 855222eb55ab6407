"""Qwen-Image-Edit, and its successors for several images (2509, 2511): references as tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from flow_grpo.diffusers_patch.packed import Edits, pack, references_of
from flow_grpo.diffusers_patch.qwenimage import QwenImage
from flow_grpo.records import Cond, Size


class QwenImageEdit(Edits, QwenImage):
    """Edits one reference image a row; its shape and the generated one are independent.

    Text encoder and transformer see it at reference_area; its tokens do not count as text's.
    """

    stock = QwenImageEditPipeline
    num_references = (1, 1)
    enlarges_references = True
    takes_several = False  # the stock pipeline takes a list of images
    text_area = 0  # pixels of a reference that the text encoder sees; 0: reference_area

    @classmethod
    def variants(cls) -> tuple[type[QwenImageEdit], ...]:
        return (QwenImageEdit, QwenImageEditPlus)

    @classmethod
    def components(cls, path: str, revision: str) -> dict:
        load = PictureProcessor.from_pretrained
        return {"processor": load(path, subfolder="processor", revision=revision)}

    @torch.no_grad()
    def negative(self, images: tuple, max_length: int) -> Cond:
        # Both passes see the positive branch's references.
        return QwenImage.encode(self, self.negative_prompt, images, max_length)

    def text(self, prompt: str, references: tuple, max_length: int) -> dict[str, Tensor]:
        pictures = [self.resized(r, self.text_area or self.reference_area) for r in references]
        processor = self.pipe.processor.image_processor
        patches = sum(processor.get_number_of_image_patches(p.height, p.width) for p in pictures)
        picture_tokens = patches // processor.merge_size**2
        embeds, _ = self.pipe.encode_prompt(
            prompt, pictures if self.takes_several else pictures[0], device=self.device
        )
        return {  # cut as Qwen-Image's pipeline does; that of the edits never cuts
            "embeds": embeds[0, : max_length + picture_tokens].cpu(),
            "picture_tokens": torch.tensor(picture_tokens),
        }

    def collate(self, conds: list[Cond], pad_to: int) -> dict[str, Tensor]:
        if pad_to:
            pad_to += max(int(cond.tensors["picture_tokens"]) for cond in conds)
        return super().collate(conds, pad_to)

    def resized(self, image: np.ndarray, area: int) -> Image.Image:
        """Scale an image (H, W, 3) to about `area` pixels, its sides to multiples of 32."""
        height, width = image.shape[:2]
        width, height = calculate_dimensions(area, width / height)
        if not (width and height):
            raise ValueError(
                f"config.reference_area={area}: a reference of {image.shape[1]} x "
                f"{image.shape[0]} pixels would vanish. Raise it, or crop the image."
            )
        return self.pipe.image_processor.resize(Image.fromarray(image), height, width)

    def reference_latents(self, image: np.ndarray) -> Tensor:
        """Encode an image, uint8 (H, W, 3), to latents (C, h, w), fp32."""
        pixels = self.pipe.image_processor.preprocess(self.resized(image, self.reference_area))
        pixels = pixels.unsqueeze(2).to(self.device, self.pipe.vae.dtype)
        return self.pipe._encode_vae_image(pixels, generator=None)[0, :, 0].float()

    def image_tokens(self, latents, positive, size: Size) -> tuple[Tensor, list]:
        tokens, sizes = super().image_tokens(latents, positive, size)
        references = references_of(positive)
        sizes += [(1, r.shape[2] // 2, r.shape[3] // 2) for r in references]
        return torch.cat([tokens, *map(pack, references)], dim=1), sizes


class QwenImageEditPlus(QwenImageEdit):
    """Takes one or several references; the text encoder sees each at 384 x 384 pixels' area."""

    stock = QwenImageEditPlusPipeline
    num_references = (1, math.inf)
    takes_several = True
    text_area = CONDITION_IMAGE_SIZE


class PictureProcessor(Qwen2VLProcessor):
    """The same without its part for videos, which needs torchvision and which no edit uses."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # It takes for its parts what this signature names.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
