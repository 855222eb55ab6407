#!/usr/bin/env bash
# Train FLUX.1 on one machine; the arguments are those of grpo.sh.
MODEL=flux exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
