"""Published best-of-group fine-tunes of SD3.5-M (RAFT), and the same by raw rewards (RWR)."""

from config.base import select
from config.models import sd3
from config.recipes import geneval, own_images, pickscore


def get_config(name="pickscore_sd3"):
    return select(globals(), name)


def _sft(learn):
    """A noise level an image; the base samples. learn: a recipe."""
    config = own_images(learn(sd3(objective="sft")))
    config.train.beta = 100.0  # of the velocities' KL
    return config


def geneval_sd3():
    """Composition by the best of each group, offline: the base's images; 48 GPUs."""
    return _sft(geneval)


def geneval_sd3_online():
    """The same with a sampling copy that becomes the policy every 40 updates; 48 GPUs."""
    config = geneval_sd3()
    config.train.ref_update_step = 40
    return config


def pickscore_sd3():
    """What people prefer by the best of each group, offline: the base's images; 48 GPUs."""
    return _sft(pickscore)


def pickscore_sd3_online():
    """The same with a sampling copy that becomes the policy every 40 updates; 48 GPUs."""
    config = pickscore_sd3()
    config.train.ref_update_step = 40
    return config


def pickscore_sd3_rwr():
    """All images by their raw rewards instead; 48 GPUs. Our own settings: no published run."""
    config = pickscore_sd3_online()
    config.sft.weights = "reward"
    config.train.beta = 0.0
    return config
