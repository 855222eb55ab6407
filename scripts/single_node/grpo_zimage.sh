#!/usr/bin/env bash
# Train Z-Image or Z-Image-Turbo on one machine; the arguments are those of grpo.sh.
MODEL=zimage exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
