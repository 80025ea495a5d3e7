#!/usr/bin/env bash
# Continual pre-training of Qwen2.5-7B in FP8 on 8 GPUs or more: warm-up, stable and decay phase in one run.
set -euo pipefail

MODEL=qwen2.5-7B TP=${TP:-4} WANDB_PROJECT=${WANDB_PROJECT-qwen2.5_7b}

source "$(dirname "${BASH_SOURCE[0]}")/published.sh"
