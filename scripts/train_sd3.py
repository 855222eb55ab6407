"""Train Stable Diffusion 3 or 3.5 by reinforcement learning.

    accelerate launch --config_file scripts/accelerate_configs/single.yaml \\
        scripts/train_sd3.py --config config/testbed.py:shapes_sd3

Any config of any data set and reward fits; keys are changed on the command line
(--config.sample.num_steps=6) and all of them are listed in config/base.py.
Precision: fp16 on a GPU keeps log-probs closer to fp32 than bf16 does; a CPU needs "no" or "bf16".
Guidance: classic, both passes in one batch; runs without it (guidance_scale 1, train.cfg False)
take half the time.
"""

from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(SD3, "config/testbed.py:shapes_sd3")
