#!/usr/bin/env bash
# Qwen-Image on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/qwenimage/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" qwenimage --config config/grpo.py:pickscore_qwenimage "${@:2}"
