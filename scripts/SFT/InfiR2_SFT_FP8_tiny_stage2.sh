#!/usr/bin/env bash
# Stage 2 in miniature: the numbers of stage 1, from its weights, at half the learning rate.
set -euo pipefail

STAGE=stage2 PREVIOUS=InfiR2_SFT_FP8_tiny_stage1 LR=${LR:-5e-4}
source "$(dirname "${BASH_SOURCE[0]}")/InfiR2_SFT_FP8_tiny_stage1.sh"
