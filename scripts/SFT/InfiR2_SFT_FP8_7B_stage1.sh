#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-7B, stage 1: from the pre-trained weights of scripts/CPT. Two nodes of 8 GPUs.
set -euo pipefail

: "${STAGE:=stage1}" "${PREVIOUS:=InfiR2_CPT_FP8_7B}"
MODEL=qwen2.5-7B TP=${TP:-4}
NUM_EPOCH=5 BATCH_SIZE=64 MAX_TOKENS=32768                     # tokens of a micro batch; one step per rollout
LR=2e-5 MIN_LR=2e-6 SAVE_INTERVAL=1000

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
