"""Train BAGEL-7B-MoT to draw from text, by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_bagel.py --config config/grpo.py:pickscore_bagel_lora

Any config works, with any data set and reward. Change keys on the command line
(--config.sample.num_steps=6); config/base.py lists them. docs/bagel.md says what to download.
Precision: bf16 on a GPU; fp16 is refused. A CPU takes "no" or "bf16".
Guidance: 4, by two passes one after the other, the second without any text; no picture's velocity
grows beyond its conditional one. A scale of 1 makes a single pass and takes half the time.
Steps: the authors count the points of their grid, one more than the steps.
What trains: the expert that draws, by a LoRA or wholly. The other one reads each prompt once, so
its weights may not be cut in parts: DDP and ZeRO-2 train it, ZeRO-3 and FSDP2 are refused.
Memory (estimate): 27 GB of weights in bf16, which a LoRA trains on one GPU of 80 GB, a full
fine-tune on eight of them.
"""

from flow_grpo.diffusers_patch.bagel.bagel import Bagel
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(Bagel, "config/grpo.py:pickscore_bagel_lora")
