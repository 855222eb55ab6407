#!/usr/bin/env bash
# Train Qwen-Image-Edit on one machine; the arguments are those of grpo.sh.
MODEL=qwenimage_edit exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
