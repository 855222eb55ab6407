#!/usr/bin/env bash
# SD3.5-M by a loss on its noised final images on 4 machines of 8 GPUs; see launch.sh. On each: MASTER_ADDR=HOST bash scripts/multi_node/sd3_forward/main.sh RANK
NUM_NODES="${NUM_NODES:-4}" exec bash "$(dirname "$0")/../launch.sh" "${1:?RANK}" sd3 --config config/forward.py:nft_geneval_sd3 "${@:2}"
