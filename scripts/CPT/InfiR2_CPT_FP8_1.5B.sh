#!/usr/bin/env bash
# Continual pre-training of Qwen2.5-1.5B in FP8 on 8 GPUs or more: the 7B recipe at tensor parallel 2.
set -euo pipefail

MODEL=qwen2.5-1.5B TP=${TP:-2} WANDB_PROJECT=${WANDB_PROJECT-qwen2.5_1.5b}

source "$(dirname "${BASH_SOURCE[0]}")/published.sh"
