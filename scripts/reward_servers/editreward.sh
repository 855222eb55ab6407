#!/usr/bin/env bash
# EditReward, which is no package of an index: clone github.com/TIGER-AI-Lab/EditReward, then
#     EDITREWARD=FOLDER editreward.sh --set editreward_config=FILE.yaml --set editreward_checkpoint=FOLDER [--device cuda:0] ...
# config.reward_urls={'editreward': ['http://127.0.0.1:18090']}; rows need one "image".
export EXTRA_PYTHONPATH="${EDITREWARD:?name the folder of your clone}"
packages="torch==2.5.1 torchvision==0.20.1 transformers==4.57.0 trl==0.8.6 accelerate peft datasets megfile sentencepiece fire omegaconf scipy"
exec bash "$(dirname "${BASH_SOURCE[0]}")/serve.sh" editreward "$packages" --port 18090 "$@"
