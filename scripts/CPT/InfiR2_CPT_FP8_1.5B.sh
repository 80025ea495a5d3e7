#!/usr/bin/env bash
# Continual pre-training of Qwen2.5-1.5B in FP8 on 8 GPUs or more: the 7B recipe at tensor parallel 2.
set -euo pipefail

MODEL=qwen2.5-1.5B TP=${TP:-2} WANDB_PROJECT=${WANDB_PROJECT-qwen2.5_1.5b}
SEQ_LENGTH=32768 MICRO_BATCH_SIZE=1 GLOBAL_BATCH_SIZE=128     # 4.2M tokens per step
TRAIN_ITERS=40000 WARMUP_ITERS=5000 DECAY_ITERS=5000          # 21.0B + 125.8B + 21.0B tokens
LR=1e-4 MIN_LR=1e-5 INIT_STD=0.008
SAVE_INTERVAL=1000 EVAL_INTERVAL=100 EVAL_ITERS=10

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
