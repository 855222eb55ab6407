#!/usr/bin/env bash
# Train BAGEL on one machine; the arguments are those of grpo.sh.
MODEL=bagel exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
