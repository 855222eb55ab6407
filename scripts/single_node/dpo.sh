#!/usr/bin/env bash
# Train SD3.5-M by DPO on one machine; the arguments are those of grpo.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" --config config/dpo.py:pickscore_sd3 "$@"
