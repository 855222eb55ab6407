"""Published DPO runs of SD3.5-M: a rank draws a group, and trains its best against its worst."""

from config.base import select
from config.models import sd3
from config.recipes import geneval, own_images, pickscore


def get_config(name="pickscore_sd3"):
    return select(globals(), name)


def _dpo(learn):
    """39 noise levels a pair; the reference samples and stays as it is. learn: a recipe."""
    config = own_images(learn(sd3(objective="dpo")))  # beta 100
    config.dpo.num_times = 39  # 40 steps but the last
    return config


def geneval_sd3():
    """Composition by pairs, offline: the base's images; 48 GPUs, a group on each."""
    return _dpo(geneval)


def geneval_sd3_online():
    """The same with a reference that becomes the policy every 40 updates; 48 GPUs."""
    config = geneval_sd3()
    config.train.ref_update_step = 40
    return config


def pickscore_sd3():
    """What people prefer by pairs, offline: the base's images; 48 GPUs, a group on each."""
    return _dpo(pickscore)


def pickscore_sd3_online():
    """The same with a reference that becomes the policy every 40 updates; 48 GPUs."""
    config = pickscore_sd3()
    config.train.ref_update_step = 40
    return config
