"""Train Stable Diffusion 3 or 3.5 by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/single.yaml \\
        scripts/train_sd3.py --config config/testbed.py:shapes_sd3

Any config works, with any data set and reward. Change keys on the command line
(--config.sample.num_steps=6); config/base.py lists them.
Precision: fp16 on a GPU keeps log-probs closer to fp32 than bf16 does; a CPU needs "no" or "bf16".
Guidance: classifier-free, both passes in one batch; runs without it (guidance_scale 1, train.cfg
False) take half the time.
"""

from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(SD3, "config/testbed.py:shapes_sd3")
