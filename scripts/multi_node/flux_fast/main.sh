#!/usr/bin/env bash
# FLUX.1-dev by Flow-GRPO-Fast on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/flux_fast/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" flux --config config/grpo.py:geneval_flux_fast "${@:2}"
