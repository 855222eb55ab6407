# Sourced by quickstart.sh and test.sh with a list of extras: a Python environment with all they need.
# Inside a virtual or conda environment that one is used, else .venv is made. An installed torch is
# never replaced; without one, and without a GPU, the CPU build is taken where it can be had.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" ]]; then
    [[ -x .venv/bin/python ]] || python3 -m venv .venv
    source .venv/bin/activate
fi

install_torch() {
    local wanted cpu_index=https://download.pytorch.org/whl/cpu
    wanted="$(grep '^torch==' constraints.txt)"
    if ! command -v nvidia-smi >/dev/null &&
        python -m pip install --quiet --retries 0 --timeout 10 --index-url "$cpu_index" "$wanted" 2>/dev/null; then
        return
    fi
    python -m pip install --quiet "$wanted"
}

stamp="$(python -c 'import sys; print(sys.prefix)')/.flow_grpo_installed_$1"
if [[ ! -f "$stamp" || setup.py -nt "$stamp" || constraints.txt -nt "$stamp" ]]; then
    echo "installing (some minutes the first time)"
    python -c 'import torch' 2>/dev/null || install_torch
    # No constraint on torch, which is there: a pin must not replace another version.
    constraints="$(mktemp)"
    grep -v '^torch==' constraints.txt >"$constraints"
    python -m pip install --quiet --constraint "$constraints" setuptools wheel ninja
    DS_BUILD_OPS=0 python -m pip install --quiet --no-build-isolation --constraint "$constraints" \
        --editable ".[$1]"
    touch "$stamp"
fi
