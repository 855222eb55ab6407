#!/usr/bin/env bash
# DeQA-Score, whose code wants an old transformers: deqa.sh [--set deqa=/models/DeQA-Score-Mix3, or --set deqa_revision=COMMIT] [--device cuda:0] ...
packages="torch==2.1.2 torchvision==0.16.2 transformers==4.36.1 accelerate==0.26.1 numpy<2 sentencepiece icecream einops"
exec bash "$(dirname "${BASH_SOURCE[0]}")/serve.sh" deqa "$packages" --port 18086 "$@"
