"""Train Z-Image or Z-Image-Turbo by reinforcement learning.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_zimage.py --config config/grpo.py:pickscore_zimage

Any config of any data set and reward fits; keys are changed on the command line
(--config.sample.num_steps=6) and all of them are listed in config/base.py.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: scale w gives c + w (c - u), so 4 is another model's 5, and 1 still guides: 0 means none.
Turbo wants 0 (config/grpo.py:pickscore_zimage_turbo) and then makes a single pass a step.
Prompts keep their own lengths, and a call's attention depends on the longest: where micro-batches
differ from the rollout's calls, train.old_log_prob=replay is needed, as for every model.
Memory (estimate): 6 B parameters take 12 GB in bf16, the Qwen3 encoder 8 GB more.
"""

from flow_grpo.diffusers_patch.zimage import ZImage
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(ZImage, "config/grpo.py:pickscore_zimage")
