#!/usr/bin/env bash
# The same recipe in miniature: a 3.7M-parameter Qwen2.5 on the embedded engine, minutes on two CPU cores.
# It has no published weights: start it with --from-scratch, or with INIT_CHECKPOINT.
set -euo pipefail

ENGINE=${ENGINE:-embedded} MODEL=qwen2.5-tiny TP=${TP:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1}
WANDB_PROJECT=${WANDB_PROJECT-} INIT_CHECKPOINT=${INIT_CHECKPOINT-}
SEQ_LENGTH=128 MICRO_BATCH_SIZE=8 GLOBAL_BATCH_SIZE=8         # 1024 tokens per step
TRAIN_ITERS=600 WARMUP_ITERS=60 DECAY_ITERS=150               # 61K + 399K + 154K tokens
LR=1e-3 MIN_LR=1e-4 INIT_STD=0.02
SAVE_INTERVAL=150 EVAL_INTERVAL=100 EVAL_ITERS=5

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
