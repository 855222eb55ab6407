#!/usr/bin/env bash
# Train FLUX.1 Kontext on one machine; the arguments are those of grpo.sh.
MODEL=flux_kontext exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
