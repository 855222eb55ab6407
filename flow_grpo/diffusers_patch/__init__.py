"""The models: a stock pipeline's class name, as in model_index.json, and the family it is of."""

FAMILIES = {
    "Flux2KleinPipeline": "flow_grpo.diffusers_patch.flux2_klein:Flux2Klein",
    "FluxKontextPipeline": "flow_grpo.diffusers_patch.flux_kontext:FluxKontext",
    "FluxPipeline": "flow_grpo.diffusers_patch.flux:Flux",
    "QwenImageEditPipeline": "flow_grpo.diffusers_patch.qwenimage_edit:QwenImageEdit",
    "QwenImageEditPlusPipeline": "flow_grpo.diffusers_patch.qwenimage_edit:QwenImageEditPlus",
    "QwenImagePipeline": "flow_grpo.diffusers_patch.qwenimage:QwenImage",
    "StableDiffusion3Pipeline": "flow_grpo.diffusers_patch.sd3:SD3",
    "WanPipeline": "flow_grpo.diffusers_patch.wan:Wan",
    "ZImagePipeline": "flow_grpo.diffusers_patch.zimage:ZImage",
}
