#!/usr/bin/env bash
# FLUX.2 klein on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/flux2_klein/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" flux2_klein --config config/grpo.py:pickscore_flux2_klein "${@:2}"
