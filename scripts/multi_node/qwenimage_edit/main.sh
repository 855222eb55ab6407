#!/usr/bin/env bash
# Qwen-Image-Edit on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/qwenimage_edit/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" qwenimage_edit --config config/grpo.py:counting_qwenimage_edit "${@:2}"
