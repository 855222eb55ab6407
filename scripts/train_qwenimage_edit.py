"""Train Qwen-Image-Edit (also 2509, 2511) by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_qwenimage_edit.py --config config/grpo.py:counting_qwenimage_edit

Any config works whose data set names reference images: "image", a path or a list of paths, in each
row of {train,test}_metadata.jsonl. Qwen-Image-Edit takes exactly one, 2509 and 2511 one or several;
the checkpoint decides. Change keys on the command line (--config.sample.num_steps=6);
config/base.py lists them.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: 4, by two passes one after the other; the negative, a space, sees the references too. Each
token keeps the norm of its conditional velocity. A scale of 1 takes half the time.
References: each is scaled to config.reference_area pixels, by default the generated image's, and
every step carries its tokens. The stock pipelines scale to 1024 x 1024 pixels: set 1048576 for
that; a 512 x 512 image's sequence is then two and a half times as long. Rows that share a call
need equally many references of equal sizes.
Prompts: each is padded to max_sequence_length tokens and masked; its images' tokens do not count.
Memory (estimate): 20 B parameters take 41 GB in bf16, the Qwen2.5-VL encoder 17 GB more.
"""

from flow_grpo.diffusers_patch.qwenimage_edit import QwenImageEdit
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(QwenImageEdit, "config/grpo.py:counting_qwenimage_edit")
