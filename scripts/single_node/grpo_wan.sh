#!/usr/bin/env bash
# Train Wan2.1 or Wan2.2 TI2V 5B on one machine; the arguments are those of grpo.sh.
MODEL=wan2_1 exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" "$@"
