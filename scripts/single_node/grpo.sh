#!/usr/bin/env bash
# Train SD3.5-M on one machine. Further arguments go to the training script, for example
#   bash scripts/single_node/grpo.sh --config config/grpo.py:general_ocr_sd3_1gpu
# NUM_GPUS (default: all) and ACCELERATE_CONFIG change the launch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
num_gpus="${NUM_GPUS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
if [[ "$num_gpus" == 1 ]]; then default=single; else default=multi_gpu; fi
exec accelerate launch \
    --config_file "scripts/accelerate_configs/${ACCELERATE_CONFIG:-$default}.yaml" \
    --num_processes "$num_gpus" scripts/train_sd3.py "$@"
