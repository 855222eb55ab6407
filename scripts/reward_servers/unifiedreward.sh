#!/usr/bin/env bash
# UnifiedReward's model behind sglang, where config.rewards.unifiedreward_url looks for it; no reward_server,
# as the questions are asked by the training process: [MODEL=/models/UnifiedReward] unifiedreward.sh [--tp 2 ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=.servers/sglang
[[ -x "$venv/bin/python" ]] || python3 -m venv "$venv"
[[ -f "$venv/.installed" ]] || { "$venv/bin/pip" install --quiet "sglang[all]" && touch "$venv/.installed"; }
exec "$venv/bin/python" -m sglang.launch_server --model-path "${MODEL:-CodeGoat24/UnifiedReward-7b-v1.5}" \
    --served-model-name UnifiedReward-7b-v1.5 --chat-template chatml-llava --host 127.0.0.1 --port 17140 "$@"
