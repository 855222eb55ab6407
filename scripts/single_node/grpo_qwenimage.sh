#!/usr/bin/env bash
# Train Qwen-Image on one machine; the arguments are those of grpo.sh.
MODEL=qwenimage exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
