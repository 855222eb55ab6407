#!/usr/bin/env bash
# Z-Image on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/zimage/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" zimage --config config/grpo.py:pickscore_zimage "${@:2}"
