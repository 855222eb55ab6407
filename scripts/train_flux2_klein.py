"""Train FLUX.2 klein (4B, 9B), which draws and edits, by reinforcement learning.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_flux2_klein.py --config config/grpo.py:pickscore_flux2_klein

Any config of any data set and reward fits; a data set with reference pictures ("image": a path or a
list of paths in each row of {train,test}_metadata.jsonl) makes it an editor, for example
config/grpo.py:counting_flux2_klein. Keys are changed on the command line
(--config.sample.num_steps=6) and all of them are listed in config/base.py.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: base checkpoints make two passes a step above a scale of 1; the distilled ones, meant for
4 steps, ignore the scale and make one.
References: each is encoded at its own size, at most 1024 x 1024 pixels, with sides of at least 64
whose ratio is at most 8; every step carries the tokens of all of them. Rows that share a call need
equally many of equal sizes.
Memory (estimate): 4 B parameters take 8 GB in bf16, the Qwen3 encoder 8 GB more; 9 B: 18 + 16 GB.
"""

from flow_grpo.diffusers_patch.flux2_klein import Flux2Klein
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(Flux2Klein, "config/grpo.py:pickscore_flux2_klein")
