"""Every key of a run, once: its default, meaning and unit, and the values that are allowed.

A run is a function that starts from base() and states what it changes. What an objective alone
reads stands with it, as in flow_grpo/objectives/ratio/terms.py.
"""

import inspect

import ml_collections

from flow_grpo import keys
from flow_grpo.cli import did_you_mean
from flow_grpo.keys import Key

STDS = ("group", "global", "none")
MANY = 10**9  # a bound for what may be as large as one likes

COMMON = {
    "run_name": Key("", "of the folder logdir/run_name; empty: the config's name and the time"),
    "project_name": Key("flow_grpo", "of wandb"),
    "logdir": Key("logs", is_path=True),
    "tracker": Key(
        "tensorboard",
        "wandb without a login runs offline",
        choices=("tensorboard", "wandb", "none"),
    ),
    "seed": Key(42, least=0, most=2**63 - 1),
    "num_epochs": Key(10_000, least=1, most=MANY),
    "save_freq": Key(20, "epochs; also after the last and on a signal", least=1, most=MANY),
    "eval_freq": Key(20, "epochs; also before the first and after the last", least=1, most=MANY),
    "eval_split": Key("test", "which file of the data set is evaluated", choices=("test", "dev")),
    "eval_max_samples": Key(0, "prompts; 0: all", least=0, most=MANY),
    "on_save_error": Key(
        "stop",
        "when a checkpoint can't be written; continue: the next one is tried",
        choices=("stop", "continue"),
    ),
    "collective_timeout": Key(
        300.0,
        "seconds that a rank waits for another one in the midst of a step",
        least=10,
        most=10**6,
    ),
    "num_checkpoint_limit": Key(5, "checkpoints kept; 0: all", least=0, most=MANY),
    "resume_from": Key(
        "",
        'a checkpoint\'s folder; "latest" of this run; "auto": the latest, if there is any',
        is_path=True,
    ),
    "pretrained.model": Key("", "a diffusers pipeline: a local folder or a hub id", is_path=True),
    "pretrained.revision": Key("main"),
    "dataset": Key(
        "", "a folder with {train,test}.txt or {train,test}_metadata.jsonl", is_path=True
    ),
    "objective": Key("grpo", "of objectives/registry.py, or one's own as module:Class"),
    # Rewards.
    "reward_fn": Key(
        {"jpeg_compressibility": 1.0},
        "a weight by name; 0: only logged",
        least=-1000,
        most=1000,
    ),
    "reward_aggregation": Key(
        "sum", "gdpo: normalised per reward, then added by weight", choices=("sum", "gdpo")
    ),
    "eval_reward_fn": Key((), "names of held-out rewards, scored in evaluations only", of=str),
    "hacking_alarm": Key(
        "none",
        "what to do when held-out rewards fall as the trained one rises",
        choices=("none", "warn", "stop"),
    ),
    "on_reward_error": Key(
        "stop", "stop: after saving; mask: the images leave their groups", choices=("stop", "mask")
    ),
    "max_masked_fraction": Key(
        0.5, "of an epoch's images; more without a score stop the run", least=0, below=1
    ),
    "reward_urls": Key({}, "{name: [url, ..]}, as {'pickscore': ['http://127.0.0.1:18085']}"),
    "reward_timeout": Key(
        600.0, "seconds of one call of a reward, with its retries", above=0, most=10**6
    ),
    "reward_token_file": Key("", "holds the servers' bearer token", is_path=True),
    "reward_encoding": Key(
        "raw",
        "to servers: raw is exact, jpeg is of quality 95",
        choices=("raw", "jpeg"),
    ),
    "ocr_engine": Key("rapidocr", "their scores differ", choices=("rapidocr", "paddleocr")),
    # What is drawn, and how the model computes.
    "resolution": Key(
        512, "pixels; height and width override it, and a prompt's size both", least=1, most=16_384
    ),
    "height": Key(None, "pixels; None: resolution", of=int, least=1, most=16_384),
    "width": Key(None, "pixels; None: resolution", of=int, least=1, most=16_384),
    "reference_area": Key(
        0,
        "pixels of a reference image as the model sees it; FLUX shrinks larger ones (0: to 1024 x "
        "1024), Qwen-Image-Edit scales each (0: to height x width; its stock pipelines: 1024 x "
        "1024)",
        least=0,
        most=16_384**2,
    ),
    "num_frames": Key(1, "of a video; for Wan a multiple of 4 plus 1", least=1, most=10_000),
    "max_sequence_length": Key(128, "tokens of the longest text encoder", least=1, most=100_000),
    "mixed_precision": Key("fp16", "fp16 needs a GPU", choices=("no", "bf16", "fp16")),
    "allow_tf32": Key(True),
    "use_lora": Key(True, "False: full fine-tune, fp32 weights"),
    "encoders": Key(
        "keep",
        "text encoders: on the device; on the CPU while images are drawn; gone, as each prompt is "
        "encoded once, to disk (if all of them are there, encoders are not even loaded)",
        choices=("keep", "offload", "precompute"),
    ),
    "encoder_cache": Key("", "the folder of precompute; empty: logdir/conditionings", is_path=True),
    "activation_checkpointing": Key(False),
    "compile": Key(False, "the transformer's blocks by torch.compile: slow at first, then faster"),
    "attention_backend": Key(
        "", "of diffusers, such as _native_cudnn or flash; empty: its own choice"
    ),
    "offload": Key(
        (),
        "what waits on the host, pinned, until it is asked for: snapshots, where they are no "
        "adapters (a full fine-tune, or an engine that cuts weights); an epoch's rollouts",
        of=str,
        choices=("snapshots", "rollouts"),
    ),
    "vae_tiling": Key(False, "decode an image in tiles, with faint seams"),
    "vae_slicing": Key(False, "decode one image after the other"),
    # Rollouts.
    "sample.source": Key(
        "model",
        "of the images that train: the model draws them; or the data set has them, chosen and "
        "rejected in each row (2 images a prompt), or picture (1)",
        choices=("model", "data"),
    ),
    "sample.solver": Key(
        "euler",
        "of steps that are not stochastic: dpm2 is DPM-Solver++ of order 2",
        choices=("euler", "dpm2"),
    ),
    "sample.merged_lora": Key(
        False,
        "roll out with the LoRA added to the weights: faster, rounded by their precision; for "
        "objectives on final images",
    ),
    "sample.num_steps": Key(10, least=2, most=1000),
    "sample.eval_num_steps": Key(40, least=1, most=1000),
    "sample.eval_sizes": Key(
        (),
        "HEIGHTxWIDTH[xFRAMES] at which evaluations draw, of which the alarm watches the first; "
        "empty: as training draws",
        of=str,
    ),
    "sample.guidance_scale": Key(4.5, "1: no guidance", least=0, most=100),
    "sample.eval_guidance_scale": Key(None, "None: guidance_scale", of=float, least=0, most=100),
    "sample.guidance_interval": Key(
        (0.0, 1.0),
        "of sigma, behind its start and up to its end: where guidance acts; for Bagel",
        least=0,
        most=1,
    ),
    "sample.batched_guidance": Key(
        False,
        "both passes of guidance as one of twice the rows, as SD3 and Z-Image always make them: "
        "for Bagel, Qwen-Image, Wan and FLUX.2 klein, whose stock pipelines make two; differs by "
        "rounding",
    ),
    "sample.train_batch_size": Key(8, "images a call on each rank", least=1, most=100_000),
    "sample.test_batch_size": Key(8, "images a call on each rank", least=1, most=100_000),
    "sample.num_image_per_prompt": Key(16, "the group's size", least=1, most=100_000),
    "sample.num_batches_per_epoch": Key(4, "calls an epoch on each rank", least=1, most=100_000),
    "sample.max_refills": Key(
        0,
        "times that further prompts are drawn in place of groups of equal scores; needs "
        "train.drop_equal_groups",
        least=0,
        most=100,
    ),
    "sample.noise_level": Key(
        0.7, "a of Flow-SDE, eta of CPS and Dance-SDE; 1 for linear", least=0, most=10
    ),
    "sample.sde_type": Key(
        "sde", "the kernel of a stochastic step", choices=("sde", "cps", "dance", "linear")
    ),
    "sample.clean_grid": Key(
        False,
        "sigmas shifted from 1, 1 - 1/N, ... 1/N, not the stock scheduler's: DanceGRPO's and "
        "MixGRPO's, and to .004 UniPC's of Wan",
    ),
    "sample.sde_window_size": Key(
        0, "trained steps from a random start; 0: all steps but the last", least=0, most=1000
    ),
    "sample.sde_window_range": Key(
        (0, 5), "steps [first, end) that a window may cover", least=0, most=1000
    ),
    "sample.sde_window": Key(
        "random",
        "which of these: consecutive ones from a random start; a random subset; consecutive ones "
        "that move on (MixGRPO); one, so that the groups cover the range evenly (Flash-GRPO)",
        choices=("random", "subset", "progressive", "stratified"),
    ),
    "sample.window_dwell": Key(25, "progressive: epochs at each place", least=1, most=MANY),
    "sample.window_stride": Key(1, "progressive: steps to the next place", least=1, most=1000),
    "sample.window_decay": Key(
        0.0, "progressive: the dwell falls by this rate a step", least=0, most=10
    ),
    "sample.window_decay_from": Key(0, "progressive: after this step", least=0, most=1000),
    "sample.window_rolls_back": Key(True, "progressive: begins again after the last place"),
    "sample.sde_steps": Key(
        (), "a fixed list of trained steps instead of a window", of=int, least=0, most=1000
    ),
    "sample.same_latent": Key(False, "one initial noise a group"),
    "sample.branching": Key(
        "none",
        "how a group's images share steps: none; shared_prefix (with same_latent, exact); trunk: "
        "they branch off one path at its first trained step; per_step: at one of them each "
        "(TempFlow-GRPO); strides: the same, each with two images (G2RPO); tree: all split at each "
        "(BranchGRPO)",
        choices=("none", "shared_prefix", "trunk", "per_step", "strides", "tree"),
    ),
    "sample.global_std": Key(True, "advantages: std of all rewards; False: of the group's"),
    "sample.advantage_std": Key(
        "", "instead of global_std; none: not divided (Dr.GRPO)", choices=("", *STDS)
    ),
    "sample.unbiased_std": Key(False, "of n scores divided by n - 1"),
    # Updates.
    "train.batch_size": Key(
        None,
        "images a micro-batch; None: sample.train_batch_size",
        of=int,
        least=1,
        most=100_000,
    ),
    "train.learning_rate": Key(3e-4, least=0, most=1),
    "train.lr_scheduler": Key(
        "constant", "over num_epochs", choices=("constant", "linear", "cosine")
    ),
    "train.lr_warmup_steps": Key(0, "optimizer steps", least=0, most=MANY),
    "train.use_8bit_adam": Key(False, "needs bitsandbytes"),
    "train.adam_beta1": Key(0.9, least=0, below=1),
    "train.adam_beta2": Key(0.999, least=0, below=1),
    "train.adam_weight_decay": Key(1e-4, least=0, most=10),
    "train.adam_epsilon": Key(1e-8, above=0, most=1),
    "train.hold_start": Key(
        False,
        "a full fine-tune: the host keeps each epoch's start, so that a signal among its updates "
        "loses nothing; a LoRA's is always kept",
    ),
    "train.gradient_accumulation_steps": Key(
        2, "micro-batches an optimizer step", least=1, most=MANY
    ),
    "train.max_grad_norm": Key(1.0, "0: no clipping", least=0, most=MANY),
    "train.max_nonfinite_updates": Key(
        5, "skipped updates in a row before the run stops", least=1, most=MANY
    ),
    "train.stacked_points": Key(
        1,
        "trained steps or noise levels of a micro-batch in one forward and one backward",
        least=1,
        most=1000,
    ),
    "train.num_inner_epochs": Key(1, "passes over an epoch's images", least=1, most=1000),
    "train.cfg": Key(True, "the trained velocity is guided as the rollout's; False: unguided"),
    "train.reference_guidance": Key(
        None,
        "guidance of the velocity that a KL or a loss compares with, the reference's; None: the "
        "trained one's",
        of=float,
        least=0,
        most=100,
    ),
    "train.adv_clip_max": Key(5.0, "of an advantage, either way", above=0, most=1000),
    "train.ema": Key(False),
    "train.ema_decay": Key(0.9, least=0, most=1),
    "train.ema_update_every": Key(8, "optimizer steps", least=1, most=MANY),
    "train.drop_equal_groups": Key(False, "groups whose scores are all equal cost no forward"),
    "train.best_and_worst": Key(
        0, "images of a group that train: so many of either end; 0: all", least=0, most=100_000
    ),
    "train.tree_depths": Key(
        0, "depths of a tree that train, from the first on; 0: all", least=0, most=1000
    ),
    "train.tree_dwell": Key(
        25, "epochs until these depths move on by one, to begin again", least=1, most=MANY
    ),
    "train.shuffle_advantages": Key(
        False, "a control: the reward is the same, its assignment random"
    ),
    "train.lora_path": Key("", "warm start", is_path=True),
    "train.lora_rank": Key(32, least=1, most=16_384),
    "train.lora_alpha": Key(64, least=1, most=16_384),
    "train.lora_targets": Key((), "module name suffixes; empty: the model's own choice", of=str),
    # Where rewards find what they need: a local path or, for models, a hub id.
    "rewards.clip": Key(
        "openai/clip-vit-large-patch14",
        "of clipscore, image_similarity, aesthetic and the colors of geneval",
        is_path=True,
    ),
    "rewards.dino": Key("facebook/dinov2-base", "of dino_diversity", is_path=True),
    "rewards.pickscore": Key("yuvalkirstain/PickScore_v1", is_path=True),
    "rewards.pickscore_processor": Key("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", is_path=True),
    "rewards.hpsv2": Key("", "HPS_v2.1_compressed.pt", is_path=True),
    "rewards.hpsv2_processor": Key("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", is_path=True),
    "rewards.hpsv3": Key("", "HPSv3.safetensors; empty: its package downloads it", is_path=True),
    "rewards.aesthetic_head": Key(
        "", "the MLP's file, sac+logos+ava1-l14-linearMSE.pth", is_path=True
    ),
    "rewards.siglip": Key("google/siglip-so400m-patch14-384", "of aesthetic_v2_5", is_path=True),
    "rewards.aesthetic_v2_5_head": Key(
        "", "the MLP's file, aesthetic_predictor_v2_5.pth", is_path=True
    ),
    "rewards.imagereward": Key("", "ImageReward.pt", is_path=True),
    "rewards.imagereward_tokenizer": Key("google-bert/bert-base-uncased", is_path=True),
    "rewards.geneval_detector": Key("facebook/mask2former-swin-small-coco-instance", is_path=True),
    "rewards.geneval_score": Key(
        "soft", "what is trained", choices=("soft", "strict", "official", "flow_grpo")
    ),
    "rewards.deqa": Key(
        "zhiyuanyou/DeQA-Score-Mix3", "runs the code that comes with it", is_path=True
    ),
    "rewards.deqa_revision": Key("", "the commit of the hub whose code runs, 40 digits"),
    "rewards.ocr_processes": Key(4, "of each rank", least=1, most=1000),
    "rewards.ocr_side": Key(
        384, "pixels to which rapidocr shrinks an image's longer side", least=32, most=16_384
    ),
    # OpenAI-style endpoints; a key, if one is needed, is read from FLOW_GRPO_JUDGE_KEY.
    "rewards.unifiedreward_url": Key("http://127.0.0.1:17140/v1"),
    "rewards.unifiedreward_model": Key("UnifiedReward-7b-v1.5"),
    "rewards.qwenvl_url": Key("http://127.0.0.1:17141/v1"),
    "rewards.qwenvl_model": Key("Qwen/Qwen2.5-VL-7B-Instruct"),
    # The judge of vqascore, soft_tifa, dpg, rubric and editing: a model of the process, or of an
    # endpoint that gives logprobs.
    "rewards.vlm": Key("", "a Qwen2-VL, 2.5-VL or 3-VL; empty: rewards.vlm_url", is_path=True),
    "rewards.vlm_revision": Key("main", "of rewards.vlm on the hub"),
    "rewards.vlm_batch_size": Key(8, "questions a call of rewards.vlm", least=1, most=10_000),
    "rewards.vlm_url": Key("http://127.0.0.1:17142/v1"),
    "rewards.vlm_model": Key("Qwen/Qwen3-VL-8B-Instruct", "its name at the endpoint"),
    "rewards.rubric": Key("", "a jsonl of questions, of the reward rubric", is_path=True),
    "rewards.judge_templates": Key(
        "", "a folder whose .txt files replace those of the same names", is_path=True
    ),
    "rewards.judge_concurrency": Key(16, "requests at a time", least=1, most=1000),
    "rewards.judge_timeout_s": Key(120.0, "of one answer, with retries", above=0, most=10**6),
}


def base(objective: str | None = "grpo") -> ml_collections.ConfigDict:
    """Return the defaults of an objective's run, locked: setting another key is an error.

    objective: see config.objective; None: the common keys alone, which needs no torch.
    """
    config = keys.build(COMMON)
    config.objective = ""
    return config if objective is None else with_objective(config, objective)


def with_objective(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """Set config.objective and add its keys. What the run has set already stays as it is.

    Other objectives' keys stay too. Raises ValueError if there is no such objective.
    """
    before, config.objective = of_objective(config), name
    for key, declared in of_objective(config).items():
        known, former = keys.has(config, key), before.get(key, declared)
        if not known or (former != declared and keys.get(config, key) == former.default):
            keys.put(config, key, declared)
    return config


def of_objective(config: ml_collections.ConfigDict) -> dict[str, Key]:
    """Return the keys that config.objective's class declares."""
    if not config.objective:
        return {}
    from flow_grpo.objectives.registry import find  # needs torch

    declared = find(config.objective).keys
    if clash := COMMON.keys() & declared:
        raise ValueError(
            f"config.objective={config.objective!r} declares {', '.join(sorted(clash))}, which "
            f"config/base.py has already. Give its own keys a section of their own."
        )
    return declared


def keys_of(config: ml_collections.ConfigDict) -> dict[str, Key]:
    """Return every key that a config's run reads, for keys.check()."""
    return COMMON | of_objective(config)


def runs_of(module: dict) -> list[str]:
    """List the runs of a config file, given its globals(): its own public functions."""
    own = {name: each for name, each in module.items() if inspect.isfunction(each)}
    own = [name for name, each in own.items() if each.__module__ == module["__name__"]]
    return [name for name in own if not name.startswith("_") and name != "get_config"]


def select(module: dict, name: str) -> ml_collections.ConfigDict:
    """Return the config of the run `name` of a config file, given its globals()."""
    known = runs_of(module)
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"--config: no run {name!r}; there are {', '.join(sorted(known))}.{hint}")
    return module[name]()
