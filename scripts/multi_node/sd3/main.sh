#!/usr/bin/env bash
# SD3.5-M on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/sd3/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" sd3 --config config/grpo.py:general_ocr_sd3 "${@:2}"
