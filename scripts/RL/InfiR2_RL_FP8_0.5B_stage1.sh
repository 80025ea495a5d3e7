#!/usr/bin/env bash
# Reinforcement learning of Qwen2.5-0.5B, stage 1: responses of up to 8K tokens. One node of 8 GPUs.
# No recipe for this size was published: the numbers are those of the 7B; not tuned, nothing was trained with them.
set -euo pipefail

: "${PREVIOUS:=InfiR2_SFT_FP8_0.5B_stage2}" "${NNODES:=1}"
# The 7B's layout on a quarter of its GPUs: data parallel 4, micro batches of 2 x MAX_TOKENS, 8 engines.
MODEL=qwen2.5-0.5B TP=${TP:-1} CP=${CP:-2} ENGINE_GPUS=1

source "$(dirname "${BASH_SOURCE[0]}")/published.sh"
