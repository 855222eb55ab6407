#!/usr/bin/env bash
# A Slurm job of any run in this folder: each node calls the same main.sh, with its SLURM_NODEID as RANK.
#   sbatch --nodes=4 --gpus-per-node=8 scripts/multi_node/slurm.sh NAME [ARGUMENT ...]    NAME: sd3, flux, ...
# Name the run (--config.run_name=...): the job then goes on with it when it is requeued or started again.
# The time limit's SIGTERM comes 10 minutes early, to the launchers, so that the run is saved.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@600
#SBATCH --output=slurm-%x-%j.txt
set -euo pipefail
name="${1:?usage: sbatch --nodes=N scripts/multi_node/slurm.sh NAME [ARGUMENT ...]}"
cd "${SLURM_SUBMIT_DIR:-.}"
main="scripts/multi_node/$name/main.sh"
[[ -f "$main" ]] || { echo "there is no $main; submit from the project's folder" >&2; exit 2; }
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR NUM_NODES="$SLURM_JOB_NUM_NODES"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" # jobs of one node do not meet
exec srun --kill-on-bad-exit=0 bash -c 'exec bash "$0" "$SLURM_NODEID" "$@"' "$main" --config.resume_from=auto "${@:2}"
