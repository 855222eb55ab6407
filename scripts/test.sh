#!/usr/bin/env bash
# Set everything up and run the tests: those not marked slow, or with --all every one.
# Further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev,deepspeed,ocr,rewards,server
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # the cores are busy with other tests
selection=(-m "not slow")
if [[ "${1:-}" == "--all" ]]; then
    selection=()
    shift
fi
ruff check .
ruff format --check .
exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "${selection[@]}" "$@"
