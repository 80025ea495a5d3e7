#!/usr/bin/env bash
# Reinforcement learning of Qwen2.5-7B, stage 1: responses of up to 8K tokens. Four nodes of 8 GPUs.
set -euo pipefail

: "${PREVIOUS:=InfiR2_SFT_FP8_7B_stage2}"
MODEL=qwen2.5-7B TP=${TP:-4} CP=${CP:-2} ENGINE_GPUS=4
: "${MAX_RESPONSE:=8192}" "${MAX_TOKENS:=8192}" "${TEMPERATURE:=1.0}"
NUM_ROLLOUT=10240 BATCH_SIZE=128 SAMPLES=16 OVER_SAMPLING=384  # one step per rollout; 3 x 128 prompts drawn at a time
LR=1e-6 SAVE_INTERVAL=20
TRAIN_NAME=dapo-math-17k.jsonl EVAL_NAME=aime-2024.jsonl
EVAL_INTERVAL=20 EVAL_SAMPLES=16 EVAL_MAX_RESPONSE=30000

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
