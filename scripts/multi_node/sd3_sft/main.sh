#!/usr/bin/env bash
# SD3.5-M on the best of its own images on 6 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/sd3_sft/main.sh RANK
NUM_NODES="${NUM_NODES:-6}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" sd3 --config config/sft.py:pickscore_sd3 "${@:2}"
