#!/usr/bin/env bash
# Try this project on a machine with a GPU, in one command; docs/gpu.md says more.
#   bash scripts/benchmark/gpu.sh --wheels FOLDER                 with a network: fetch what such a machine may lack
#   bash scripts/benchmark/gpu.sh [--install FOLDER] [OPTION ...]  on it: install from there, then run all parts
# The options are those of gpu.py beside this file. PYTHON names the interpreter that has torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"

# For Python 3.12 on Linux x86_64, beside an installed torch, transformers and accelerate.
fetch() {
    "$python" -m pip download --quiet --dest "$folder" --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --only-binary=:all: "$@"
}

pinned() {
    grep -E "^($1)==" constraints.txt
}

wheels() {
    mkdir -p "$folder"
    rm -f "$folder"/*.whl # two versions of a package can't be installed together
    # shellcheck disable=SC2046
    fetch --no-deps $(pinned 'diffusers|peft|ml_collections|tenacity') hjson importlib_metadata zipp
    fetch pydantic
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$(pinned deepspeed)"
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels in $folder, $(du -sh "$folder" | cut -f1)"
}

install() {
    local site
    site="$(mktemp -d)"
    trap "rm -rf '$site'" EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$folder"/*.whl
    export PYTHONPATH="$site"
}

case "${1:-}" in
--wheels | --install)
    [[ -n "${2:-}" ]] || { echo "$1: a folder is needed" >&2 && exit 1; }
    what="${1#--}" folder="$(realpath -m "$2")"
    shift 2
    "$what"
    [[ "$what" == install ]] || exit 0
    ;;
esac
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" scripts/benchmark/gpu.py "$@"
