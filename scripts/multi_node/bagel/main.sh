#!/usr/bin/env bash
# BAGEL, its whole generation expert, on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/bagel/main.sh RANK
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-deepspeed_zero2}" NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" bagel --config config/grpo.py:pickscore_bagel "${@:2}"
