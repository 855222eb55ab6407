#!/usr/bin/env bash
# Train SD3.5-M on the best of its own images on one machine; the arguments are those of grpo.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" --config config/sft.py:pickscore_sd3 "$@"
