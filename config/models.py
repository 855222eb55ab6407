"""What a family of models needs, whatever it learns: a run of config/grpo.py starts from one.

Each trains a LoRA with 48 groups of 24 an epoch on the GPUs that its docstring names.
"""

from config.base import base
from config.recipes import batches


def sd3(model="stabilityai/stable-diffusion-3.5-medium", objective="grpo"):
    """Stable Diffusion 3.5 at 512 x 512, all steps but the last; 32 GPUs."""
    config = batches(base(objective), train_batch_size=9, group_size=24, num_batches=4)
    config.pretrained.model = model
    config.resolution = 512
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 40
    config.sample.guidance_scale = 4.5
    config.sample.test_batch_size = 16
    config.train.ema = True
    config.save_freq = config.eval_freq = 60
    return config


def flux(model="black-forest-labs/FLUX.1-dev"):
    """FLUX.1 at 512 x 512, embedded guidance; 32 GPUs."""
    config = batches(base(), train_batch_size=3, group_size=24, num_batches=12)
    config.pretrained.model = model
    config.resolution = 512
    config.mixed_precision = "bf16"  # its activations overflow in fp16
    config.sample.num_steps = 6
    config.sample.eval_num_steps = 28
    config.sample.guidance_scale = 3.5
    config.sample.noise_level = 0.9
    config.sample.sde_window_range = (0, 3)
    config.sample.test_batch_size = 16
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    config.train.ema = True
    config.save_freq = config.eval_freq = 30
    return config


def flux2_klein():
    """FLUX.2-klein-base-4B at 512 x 512, guidance by two passes, two steps of five; 32 GPUs."""
    config = batches(base(), train_batch_size=6, group_size=24, num_batches=6)
    config.pretrained.model = "black-forest-labs/FLUX.2-klein-base-4B"
    config.resolution = 512
    config.max_sequence_length = 512  # the width of its text; shorter prompts are padded to it
    config.mixed_precision = "bf16"
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 28
    config.sample.guidance_scale = 4.0
    config.sample.noise_level = 0.7
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    config.sample.test_batch_size = 16
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    config.train.ema = True
    config.save_freq = config.eval_freq = 30
    return config


def zimage(model="Tongyi-MAI/Z-Image"):
    """Z-Image at 512 x 512, guidance by two passes, two steps of five; 32 GPUs."""
    config = batches(base(), train_batch_size=3, group_size=24, num_batches=12)
    config.pretrained.model = model
    config.resolution = 512
    config.max_sequence_length = 512
    config.mixed_precision = "bf16"
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 28
    config.sample.guidance_scale = 4.0  # c + 4 (c - u)
    config.sample.noise_level = 0.7
    config.sample.sde_window_size = 2
    config.sample.sde_window_range = (0, 5)
    config.sample.test_batch_size = 16
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    config.train.ema = True
    config.save_freq = config.eval_freq = 30
    return config


def wan2_1():
    """Wan2.1 1.3B, videos of 33 frames at 240 x 416; 12 GPUs, 48 groups of 4."""
    config = batches(base(), train_batch_size=8, group_size=4, num_batches=2)
    config.pretrained.model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config.height, config.width, config.num_frames = 240, 416, 33
    config.max_sequence_length = 512
    config.mixed_precision = "bf16"
    config.activation_checkpointing = True
    config.sample.num_steps = 20
    config.sample.eval_num_steps = 50
    config.sample.guidance_scale = 4.5
    config.sample.global_std = False
    config.sample.test_batch_size = 2
    return config


def qwenimage(model="Qwen/Qwen-Image"):
    """Qwen-Image at 512 x 512, guidance by two passes; 32 GPUs, 32 groups of 16."""
    config = batches(base(), train_batch_size=4, group_size=16, num_batches=4)
    config.pretrained.model = model
    config.resolution = 512
    config.max_sequence_length = 256  # every prompt is padded to it
    config.mixed_precision = "bf16"
    config.activation_checkpointing = True
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 50
    config.sample.guidance_scale = 4.0
    config.sample.test_batch_size = 4
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    config.save_freq = config.eval_freq = 30
    return config


def bagel():
    """BAGEL-7B-MoT at 512 x 512, guidance by two passes; 8 GPUs, 48 groups of 16."""
    config = batches(base(), train_batch_size=6, group_size=16, num_batches=16)
    config.pretrained.model = "ByteDance-Seed/BAGEL-7B-MoT"
    config.resolution = 512
    config.max_sequence_length = 256  # longer prompts are cut
    config.mixed_precision = "bf16"
    config.activation_checkpointing = True
    config.sample.num_steps = 14  # the authors' count is one more, of points
    config.sample.eval_num_steps = 49
    config.sample.guidance_scale = 4.0
    config.sample.global_std = False
    config.sample.noise_level = 1.3
    config.sample.sde_window_range = (0, 7)
    config.sample.test_batch_size = 6  # of the published run: 1
    config.train.learning_rate = 1e-4
    config.train.clip_range = 1e-5
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    config.eval_max_samples = 512
    config.save_freq = config.eval_freq = 30
    return config
