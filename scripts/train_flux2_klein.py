"""Train FLUX.2 klein (4B, 9B), which draws and edits, by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_flux2_klein.py --config config/grpo.py:pickscore_flux2_klein

Any config works, with any data set and reward. With reference images ("image": a path or a list of
paths in each row of {train,test}_metadata.jsonl) the model edits, for example
config/grpo.py:counting_flux2_klein. Change keys on the command line
(--config.sample.num_steps=6); config/base.py lists them.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: base checkpoints make two passes a step above a scale of 1; the distilled ones, meant for
4 steps, ignore the scale and make one.
References: each is encoded at its own size, at most 1024 x 1024 pixels, with sides of at least 64
whose ratio is at most 8; every step carries the tokens of all of them. Rows that share a call need
equally many references of equal sizes.
Memory (estimate): 4 B parameters take 8 GB in bf16, the Qwen3 encoder 8 GB more; 9 B: 18 + 16 GB.
"""

from flow_grpo.diffusers_patch.flux2_klein import Flux2Klein
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(Flux2Klein, "config/grpo.py:pickscore_flux2_klein")
