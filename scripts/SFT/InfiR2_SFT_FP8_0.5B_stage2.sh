#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-0.5B, stage 2: the numbers of stage 1, from its weights, on the harder data.
set -euo pipefail

STAGE=stage2 PREVIOUS=InfiR2_SFT_FP8_0.5B_stage1
source "$(dirname "${BASH_SOURCE[0]}")/InfiR2_SFT_FP8_0.5B_stage1.sh"
