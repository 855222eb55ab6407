"""Every key of a run, once, with its unit and default. A run states what it changes."""

import difflib

import ml_collections
from ml_collections.config_dict import placeholder


def base() -> ml_collections.ConfigDict:
    """Return the defaults, locked: setting a key that is not here is an error."""
    config = ml_collections.ConfigDict()

    # The run's folder is logdir/run_name; an empty name becomes the config's name and the time.
    config.run_name = ""
    config.project_name = "flow_grpo"
    config.logdir = "logs"
    config.tracker = "tensorboard"  # tensorboard | wandb (offline without a login) | none
    config.seed = 42
    config.num_epochs = 10_000
    config.save_freq = 20  # epochs; also after the last one and on SIGTERM or SIGINT
    config.eval_freq = 20  # epochs; also before the first and after the last one
    config.eval_split = "test"  # which file of the data set is evaluated: test | dev
    config.eval_max_samples = 0  # prompts; 0: all
    config.num_checkpoint_limit = 5  # checkpoints kept; 0: all
    config.resume_from = ""  # a checkpoint's folder | "latest" of this run | "auto": latest, if any

    config.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.model = ""  # a diffusers pipeline: local folder or hub id
    pretrained.revision = "main"

    config.dataset = ""  # folder with {train,test}.txt or {train,test}_metadata.jsonl
    config.reward_fn = ml_collections.ConfigDict({"jpeg_compressibility": 1.0})  # name: weight
    config.reward_aggregation = "sum"  # sum | gdpo: normalised per reward, then added by weight
    config.eval_reward_fn = ()  # names of held-out rewards, scored in evaluations only
    config.hacking_alarm = "none"  # none | warn | stop: held-out rewards fall as the trained rises
    config.on_reward_error = "stop"  # stop (after saving) | mask: the pictures leave their groups
    config.max_masked_fraction = 0.5  # of an epoch's pictures; more without a score stop the run
    # Rewards scored by HTTP: {name: [url, ..]}, for example
    # --config.reward_urls="{'pickscore': ['http://127.0.0.1:18085']}"
    config.reward_urls = ml_collections.ConfigDict()
    config.reward_timeout = 600.0  # seconds for a reward to score a call's pictures, with retries
    config.reward_token_file = ""  # holds the servers' bearer token
    config.reward_encoding = "raw"  # to servers: raw | png | webp (all exact) | jpeg (quality 95)
    config.ocr_engine = "rapidocr"  # rapidocr | paddleocr; their scores differ
    config.resolution = 512  # pixels, a square; height and width override it
    config.height = placeholder(int)
    config.width = placeholder(int)
    # Pixels of a reference picture as the model sees it: FLUX shrinks larger ones (0: to 1024 x
    # 1024), Qwen-Image-Edit scales each (0: to height x width; its stock pipelines: 1024 x 1024).
    config.reference_area = 0
    config.num_frames = 1  # of a video; for Wan a multiple of 4 plus 1
    config.max_sequence_length = 128  # tokens of the longest text encoder
    config.mixed_precision = "fp16"  # no | bf16 | fp16 (GPU only)
    config.allow_tf32 = True
    config.use_lora = True  # False: full fine-tune, fp32 weights
    # Text encoders: keep (on the device) | offload (to the CPU while pictures are drawn) |
    # precompute (each prompt once, to disk; once all are there, encoders are not even loaded).
    config.encoders = "keep"
    config.encoder_cache = ""  # precompute's folder; empty: logdir/conditionings
    config.activation_checkpointing = False
    config.attention_backend = ""  # of diffusers, such as _native_cudnn or flash; empty: its own
    config.vae_tiling = False  # decode a picture in tiles, with faint seams
    config.vae_slicing = False  # decode one picture after the other
    config.objective = "grpo"  # grpo | nft

    config.sample = sample = ml_collections.ConfigDict()
    sample.num_steps = 10
    sample.eval_num_steps = 40
    sample.guidance_scale = 4.5  # <= 1: one conditional pass
    sample.eval_guidance_scale = placeholder(float)  # None: guidance_scale
    # Both passes of guidance as one of twice the rows, as SD3 and Z-Image always make them: for
    # Qwen-Image, Wan and FLUX.2 klein, whose stock pipelines make two. It differs by rounding.
    sample.batched_guidance = False
    sample.train_batch_size = 8  # pictures a call on each rank
    sample.test_batch_size = 8
    sample.num_image_per_prompt = 16  # group size
    sample.num_batches_per_epoch = 4  # calls an epoch on each rank
    sample.noise_level = 0.7  # a of Flow-SDE, eta of CPS and Dance-SDE
    sample.sde_type = "sde"  # sde | cps | dance
    sample.sde_window_size = 0  # trained steps from a random start; 0: all steps but the last
    sample.sde_window_range = (0, 5)  # steps [first, end) that a window may cover
    sample.sde_steps = ()  # a fixed list of trained steps instead of a window
    sample.same_latent = False  # one initial noise a group
    sample.global_std = True  # advantages: std of all rewards; False: of the group's

    config.train = train = ml_collections.ConfigDict()
    train.batch_size = placeholder(int)  # pictures a micro-batch; None: sample.train_batch_size
    train.learning_rate = 3e-4
    train.lr_scheduler = "constant"  # constant | linear | cosine, over num_epochs
    train.lr_warmup_steps = 0  # optimizer steps
    train.use_8bit_adam = False  # needs bitsandbytes
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    train.gradient_accumulation_steps = 2  # micro-batches an optimizer step
    train.max_grad_norm = 1.0  # 0: no clipping
    train.max_nonfinite_updates = 5  # skipped updates in a row before the run stops
    train.num_inner_epochs = 1  # passes over an epoch's pictures
    train.cfg = True  # the trained velocity is guided as the rollout's; False: unguided
    train.adv_clip_max = 5.0
    train.clip_range = 1e-4  # epsilon, of the per-element mean log-ratio
    train.step_weight = "none"  # none | std: each step's loss times its std over the mean std
    train.old_log_prob = "rollout"  # rollout | replay: scored again before the first update
    train.gate_tolerance = 0.025  # with replay: relative error of the velocity at the start
    train.beta = 0.0  # KL coefficient
    train.kl_mode = "kl_dt"  # kl_dt | kl_true | x | v
    train.ema = False
    train.ema_decay = 0.9
    train.ema_update_every = 8  # optimizer steps
    train.shuffle_advantages = False  # a control: the reward is the same, its assignment random
    train.lora_path = ""  # warm start
    train.lora_rank = 32
    train.lora_alpha = 64
    train.lora_targets = ()  # module name suffixes; empty: the model's own choice

    config.nft = nft = ml_collections.ConfigDict()
    nft.beta = 1.0  # how far the implicit policies lie from the old one
    nft.kl_beta = 1e-4  # velocity-space KL to the reference
    nft.decay = "half"  # old policy: on_policy | half | slow (types 0, 1, 2 of the paper's code)
    nft.num_times = 4  # noise levels drawn for each picture
    nft.steps = ()  # instead: the levels of these steps of the rollout, for every picture

    # Where rewards find what they need: a local path or, for models, a hub id.
    config.rewards = rewards = ml_collections.ConfigDict()
    # of clipscore, image_similarity, aesthetic and the colors of geneval
    rewards.clip = "openai/clip-vit-large-patch14"
    rewards.pickscore = "yuvalkirstain/PickScore_v1"
    rewards.pickscore_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    rewards.hpsv2 = ""  # HPS_v2.1_compressed.pt
    rewards.hpsv2_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    rewards.hpsv3 = ""  # HPSv3.safetensors; empty: its package downloads it
    rewards.aesthetic_head = ""  # the MLP's file, sac+logos+ava1-l14-linearMSE.pth
    rewards.imagereward = ""  # ImageReward.pt
    rewards.imagereward_tokenizer = "google-bert/bert-base-uncased"
    rewards.geneval_detector = "facebook/mask2former-swin-small-coco-instance"
    rewards.geneval_score = "soft"  # what is trained: soft | strict | official | flow_grpo
    rewards.deqa = "zhiyuanyou/DeQA-Score-Mix3"  # runs the code that comes with it
    rewards.ocr_processes = 4  # of each rank
    rewards.ocr_side = 384  # pixels to which rapidocr shrinks a picture's longer side
    # OpenAI-style endpoints; a key, if one is needed, is read from FLOW_GRPO_JUDGE_KEY.
    rewards.unifiedreward_url = "http://127.0.0.1:17140/v1"
    rewards.unifiedreward_model = "UnifiedReward-7b-v1.5"
    rewards.qwenvl_url = "http://127.0.0.1:17141/v1"
    rewards.qwenvl_model = "Qwen/Qwen2.5-VL-7B-Instruct"
    rewards.judge_templates = ""  # a folder whose <reward>.txt replaces that of the reward
    rewards.judge_concurrency = 16  # requests at a time
    rewards.judge_timeout_s = 120.0  # of one answer, retries included

    config.lock()
    return config


def select(runs: dict, name: str) -> ml_collections.ConfigDict:
    """Return the config of the run `name` among a module's public functions."""
    known = {key: run for key, run in runs.items() if callable(run) and not key.startswith("_")}
    for helper in ("base", "select", "get_config"):
        known.pop(helper, None)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--config: no run {name!r}; there are {', '.join(sorted(known))}.{hint}")
    return known[name]()
