"""Runs on the tiny pipeline of scripts/testbed, in minutes, on a CPU."""

from config.base import base, select


def get_config(name="shapes_sd3"):
    return select(globals(), name)


def _testbed(objective):
    """A 2.3 M parameter SD3 learns to draw the shapes that it was asked for."""
    config = base(objective)
    config.pretrained.model = "scripts/testbed/base"
    config.dataset = "dataset/shapes"
    config.reward_fn = {"shapes": 1.0}
    config.resolution = 32
    config.max_sequence_length = 10
    config.mixed_precision = "no"
    config.use_lora = False
    config.save_freq = 20

    config.sample.num_steps = 6
    config.sample.eval_num_steps = 10
    config.sample.guidance_scale = 1.0
    config.sample.train_batch_size = 96
    config.sample.test_batch_size = 100
    config.sample.num_image_per_prompt = 12
    config.sample.num_batches_per_epoch = 4  # x 96 = 384 images, 32 groups of 12
    config.sample.global_std = False

    config.train.cfg = False
    config.train.hold_start = True  # a few megabytes
    config.train.learning_rate = 8e-5  # more learns faster, but random advantages then harm too
    config.train.gradient_accumulation_steps = 2  # 2 optimizer steps an epoch
    config.train.adam_beta2 = 0.98
    config.train.ema = True
    config.train.ema_decay = 0.97
    config.train.ema_update_every = 1
    return config


def shapes_sd3():
    """DiffusionNFT: ODE rollouts, no log-probs; here it learns most from an image."""
    config = _testbed("nft")
    config.num_epochs = 40  # the gradient's norm grows; without an end it would run away
    config.eval_freq = 10
    config.sample.noise_level = 0.0
    config.nft.steps = (0, 1)  # sigma 1 and .8; why: docs/log.md
    config.nft.decay = "on_policy"
    config.nft.kl_beta = 0.1
    config.train.learning_rate = 1e-4
    config.train.ema_decay = 0.95
    return config


def shapes_sd3_quick():
    """The same faster, by what was chosen on dev (docs/log.md)."""
    config = shapes_sd3()
    config.num_epochs = 36
    config.eval_freq = 12
    config.reward_fn = {"shapes": 0.5, "shapes_strict": 0.5}
    config.sample.clean_grid = True  # no step is spent on the last .001 of sigma
    config.sample.num_steps = 5  # sigma 1, .8, ... .2, as the first five of the grid of 6
    config.sample.eval_num_steps = 9
    config.nft.steps = (0, 1, 2)
    config.nft.kl_beta = 0.3  # which lets the rate be higher
    config.train.learning_rate = 6e-4
    config.train.adam_epsilon = 1e-4  # elements with next to no gradient hardly move
    config.train.ema_decay = 0.93
    return config


def shapes_sd3_hacked():
    """A reward that pays for red; what was asked for is held out, and watched (docs/hacking.md)."""
    config = shapes_sd3()
    config.num_epochs = 16
    config.eval_freq = 4
    config.reward_fn = {"scripts.testbed.one_color:redness": 1.0}
    config.eval_reward_fn = ("shapes_strict",)
    config.hacking_alarm = "warn"
    config.train.learning_rate = 2e-4
    return config


def shapes_sd3_short():
    """The same for 2 epochs of 2 groups x 4 images, in seconds: to try the commands."""
    config = shapes_sd3()
    config.num_epochs = 2
    config.save_freq = config.eval_freq = 1
    config.eval_max_samples = 20
    config.sample.train_batch_size = 8
    config.sample.num_image_per_prompt = 4
    config.sample.num_batches_per_epoch = 1
    config.train.gradient_accumulation_steps = 1  # 1 optimizer step an epoch
    return config


def shapes_sd3_grpo():
    """Flow-GRPO-Fast: SDE rollouts, three trained steps from a random start."""
    config = _testbed("grpo")
    config.num_epochs = 160
    config.eval_freq = 40
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (0, 4)
    config.train.clip_range = 1e-3
    config.train.step_weight = "std"
    return config
