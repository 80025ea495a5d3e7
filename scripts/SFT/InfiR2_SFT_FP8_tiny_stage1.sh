#!/usr/bin/env bash
# The same recipe in miniature: the tiny Qwen2.5 of scripts/CPT on the embedded engine, minutes on two CPU cores.
set -euo pipefail

ENGINE=${ENGINE:-embedded} NNODES=1 GPUS_PER_NODE=${GPUS_PER_NODE:-1} WANDB_PROJECT=${WANDB_PROJECT-}
: "${STAGE:=stage1}" "${PREVIOUS:=InfiR2_CPT_FP8_tiny}"
MODEL=qwen2.5-tiny TP=${TP:-1}
NUM_EPOCH=${NUM_EPOCH:-1} BATCH_SIZE=16 MAX_TOKENS=2048
LR=${LR:-1e-3} MIN_LR=${MIN_LR:-1e-4} SAVE_INTERVAL=50

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
