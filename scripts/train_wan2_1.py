"""Train Wan2.1 T2V (1.3B, 14B) or Wan2.2 TI2V 5B (video) by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/multi_gpu.yaml \\
        scripts/train_wan2_1.py --config config/grpo.py:general_ocr_wan2_1

Any config works, with any data set and a reward that takes videos, uint8 (F, H, W, 3).
config.num_frames is a multiple of 4 plus 1; 1 trains on single images. Change keys on the
command line (--config.sample.num_steps=6); config/base.py lists them.
Sampler: Euler steps with the checkpoint's shift, not the UniPC of the released folders. To see what
a trained model draws here, give a stock pipeline FlowMatchEulerDiscreteScheduler(shift=flow_shift).
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: two passes a step above a scale of 1, both with a gradient. Wan2.2 A14B is refused: it has
two transformers.
Memory (estimate): 1.3 B parameters take 3 GB in bf16, the UMT5 encoder 11 GB; the
activations of a video of 33 frames at 240 x 416 take far more, so activation_checkpointing is on.
"""

from flow_grpo.diffusers_patch.wan import Wan
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(Wan, "config/grpo.py:general_ocr_wan2_1")
