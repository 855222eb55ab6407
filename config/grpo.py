"""The known Flow-GRPO runs, as their reference scripts behave; each states what it changes.

Groups an epoch = ranks x sample.train_batch_size x sample.num_batches_per_epoch /
sample.num_image_per_prompt; the published runs have 48 groups. No config holds a number of GPUs:
the one in a docstring gives 48 groups (or what it says), another one works as well if it divides.
"""

from config.base import base, select


def get_config(name="general_ocr_sd3"):
    return select(globals(), name)


def _sd3():
    """Stable Diffusion 3.5 Medium at 512 x 512, LoRA, all steps but the last; 32 GPUs."""
    config = base()
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.resolution = 512
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 40
    config.sample.guidance_scale = 4.5
    config.sample.train_batch_size = 9
    config.sample.test_batch_size = 16
    config.sample.num_image_per_prompt = 24
    config.sample.num_batches_per_epoch = 4
    config.train.gradient_accumulation_steps = 2  # 2 optimizer steps an epoch
    config.train.ema = True
    config.save_freq = config.eval_freq = 30
    return config


def _batches(config, train_batch_size, group_size, num_batches):
    """Set the batch arithmetic; always 2 optimizer steps an epoch."""
    config.sample.train_batch_size = train_batch_size
    config.sample.num_image_per_prompt = group_size
    config.sample.num_batches_per_epoch = num_batches
    config.train.gradient_accumulation_steps = max(num_batches // 2, 1)
    return config


def _fast_nocfg(config):
    """Three random steps of the first five, CPS, and no guidance in sampling or training."""
    config.sample.guidance_scale = 1.0
    config.sample.eval_guidance_scale = 1.0
    config.sample.sde_type = "cps"
    config.sample.noise_level = 0.8
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (0, 5)
    config.train.cfg = False
    config.train.clip_range = 1e-5  # a short window needs a tighter clip
    config.train.beta = 0.0
    return config


def general_ocr_sd3():
    """SD3.5-M learns to render text; 32 GPUs."""
    config = _sd3()
    config.dataset = "dataset/ocr"
    config.reward_fn = {"ocr": 1.0}
    config.train.beta = 0.04
    return config


def general_ocr_sd3_4gpu():
    """The same on 4 GPUs, 16 groups of 16."""
    return _batches(general_ocr_sd3(), train_batch_size=8, group_size=16, num_batches=8)


def general_ocr_sd3_1gpu():
    """The same on 1 GPU, 8 groups of 8."""
    return _batches(general_ocr_sd3(), train_batch_size=8, group_size=8, num_batches=8)


def geneval_sd3():
    """SD3.5-M learns to compose: counts, colours, positions; 32 GPUs."""
    config = _sd3()
    config.dataset = "dataset/geneval"
    config.reward_fn = {"geneval": 1.0}
    config.sample.test_batch_size = 14
    config.train.beta = 0.04
    return config


def pickscore_sd3():
    """SD3.5-M learns what people prefer; 32 GPUs."""
    config = _sd3()
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"pickscore": 1.0}
    config.train.beta = 0.01
    return config


def pickscore_sd3_4gpu():
    """The same on 4 GPUs, 16 groups of 16."""
    return _batches(pickscore_sd3(), train_batch_size=8, group_size=16, num_batches=8)


def clipscore_sd3():
    """SD3.5-M learns to match its prompt by CLIP, from one initial noise a group; 32 GPUs."""
    config = _sd3()
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"clipscore": 1.0}
    config.sample.same_latent = True
    config.train.beta = 0.02
    return config


def geneval_sd3_fast_nocfg():
    """Flow-GRPO-Fast on GenEval, guidance distilled on the way; 32 GPUs."""
    return _fast_nocfg(geneval_sd3())


def pickscore_sd3_fast_nocfg():
    """Flow-GRPO-Fast on PickScore, guidance distilled on the way; 32 GPUs, 64 groups of 18."""
    config = _fast_nocfg(pickscore_sd3())
    config.sample.num_image_per_prompt = 18
    return config


def pickscore_sd3_fast():
    """Flow-GRPO-Fast on PickScore with guidance; 32 GPUs."""
    config = pickscore_sd3()
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    config.train.clip_range = 1e-5
    config.train.beta = 0.0
    return config


def _flux():
    """FLUX.1-dev at 512 x 512, LoRA, embedded guidance; 32 GPUs."""
    config = _batches(_sd3(), train_batch_size=3, group_size=24, num_batches=12)
    config.pretrained.model = "black-forest-labs/FLUX.1-dev"
    config.mixed_precision = "bf16"  # its activations overflow in fp16
    config.sample.num_steps = 6
    config.sample.eval_num_steps = 28
    config.sample.guidance_scale = 3.5
    config.sample.noise_level = 0.9
    config.sample.sde_window_range = (0, 3)
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    return config


def pickscore_flux():
    """FLUX.1-dev learns what people prefer; 32 GPUs."""
    config = _flux()
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"pickscore": 1.0}
    return config


def pickscore_flux_8gpu():
    """The same on 8 GPUs."""
    return _batches(pickscore_flux(), train_batch_size=3, group_size=24, num_batches=48)


def counting_flux_kontext():
    """FLUX.1 Kontext learns to change how many objects there are; 28 GPUs, 48 groups of 21."""
    config = _batches(_flux(), train_batch_size=3, group_size=21, num_batches=12)
    config.pretrained.model = "black-forest-labs/FLUX.1-Kontext-dev"
    config.dataset = "dataset/counting_edit"
    config.reward_fn = {"image_similarity": 0.5, "geneval": 0.5}
    config.sample.guidance_scale = 2.5
    return config
