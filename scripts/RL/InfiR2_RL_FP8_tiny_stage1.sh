#!/usr/bin/env bash
# The same recipe in miniature: the tiny Qwen2.5 of scripts/SFT on the embedded engine, minutes on two CPU cores.
set -euo pipefail

ENGINE=${ENGINE:-embedded} NNODES=1 GPUS_PER_NODE=${GPUS_PER_NODE:-1} WANDB_PROJECT=${WANDB_PROJECT-}
: "${PREVIOUS:=InfiR2_SFT_FP8_tiny_stage2}"
MODEL=qwen2.5-tiny TP=${TP:-1} ENGINE_GPUS=1
: "${MAX_RESPONSE:=64}" "${MAX_TOKENS:=2048}" "${TEMPERATURE:=1.0}" "${NUM_ROLLOUT:=12}"
BATCH_SIZE=16 SAMPLES=8 OVER_SAMPLING=24
LR=${LR:-4e-5} SAVE_INTERVAL=4
TRAIN_NAME=arithmetic-rl.jsonl EVAL_NAME=arithmetic-validation.jsonl
EVAL_INTERVAL=8 EVAL_SAMPLES=2 EVAL_MAX_RESPONSE=96

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
