#!/usr/bin/env bash
# Wan2.1 1.3B on 2 machines, 6 GPUs of each; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/wan2_1/main.sh RANK
NUM_GPUS="${NUM_GPUS:-6}" NUM_NODES="${NUM_NODES:-2}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" wan2_1 --config config/grpo.py:general_ocr_wan2_1 "${@:2}"
