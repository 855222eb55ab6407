"""FLUX.1 Kontext (arXiv:2506.15742): FLUX.1 with a reference image's tokens at the end."""

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor

from flow_grpo.diffusers_patch.flux import Flux, position_ids
from flow_grpo.diffusers_patch.packed import Edits, pack
from flow_grpo.records import Guidance, Size


class FluxKontext(Edits, Flux):
    """Edits one reference image a row; its size and the generated one are independent."""

    stock = FluxKontextPipeline
    lora_target_modules = (*Flux.lora_target_modules, "proj_mlp")
    num_references = (1, 1)

    def stock_arguments(self, size: Size, guidance: Guidance, noise, images=()) -> dict:
        stock = super().stock_arguments(size, guidance, noise, images)
        return stock | {"max_area": size.height * size.width, "_auto_resize": False}

    def reference_latents(self, image: np.ndarray) -> Tensor:
        """Encode an image, uint8 (H, W, 3), to latents (C, h, w), fp32.

        As the stock pipeline with _auto_resize=False, but shrunk to reference_area if it is larger.
        """
        height, width = self.reference_size(*image.shape[:2])
        processor = self.pipe.image_processor
        resized = processor.resize(Image.fromarray(image), height, width)
        pixels = processor.preprocess(resized, height, width).to(self.device, self.pipe.vae.dtype)
        return self.pipe._encode_vae_image(pixels, generator=None)[0].float()

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in pixels at which an image of this size is encoded."""
        multiple = self.vae_scale * 2
        scale = min(1.0, (self.reference_area / (height * width)) ** 0.5)
        height, width = (int(side * scale) // multiple for side in (height, width))
        return max(height, 1) * multiple, max(width, 1) * multiple

    def image_tokens(self, latents, positive, size: Size) -> tuple[Tensor, Tensor]:
        tokens, ids = super().image_tokens(latents, positive, size)
        reference = positive["reference_0"]
        height, width = (side // 2 for side in reference.shape[2:])
        reference_ids = position_ids(1, height, width, latents.device)
        return torch.cat([tokens, pack(reference)], dim=1), torch.cat([ids, reference_ids])
