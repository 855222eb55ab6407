"""The known Flow-GRPO runs, as their reference scripts behave; each states what it changes.

Groups an epoch = ranks x sample.train_batch_size x sample.num_batches_per_epoch /
sample.num_image_per_prompt; the published runs have 48 groups. No config holds a number of GPUs:
the one in a docstring gives 48 groups (or what it says), another one works as well if it divides.
"""

from config.base import base, select

NOT_YET = ("pickscore_bagel", "pickscore_bagel_lora")  # published, of a model that is not here


def get_config(name="general_ocr_sd3"):
    if name in NOT_YET:
        raise ValueError(
            f"--config: {name} trains Bagel, which is not here yet: it is no diffusers pipeline. "
            f"pickscore_qwenimage and pickscore_flux train other models on the same reward."
        )
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
    config.save_freq = config.eval_freq = 60
    return config


def _batches(config, train_batch_size, group_size, num_batches):
    """Set the batch arithmetic; always 2 optimizer steps an epoch."""
    config.sample.train_batch_size = train_batch_size
    config.sample.num_image_per_prompt = group_size
    config.sample.num_batches_per_epoch = num_batches
    config.train.gradient_accumulation_steps = max(num_batches // 2, 1)
    return config


def _fast(config):
    """Flow-GRPO-Fast: CPS on three consecutive steps of the first half; no KL."""
    config.sample.sde_type = "cps"
    config.sample.noise_level = 0.8
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (0, config.sample.num_steps // 2)
    config.train.clip_range = 1e-5  # a short window needs a tighter clip
    config.train.beta = 0.0
    return config


def _fast_nocfg(config):
    """The same without guidance in sampling or training."""
    config = _fast(config)
    config.sample.guidance_scale = 1.0
    config.sample.eval_guidance_scale = 1.0
    config.train.cfg = False
    return config


def compressibility():
    """SD3.5-M learns to draw what JPEG stores in few bytes, 40 steps; 1 GPU, 4 groups of 8."""
    config = _batches(_sd3(), train_batch_size=8, group_size=8, num_batches=4)
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"jpeg_compressibility": 1.0}
    config.sample.num_steps = 40
    config.train.ema = False
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


def pickscore_sd3_5_large():
    """SD3.5 Large learns what people prefer; 32 GPUs. Our own settings: no published run."""
    config = _batches(pickscore_sd3(), train_batch_size=3, group_size=24, num_batches=12)
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-large"
    config.mixed_precision = "bf16"  # as its weights are published; fp16 was not tried
    config.activation_checkpointing = True
    config.sample.test_batch_size = 8
    return config


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
    """Flow-GRPO-Fast on PickScore with guidance: Flow-SDE on two steps; 32 GPUs."""
    config = _fast(pickscore_sd3())
    config.sample.sde_type = "sde"
    config.sample.sde_window_size = 2
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
    config.save_freq = config.eval_freq = 30
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


def pickscore_flux_fast():
    """Flow-GRPO-Fast: always steps 0 to 2, advantages by the group's own spread; 32 GPUs."""
    config = _fast(pickscore_flux())
    config.sample.global_std = False
    return config


def geneval_flux_fast():
    """Flow-GRPO-Fast on GenEval: always steps 0 to 2; 32 GPUs."""
    config = _fast(_flux())
    config.dataset = "dataset/geneval"
    config.reward_fn = {"geneval": 1.0}
    config.sample.test_batch_size = 14
    return config


def counting_flux_kontext():
    """FLUX.1 Kontext learns to change how many objects there are; 28 GPUs, 48 groups of 21."""
    config = _batches(_flux(), train_batch_size=3, group_size=21, num_batches=12)
    config.pretrained.model = "black-forest-labs/FLUX.1-Kontext-dev"
    config.dataset = "dataset/counting_edit"
    config.reward_fn = {"image_similarity": 0.5, "geneval": 0.5}
    config.sample.guidance_scale = 2.5
    config.sample.test_batch_size = 2  # each carries the tokens of a reference as well
    return config


def _flux2_klein():
    """FLUX.2-klein-base-4B at 512 x 512, LoRA, guidance by two passes; 32 GPUs."""
    config = _batches(_flux(), train_batch_size=6, group_size=24, num_batches=6)
    config.pretrained.model = "black-forest-labs/FLUX.2-klein-base-4B"
    config.max_sequence_length = 512  # the width of its text; shorter prompts are padded to it
    config.sample.num_steps = 10
    config.sample.guidance_scale = 4.0
    config.sample.noise_level = 0.7
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    return config


def pickscore_flux2_klein():
    """FLUX.2 klein learns what people prefer; 32 GPUs. Our own settings: no published run."""
    config = _flux2_klein()
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"pickscore": 1.0}
    return config


def counting_flux2_klein():
    """FLUX.2 klein learns to change how many objects there are; 32 GPUs. Our own settings."""
    config = _batches(_flux2_klein(), train_batch_size=3, group_size=24, num_batches=12)
    config.dataset = "dataset/counting_edit"
    config.reward_fn = {"image_similarity": 0.5, "geneval": 0.5}
    config.sample.test_batch_size = 2  # each carries the tokens of a reference as well
    return config


def pickscore_zimage():
    """Z-Image at 512 x 512 learns what people prefer; 32 GPUs. Our own settings."""
    config = _batches(pickscore_flux(), train_batch_size=3, group_size=24, num_batches=12)
    config.pretrained.model = "Tongyi-MAI/Z-Image"
    config.max_sequence_length = 512
    config.sample.num_steps = 10
    config.sample.guidance_scale = 4.0  # c + 4 (c - u)
    config.sample.noise_level = 0.7
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    return config


def pickscore_zimage_turbo():
    """The same on Z-Image-Turbo: 8 steps without guidance, as it was distilled; 32 GPUs."""
    config = pickscore_zimage()
    config.pretrained.model = "Tongyi-MAI/Z-Image-Turbo"
    config.sample.num_steps = 8
    config.sample.eval_num_steps = 8
    config.sample.guidance_scale = 0.0
    return config


def general_ocr_wan2_1():
    """Wan2.1 1.3B learns to render text in videos of 33 frames at 240 x 416; 12 GPUs.

    The reference run gives its SDE a std of its own and takes UniPC's sigmas; here they are
    Flow-SDE's and Euler's.
    """
    config = base()
    config.pretrained.model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config.dataset = "dataset/ocr"
    config.reward_fn = {"video_ocr": 1.0}
    config.height, config.width, config.num_frames = 240, 416, 33
    config.max_sequence_length = 512
    config.mixed_precision = "bf16"
    config.activation_checkpointing = True
    config.sample.num_steps = 20
    config.sample.eval_num_steps = 50
    config.sample.guidance_scale = 4.5
    config.sample.global_std = False
    config.sample.test_batch_size = 2
    config.train.learning_rate = 1e-4
    config.train.clip_range = 1e-3
    config.train.beta = 0.004
    config.train.kl_mode = "kl_true"
    return _batches(config, train_batch_size=8, group_size=4, num_batches=2)


def _qwenimage():
    """Qwen-Image at 512 x 512, LoRA, guidance by two passes; 32 GPUs, 32 groups of 16."""
    config = _batches(_flux(), train_batch_size=4, group_size=16, num_batches=4)
    config.pretrained.model = "Qwen/Qwen-Image"
    config.max_sequence_length = 256  # every prompt is padded to it
    config.activation_checkpointing = True
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 50
    config.sample.guidance_scale = 4.0
    config.sample.test_batch_size = 4
    config.sample.noise_level = 1.2
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    config.train.ema = False
    return config


def pickscore_qwenimage():
    """Qwen-Image learns what people prefer, on two steps of the first five; 32 GPUs, 32 groups."""
    config = _qwenimage()
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"pickscore": 1.0}
    return config


def pickscore_qwenimage_8gpu():
    """The same on 8 GPUs, 32 groups of 16."""
    return _batches(pickscore_qwenimage(), train_batch_size=4, group_size=16, num_batches=16)


def counting_qwenimage_edit():
    """Qwen-Image-Edit learns to change how many objects there are; 32 GPUs, 32 groups of 16."""
    config = _qwenimage()
    config.pretrained.model = "Qwen/Qwen-Image-Edit"
    config.dataset = "dataset/counting_edit"
    config.reward_fn = {"image_similarity": 0.2, "geneval": 0.8}
    config.sample.noise_level = 1.0
    config.sample.sde_window_size = 0
    return config


def counting_qwenimage_edit_8gpu():
    """The same on 8 GPUs, 32 groups of 16."""
    return _batches(counting_qwenimage_edit(), train_batch_size=4, group_size=16, num_batches=16)


def counting_qwenimage_edit_fast():
    """The same on four steps of the first five; 32 GPUs, 32 groups of 16."""
    config = counting_qwenimage_edit()
    config.sample.noise_level = 1.5
    config.sample.sde_window_size = 4
    return config


def counting_qwenimage_edit_2509():
    """The fast run on the model for several pictures; 32 GPUs, 32 groups. Our own settings."""
    config = counting_qwenimage_edit_fast()
    config.pretrained.model = "Qwen/Qwen-Image-Edit-2509"
    return config
