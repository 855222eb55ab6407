"""Train FLUX.1 (dev, or a fine-tune of it) by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_flux.py --config config/grpo.py:pickscore_flux

Any config works, with any data set and reward. Change keys on the command line
(--config.sample.num_steps=6); config/base.py lists them.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: 3.5, one of the transformer's inputs. There is no second pass, so a rollout costs the same
at any scale; the policy is trained at the scale that it samples with.
Memory: 12 B parameters take 24 GB in bf16, the T5 encoder 10 GB more.
"""

from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(Flux, "config/grpo.py:pickscore_flux")
