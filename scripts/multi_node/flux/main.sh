#!/usr/bin/env bash
# FLUX.1-dev on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/flux/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" flux --config config/grpo.py:pickscore_flux "${@:2}"
