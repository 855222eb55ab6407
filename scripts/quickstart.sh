#!/usr/bin/env bash
# Set everything up, then let a tiny Stable Diffusion 3 learn to draw what it is asked for.
# On two CPU cores, without a GPU. Further arguments go to the training script, for example
#   bash scripts/quickstart.sh --config.seed=1
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev
export HF_HUB_OFFLINE=1
threads="$(python -c 'import os; print(os.cpu_count())')" # accelerate's own choice is 1
exec accelerate launch --config_file scripts/accelerate_configs/single.yaml \
    --num_cpu_threads_per_process "$threads" scripts/train_sd3.py --config config/testbed.py:shapes_sd3_quick "$@"
