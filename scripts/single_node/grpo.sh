#!/usr/bin/env bash
# Train on one machine; arguments go to the training script, for example
#   bash scripts/single_node/grpo.sh --config config/grpo.py:geneval_sd3_fast_nocfg
# (without --config: the script's own run). MODEL (default: sd3) names scripts/train_MODEL.py; NUM_GPUS
# (default: all) and ACCELERATE_CONFIG, a name in scripts/accelerate_configs, change the launch.
# DRY_RUN=1 only prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds from SIGTERM to SIGKILL: an epoch is finished first
num_gpus="${NUM_GPUS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
if [[ "$num_gpus" == 1 ]]; then default=single; else default=multi_gpu; fi
command=(accelerate launch --config_file "scripts/accelerate_configs/${ACCELERATE_CONFIG:-$default}.yaml"
    --num_processes "$num_gpus" "scripts/train_${MODEL:-sd3}.py" "$@")
if [[ "${DRY_RUN:-}" == 1 ]]; then echo "${command[@]}"; else exec "${command[@]}"; fi
