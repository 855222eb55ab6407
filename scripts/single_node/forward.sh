#!/usr/bin/env bash
# Train SD3.5-M by a loss on its noised final images on one machine; the arguments are those of grpo.sh, with --config config/forward.py:RUN for another loss.
exec bash "$(dirname "${BASH_SOURCE[0]}")/grpo.sh" --config config/forward.py:nft_geneval_sd3 "$@"
