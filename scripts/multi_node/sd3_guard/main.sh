#!/usr/bin/env bash
# SD3.5-M by GRPO-Guard on 2 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/sd3_guard/main.sh RANK
NUM_NODES="${NUM_NODES:-2}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" sd3 --config config/grpo_guard.py:general_ocr_sd3_rationorm "${@:2}"
