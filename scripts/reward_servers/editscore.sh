#!/usr/bin/env bash
# EditScore, by its authors' package: editscore.sh --set editscore_model=Qwen/Qwen3-VL-8B-Instruct --set editscore_lora=FOLDER [--device cuda:0] ...
# config.reward_urls={'editscore': ['http://127.0.0.1:18091']}; rows need one "image".
exec bash "$(dirname "${BASH_SOURCE[0]}")/serve.sh" editscore "editscore" --port 18091 "$@"
