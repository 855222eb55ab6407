#!/usr/bin/env bash
# Train SD3.5-M by GRPO-Guard on one machine; the arguments are those of grpo.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" --config config/grpo_guard.py:general_ocr_sd3_rationorm "$@"
