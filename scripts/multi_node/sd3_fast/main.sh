#!/usr/bin/env bash
# SD3.5-M by Flow-GRPO-Fast on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/sd3_fast/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" sd3 --config config/grpo.py:geneval_sd3_fast_nocfg "${@:2}"
