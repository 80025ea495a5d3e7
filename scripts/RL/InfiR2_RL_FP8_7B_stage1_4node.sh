#!/usr/bin/env bash
# Reinforcement learning of Qwen2.5-7B, stage 1: responses of up to 8K tokens. Four nodes of 8 GPUs.
set -euo pipefail

: "${PREVIOUS:=InfiR2_SFT_FP8_7B_stage2}"
MODEL=qwen2.5-7B TP=${TP:-4} CP=${CP:-2} ENGINE_GPUS=4

source "$(dirname "${BASH_SOURCE[0]}")/published.sh"
