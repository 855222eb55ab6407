"""Train FLUX.1 Kontext, an image editor, by the loop of flow_grpo/training/loop.py.

    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml \\
        scripts/train_flux_kontext.py --config config/grpo.py:counting_flux_kontext

Any config works whose data set names one reference image per prompt: "image" in each row of
{train,test}_metadata.jsonl. Change keys on the command line (--config.sample.num_steps=6);
config/base.py lists them.
Precision: bf16 on a GPU; fp16 overflows and is refused. A CPU takes "no" or "bf16".
Guidance: 2.5, one of the transformer's inputs. There is no second pass, so a rollout costs the same
at any scale; the policy is trained at the scale that it samples with.
References: each is encoded at its own size, at most config.reference_area pixels (1024 x 1024), and
every step carries its tokens: a 1024 x 1024 reference makes a 512 x 512 image's sequence five
times as long. Rows that share a call need references of one size; the size generated is
config.resolution.
Memory: 12 B parameters take 24 GB in bf16, the T5 encoder 10 GB more.
"""

from flow_grpo.diffusers_patch.flux_kontext import FluxKontext
from flow_grpo.launch.entry import main

if __name__ == "__main__":
    main(FluxKontext, "config/grpo.py:counting_flux_kontext")
