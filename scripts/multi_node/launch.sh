#!/usr/bin/env bash
# Start one machine's share of a run; the same command on every machine, with its own RANK:
#   MASTER_ADDR=10.0.0.1 NUM_NODES=4 bash scripts/multi_node/launch.sh RANK MODEL [ARGUMENT ...]
# RANK: 0 on the machine whose address is MASTER_ADDR, then 1, 2, ... MODEL names scripts/train_MODEL.py.
# NUM_GPUS (default: all): of each machine, equal on all. MASTER_PORT (default: 29500).
# ACCELERATE_CONFIG (default: multi_gpu): a name in scripts/accelerate_configs. DRY_RUN=1 only prints.
# Every machine needs the code, the model and the data at the same paths, and one logs folder: rank 0
# writes the run, and the shards of DeepSpeed and FSDP2 are written by all.
set -euo pipefail
usage="usage: MASTER_ADDR=HOST NUM_NODES=N bash scripts/multi_node/launch.sh RANK MODEL [ARGUMENT ...]"
rank="${1:?$usage}" script="scripts/train_${2:?$usage}.py"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${MASTER_ADDR:?$usage}" "${NUM_NODES:?$usage}"
if [[ ! "$rank" =~ ^[0-9]+$ ]] || ((rank >= NUM_NODES)); then
    echo "RANK=$rank: a number from 0 to $((NUM_NODES - 1)) is needed, as NUM_NODES is $NUM_NODES" >&2
    exit 2
fi
[[ -f "$script" ]] || { echo "there is no $script" >&2; exit 2; }
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds from SIGTERM to SIGKILL: an epoch is finished first
num_gpus="${NUM_GPUS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
config="${ACCELERATE_CONFIG:-multi_gpu}" more=()
if [[ "$config" == deepspeed* ]]; then more=(--deepspeed_multinode_launcher standard); fi # not pdsh
command=(accelerate launch --config_file "scripts/accelerate_configs/$config.yaml"
    --num_machines "$NUM_NODES" --machine_rank "$rank" --num_processes "$((NUM_NODES * num_gpus))"
    --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}"
    "${more[@]}" "$script" "$@")
if [[ "${DRY_RUN:-}" == 1 ]]; then echo "${command[@]}"; else exec "${command[@]}"; fi
