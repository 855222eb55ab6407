#!/usr/bin/env bash
# Train FLUX.2 klein on one machine; the arguments are those of grpo.sh.
MODEL=flux2_klein exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
