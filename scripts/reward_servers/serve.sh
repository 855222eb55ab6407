#!/usr/bin/env bash
# Serve a reward from an environment of its own, made at the first call in .servers/NAME:
#     bash scripts/reward_servers/serve.sh NAME "PACKAGES" [options of flow_grpo.reward_server ...]
# PACKAGES: what pip installs beside the server's own few; this project's other requirements stay
# out, so that a reward may want another transformers than the trainer has.
set -euo pipefail
name="$1" packages="$2"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=".servers/$name"
server="fastapi uvicorn numpy pillow safetensors ml_collections absl-py requests tqdm"
if [[ "$(cat "$venv/.installed" 2>/dev/null)" != "$server $packages" ]]; then
    python3 -m venv "$venv"
    # shellcheck disable=SC2086 # several packages
    "$venv/bin/pip" install --quiet $server $packages
    echo "$server $packages" >"$venv/.installed"
fi
PYTHONPATH=".${EXTRA_PYTHONPATH:+:$EXTRA_PYTHONPATH}" exec "$venv/bin/python" -m flow_grpo.reward_server --reward "$name" "$@"
