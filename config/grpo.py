"""Flow-GRPO's published runs, and ours on other models; each states what it changes.

Groups an epoch = ranks x sample.train_batch_size x sample.num_batches_per_epoch /
sample.num_image_per_prompt; the published runs have 48 groups. No config holds a number of GPUs:
the one in a docstring gives 48 groups (or what it says), another one works as well if it divides.
"""

from config.base import select
from config.models import bagel, flux, flux2_klein, qwenimage, sd3, wan2_1, zimage
from config.recipes import batches, counting, fast, fast_nocfg, geneval, ocr, pickscore


def get_config(name="general_ocr_sd3"):
    return select(globals(), name)


def compressibility():
    """SD3.5-M learns to draw what JPEG stores in few bytes, 40 steps; 1 GPU, 4 groups of 8."""
    config = batches(sd3(), train_batch_size=8, group_size=8, num_batches=4)
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"jpeg_compressibility": 1.0}
    config.sample.num_steps = 40
    config.train.ema = False
    return config


def general_ocr_sd3():
    """SD3.5-M learns to render text; 32 GPUs."""
    config = ocr(sd3())
    config.train.beta = 0.04
    return config


def general_ocr_sd3_4gpu():
    """The same on 4 GPUs, 16 groups of 16."""
    return batches(general_ocr_sd3(), train_batch_size=8, group_size=16, num_batches=8)


def general_ocr_sd3_1gpu():
    """The same on 1 GPU, 8 groups of 8."""
    return batches(general_ocr_sd3(), train_batch_size=8, group_size=8, num_batches=8)


def geneval_sd3():
    """SD3.5-M learns to compose: counts, colours, positions; 32 GPUs."""
    config = geneval(sd3())
    config.train.beta = 0.04
    return config


def pickscore_sd3():
    """SD3.5-M learns what people prefer; 32 GPUs."""
    config = pickscore(sd3())
    config.train.beta = 0.01
    return config


def pickscore_sd3_4gpu():
    """The same on 4 GPUs, 16 groups of 16."""
    return batches(pickscore_sd3(), train_batch_size=8, group_size=16, num_batches=8)


def pickscore_sd3_5_large():
    """SD3.5 Large learns what people prefer; 32 GPUs. Our own settings: no published run."""
    config = pickscore(sd3("stabilityai/stable-diffusion-3.5-large"))
    config = batches(config, train_batch_size=3, group_size=24, num_batches=12)
    config.mixed_precision = "bf16"  # as its weights are published; fp16 was not tried
    config.activation_checkpointing = True
    config.sample.test_batch_size = 8
    config.train.beta = 0.01
    return config


def clipscore_sd3():
    """SD3.5-M learns to match its prompt by CLIP, from one initial noise a group; 32 GPUs."""
    config = sd3()
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"clipscore": 1.0}
    config.sample.same_latent = True
    config.train.beta = 0.02
    return config


def geneval_sd3_fast_nocfg():
    """Flow-GRPO-Fast on GenEval, guidance distilled on the way; 32 GPUs."""
    return fast_nocfg(geneval(sd3()))


def pickscore_sd3_fast_nocfg():
    """Flow-GRPO-Fast on PickScore, guidance distilled on the way; 32 GPUs, 64 groups of 18."""
    config = fast_nocfg(pickscore(sd3()))
    config.sample.num_image_per_prompt = 18
    return config


def pickscore_sd3_fast():
    """Flow-GRPO-Fast on PickScore with guidance: Flow-SDE on two steps; 32 GPUs."""
    config = fast(pickscore(sd3()))
    config.sample.sde_type = "sde"
    config.sample.sde_window_size = 2
    return config


def pickscore_flux():
    """FLUX.1-dev learns what people prefer; 32 GPUs."""
    return pickscore(flux())


def pickscore_flux_8gpu():
    """The same on 8 GPUs."""
    return batches(pickscore(flux()), train_batch_size=3, group_size=24, num_batches=48)


def pickscore_flux_fast():
    """Flow-GRPO-Fast: always steps 0 to 2, advantages by the group's own spread; 32 GPUs."""
    config = fast(pickscore(flux()))
    config.sample.global_std = False
    return config


def geneval_flux_fast():
    """Flow-GRPO-Fast on GenEval: always steps 0 to 2; 32 GPUs."""
    return fast(geneval(flux()))


def counting_flux_kontext():
    """FLUX.1 Kontext learns to change how many objects there are; 28 GPUs, 48 groups of 21."""
    config = counting(flux("black-forest-labs/FLUX.1-Kontext-dev"), similarity=0.5, geneval=0.5)
    config = batches(config, train_batch_size=3, group_size=21, num_batches=12)
    config.sample.guidance_scale = 2.5
    config.sample.test_batch_size = 2  # each carries the tokens of a reference as well
    return config


def pickscore_flux2_klein():
    """FLUX.2 klein learns what people prefer; 32 GPUs. Our own settings: no published run."""
    return pickscore(flux2_klein())


def counting_flux2_klein():
    """FLUX.2 klein learns to change how many objects there are; 32 GPUs. Our own settings."""
    config = counting(flux2_klein(), similarity=0.5, geneval=0.5)
    config = batches(config, train_batch_size=3, group_size=24, num_batches=12)
    config.sample.test_batch_size = 2  # each carries the tokens of a reference as well
    return config


def pickscore_zimage():
    """Z-Image at 512 x 512 learns what people prefer; 32 GPUs. Our own settings."""
    return pickscore(zimage())


def pickscore_zimage_turbo():
    """The same on Z-Image-Turbo: 8 steps without guidance, as it was distilled; 32 GPUs."""
    config = pickscore(zimage("Tongyi-MAI/Z-Image-Turbo"))
    config.sample.num_steps = 8
    config.sample.eval_num_steps = 8
    config.sample.guidance_scale = 0.0
    return config


def general_ocr_wan2_1():
    """Wan2.1 1.3B learns to render text in videos of 33 frames at 240 x 416; 12 GPUs."""
    config = ocr(wan2_1())
    config.reward_fn = {"video_ocr": 1.0}
    config.sample.sde_type = "linear"
    config.sample.noise_level = 1.0
    config.sample.clean_grid = True  # the published run's UniPC has these sigmas to .004
    config.train.learning_rate = 1e-4
    config.train.clip_range = 1e-3
    config.train.beta = 0.004
    config.train.kl_mode = "kl_true"
    config.train.ema = True
    return config


def pickscore_qwenimage():
    """Qwen-Image learns what people prefer, on two steps of the first five; 32 GPUs, 32 groups."""
    config = pickscore(qwenimage())
    config.sample.noise_level = 1.2
    config.sample.sde_window_size = 2
    return config


def pickscore_qwenimage_8gpu():
    """The same on 8 GPUs, 32 groups of 16."""
    return batches(pickscore_qwenimage(), train_batch_size=4, group_size=16, num_batches=16)


def counting_qwenimage_edit():
    """Qwen-Image-Edit learns to change how many objects there are; 32 GPUs, 32 groups of 16."""
    config = counting(qwenimage("Qwen/Qwen-Image-Edit"), similarity=0.2, geneval=0.8)
    config.sample.noise_level = 1.0
    return config


def counting_qwenimage_edit_8gpu():
    """The same on 8 GPUs, 32 groups of 16."""
    return batches(counting_qwenimage_edit(), train_batch_size=4, group_size=16, num_batches=16)


def counting_qwenimage_edit_fast():
    """The same on four steps of the first five; 32 GPUs, 32 groups of 16."""
    config = counting_qwenimage_edit()
    config.sample.noise_level = 1.5
    config.sample.sde_window_size = 4
    return config


def counting_qwenimage_edit_2509():
    """The fast run on the model for several images; 32 GPUs, 32 groups. Our own settings."""
    config = counting_qwenimage_edit_fast()
    config.pretrained.model = "Qwen/Qwen-Image-Edit-2509"
    return config


def pickscore_bagel():
    """BAGEL's whole generation expert learns what people prefer, on three steps; 32 GPUs."""
    config = batches(pickscore(bagel()), train_batch_size=6, group_size=16, num_batches=4)
    config.use_lora = False
    config.sample.sde_window_size = 3
    return config


def pickscore_bagel_lora():
    """A LoRA of it learns the same, on two steps; 8 GPUs."""
    config = pickscore(bagel())
    config.sample.sde_window_size = 2
    return config


def pickscore_bagel_lora_unguided():
    """The same, trained unguided near the base and evaluated guided; 8 GPUs.

    What the author of the published runs found best (issue 198 of yifan123/flow_grpo): a guided run
    distils the guidance, and guided pictures oversharpen. beta is ours, there is no published one.
    """
    config = pickscore_bagel_lora()
    config.sample.guidance_scale = 1.0
    config.sample.eval_guidance_scale = 4.0
    config.train.beta = 0.01
    config.train.kl_mode = "v"
    return config
