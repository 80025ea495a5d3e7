#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-0.5B, stage 1: from the pre-trained weights of scripts/CPT. One node of 8 GPUs.
# No recipe for this size was published: the numbers are those of the 1.5B; not tuned, nothing was trained with them.
set -euo pipefail

: "${STAGE:=stage1}" "${PREVIOUS:=InfiR2_CPT_FP8_0.5B}" "${NNODES:=1}"
MODEL=qwen2.5-0.5B TP=${TP:-1} CP=${CP:-2}
NUM_EPOCH=5 BATCH_SIZE=64 MAX_TOKENS=16384                     # x CP tokens of a micro batch; one step per rollout
LR=5e-5 MIN_LR=5e-6 SAVE_INTERVAL=1000

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
