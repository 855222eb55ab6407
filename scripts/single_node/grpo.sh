#!/usr/bin/env bash
# Train SD3 or SD3.5 on one machine; arguments go to the training script, for example
#   bash scripts/single_node/grpo.sh --config config/grpo.py:geneval_sd3_fast_nocfg
# (without --config: the testbed's run). NUM_GPUS (default: all) and ACCELERATE_CONFIG, a name in
# scripts/accelerate_configs, change the launch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds from SIGTERM to SIGKILL: an epoch is finished first
num_gpus="${NUM_GPUS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
if [[ "$num_gpus" == 1 ]]; then default=single; else default=multi_gpu; fi
exec accelerate launch \
    --config_file "scripts/accelerate_configs/${ACCELERATE_CONFIG:-$default}.yaml" \
    --num_processes "$num_gpus" scripts/train_sd3.py "$@"
