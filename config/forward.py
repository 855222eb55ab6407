"""Published runs of SD3.5-M by losses on its noised final images: ODE rollouts, no guidance.

All are LoRAs at 3e-4 unless they say otherwise, of 48 groups of 24 on 32 GPUs. What a paper's code
does besides, and what is left out here, stands in docs/papers.md.
"""

from config.base import select
from config.models import sd3
from config.recipes import geneval, ocr, pickscore


def get_config(name="nft_geneval_sd3"):
    return select(globals(), name)


def _unguided(objective, learn):
    """10 steps of DPM-Solver++ 2 without noise. learn: a recipe."""
    config = learn(sd3(objective=objective))
    config.sample.solver = "dpm2"
    config.sample.noise_level = 0.0
    config.sample.guidance_scale = config.sample.eval_guidance_scale = 1.0
    config.train.cfg = False
    return config


def nft_geneval_sd3():
    """DiffusionNFT learns to compose: beta 1, half of the old policy stays; KL 1e-4; 32 GPUs."""
    config = _unguided("nft", geneval)
    config.nft.num_times = 9  # of 10, as its code takes
    config.forward.levels = "distinct"
    return config


def nft_ocr_sd3():
    """DiffusionNFT learns to render text: beta .1 and a slow old policy; 32 GPUs."""
    config = _unguided("nft", ocr)
    config.nft.num_times = 9
    config.forward.levels = "distinct"
    config.nft.beta = 0.1
    config.nft.decay = "slow"
    return config


def _awm(learn, kl_beta):
    config = _unguided("awm", learn)  # ghuber to the power .25, clip 1
    config.sample.solver = "euler"
    config.sample.num_steps = 14
    config.forward.levels = "stratified"
    config.forward.kl_beta = kl_beta
    config.forward.ema_beta = 1.0
    return config


def awm_ocr_sd3():
    """AWM learns to render text: 6 levels an image; 32 GPUs."""
    return _awm(ocr, kl_beta=3e-3)


def awm_pickscore_sd3():
    """AWM learns what people prefer; 32 GPUs."""
    return _awm(pickscore, kl_beta=1e-4)


def vgrpo_geneval_sd3():
    """V-GRPO learns to compose: 4 levels, a clip of .03; 32 GPUs."""
    return _unguided("vgrpo", geneval)


def epg_geneval_sd3():
    """The plain gradient of the ELBO learns to compose. 32 GPUs. Our own settings."""
    config = _unguided("epg", geneval)
    config.forward.levels = "stratified"
    config.forward.levels_of = config.forward.noise_of = "group"
    return config


def ram_geneval_sd3():
    """RAM learns to compose: the reward times 50, lr 1e-4, as its README has it; 32 GPUs."""
    config = _unguided("ram", geneval)
    config.ram.scale = 50.0
    config.train.learning_rate = 1e-4
    return config


def crd_ocr_sd3():
    """CRD learns to render text: 20 noisings, KL .1 to the guided base; 32 GPUs."""
    config = _unguided("crd", ocr)
    config.forward.num_times = 20
    config.train.reference_guidance = 4.5
    return config


def _dgpo(learn, beta, kl_beta):
    config = _unguided("dgpo", learn)
    config.dgpo.beta = beta
    config.dgpo.clip_range = 1e-3  # without guidance
    config.dgpo.fast_from = 200  # the earliest of its runs
    config.forward.kl_beta = kl_beta
    return config


def dgpo_geneval_sd3():
    """DGPO learns to compose: beta 100, 4 levels that all images share; 32 GPUs."""
    return _dgpo(geneval, beta=100.0, kl_beta=0.02)


def dgpo_pickscore_sd3():
    """DGPO learns what people prefer: beta 10; 32 GPUs."""
    return _dgpo(pickscore, beta=10.0, kl_beta=1e-3)
