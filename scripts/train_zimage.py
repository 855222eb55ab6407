"""Train Z-Image or Z-Image-Turbo by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_zimage.py --config config/grpo.py:pickscore_zimage

Any config works, with any data set and reward. Change keys on the command line
(--config.sample.num_steps=6); config/base.py lists them.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: scale w gives c + w (c - u), so 4 is 5 in other models, and 1 still guides: 0 means none.
Turbo needs 0 (config/grpo.py:pickscore_zimage_turbo) and then makes a single pass per step.
Prompts keep their own lengths, and a call's attention depends on the longest: where micro-batches
differ from the rollout's calls, train.old_log_prob=replay is needed, as for every model.
Memory (estimate): 6 B parameters take 12 GB in bf16, the Qwen3 encoder 8 GB more.
"""

from flow_grpo.diffusers_patch.zimage import ZImage
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(ZImage, "config/grpo.py:pickscore_zimage")
