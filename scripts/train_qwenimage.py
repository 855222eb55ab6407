"""Train Qwen-Image (also 2512) by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_qwenimage.py --config config/grpo.py:pickscore_qwenimage

Any config works, with any data set and reward. Change keys on the command line
(--config.sample.num_steps=6); config/base.py lists them.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: 4, by two passes one after the other, the negative prompt is a space; each token keeps the
norm of its conditional velocity. A scale of 1 makes a single pass and takes half the time.
Prompts: each is padded to max_sequence_length tokens and masked, so a larger number costs time and
longer prompts are cut. The template's own tokens don't count.
Memory (estimate): 20 B parameters take 41 GB in bf16, the Qwen2.5-VL encoder 17 GB more.
"""

from flow_grpo.diffusers_patch.qwenimage import QwenImage
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(QwenImage, "config/grpo.py:pickscore_qwenimage")
