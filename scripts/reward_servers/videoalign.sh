#!/usr/bin/env bash
# VideoAlign's VideoReward, which is no package of an index: clone github.com/KwaiVGI/VideoAlign, then
#     VIDEOALIGN=FOLDER videoalign.sh --set videoalign=CHECKPOINTS [--set videoalign_fps=16] [--device cuda:0] ...
# config.reward_urls={'videoalign': ['http://127.0.0.1:18092']}
export EXTRA_PYTHONPATH="${VIDEOALIGN:?name the folder of your clone}"
packages="torch torchvision transformers==4.45.2 accelerate peft==0.10.0 trl==0.8.6 datasets pandas fire imageio[ffmpeg] decord"
exec bash "$(dirname "${BASH_SOURCE[0]}")/serve.sh" videoalign "$packages" --port 18092 "$@"
