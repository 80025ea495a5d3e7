#!/usr/bin/env bash
# Continual pre-training of Qwen2.5-0.5B in FP8 on 8 GPUs or more: the 1.5B recipe, context for tensor parallel.
# No recipe for this size was published: the numbers are those of the 1.5B; not tuned, nothing was trained with them.
set -euo pipefail

# TP 2 would cut 128-blocks. CP 2 also halves the logits of a GPU, 20 GB in float32 for 32768 tokens.
MODEL=qwen2.5-0.5B TP=${TP:-1} CP=${CP:-2} WANDB_PROJECT=${WANDB_PROJECT-qwen2.5_0.5b}

source "$(dirname "${BASH_SOURCE[0]}")/published.sh"
