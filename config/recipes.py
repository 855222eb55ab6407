"""What a run does to its model's config: what it learns, how large an epoch is, which steps train.

Each function changes the config that it is given, and returns it.
"""


def batches(config, train_batch_size, group_size, num_batches):
    """Set the batch arithmetic; always 2 optimizer steps an epoch."""
    config.sample.train_batch_size = train_batch_size
    config.sample.num_image_per_prompt = group_size
    config.sample.num_batches_per_epoch = num_batches
    config.train.gradient_accumulation_steps = max(num_batches // 2, 1)
    return config


def fast(config):
    """Flow-GRPO-Fast: CPS on three consecutive steps of the first half; no KL."""
    config.sample.sde_type = "cps"
    config.sample.noise_level = 0.8
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (0, config.sample.num_steps // 2)
    config.train.clip_range = 1e-5  # a short window needs a tighter clip
    config.train.beta = 0.0
    return config


def fast_nocfg(config):
    """The same without guidance in sampling or training."""
    config = fast(config)
    config.sample.guidance_scale = 1.0
    config.sample.eval_guidance_scale = 1.0
    config.train.cfg = False
    return config


def ocr(config):
    """Learn to render text."""
    config.dataset = "dataset/ocr"
    config.reward_fn = {"ocr": 1.0}
    return config


def geneval(config):
    """Learn to compose: counts, colours, positions."""
    config.dataset = "dataset/geneval"
    config.reward_fn = {"geneval": 1.0}
    config.sample.test_batch_size = 14
    return config


def pickscore(config):
    """Learn what people prefer."""
    config.dataset = "dataset/pickscore"
    config.reward_fn = {"pickscore": 1.0}
    return config


def counting(config, similarity, geneval):
    """Learn to change how many objects there are; the weights of what stays and what changes."""
    config.dataset = "dataset/counting_edit"
    config.reward_fn = {"image_similarity": similarity, "geneval": geneval}
    return config


def own_images(config):
    """Draw a group of 24 on each rank by 40 steps, and train on some of it, unguided."""
    config = batches(config, train_batch_size=24, group_size=24, num_batches=1)
    config.sample.num_steps = 40
    config.train.cfg = False
    return config
