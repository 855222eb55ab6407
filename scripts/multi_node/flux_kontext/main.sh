#!/usr/bin/env bash
# FLUX.1 Kontext on 4 machines, 7 GPUs of each; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/flux_kontext/main.sh RANK
NUM_GPUS="${NUM_GPUS:-7}" NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" flux_kontext --config config/grpo.py:counting_flux_kontext "${@:2}"
