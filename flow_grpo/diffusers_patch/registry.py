"""The models: a stock pipeline's class name, as in model_index.json, and the family it is of."""

from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.diffusers_patch.base import PatchedPipeline
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.diffusers_patch.flux2_klein import Flux2Klein
from flow_grpo.diffusers_patch.flux_kontext import FluxKontext
from flow_grpo.diffusers_patch.qwenimage import QwenImage
from flow_grpo.diffusers_patch.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.diffusers_patch.wan import Wan
from flow_grpo.diffusers_patch.zimage import ZImage

FAMILIES: dict[str, type[PatchedPipeline]] = {
    "BagelPipeline": Bagel,
    "Flux2KleinPipeline": Flux2Klein,
    "FluxKontextPipeline": FluxKontext,
    "FluxPipeline": Flux,
    "QwenImageEditPipeline": QwenImageEdit,
    "QwenImageEditPlusPipeline": QwenImageEditPlus,
    "QwenImagePipeline": QwenImage,
    "StableDiffusion3Pipeline": SD3,
    "WanPipeline": Wan,
    "ZImagePipeline": ZImage,
}
# By which a folder is known, the usual one first, and a family that reads it.
INDEX_FILES = {each.index_file: each for each in (PatchedPipeline, *FAMILIES.values())}
