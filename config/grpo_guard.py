"""GRPO-Guard's published runs (arXiv:2510.22319) of SD3.5-M."""

from config.base import select
from config.models import sd3
from config.recipes import batches, geneval, ocr, pickscore


def get_config(name="general_ocr_sd3_rationorm"):
    return select(globals(), name)


def _guard(learn):
    """A ratio of one scale at all steps; a lower rate, advantages by the group's own spread."""
    config = learn(sd3(objective="grpo_guard"))  # clip_range 2e-6
    config = batches(config, train_batch_size=9, group_size=24, num_batches=8)
    config.sample.global_std = False
    config.train.learning_rate = 1e-4
    return config


def general_ocr_sd3_rationorm():
    """SD3.5-M learns to render text, PickScore logged beside it; 16 GPUs."""
    config = _guard(ocr)
    config.reward_fn = {"ocr": 1.0, "pickscore": 0.0}
    return config


def geneval_sd3_rationorm():
    """SD3.5-M learns to compose, PickScore logged beside it; 16 GPUs."""
    config = _guard(geneval)
    config.reward_fn = {"geneval": 1.0, "pickscore": 0.0}
    return config


def pickscore_hps_sd3_ratio_norm():
    """SD3.5-M learns what people prefer; 16 GPUs."""
    config = _guard(pickscore)
    config.train.clip_range = 4e-6
    return config
