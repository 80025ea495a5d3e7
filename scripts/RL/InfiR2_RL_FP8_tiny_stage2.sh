#!/usr/bin/env bash
# Stage 2 in miniature: from stage 1, longer responses, hotter.
set -euo pipefail

PREVIOUS=InfiR2_RL_FP8_tiny_stage1
: "${MAX_RESPONSE:=96}" "${TEMPERATURE:=1.1}" "${NUM_ROLLOUT:=12}"
source "$(dirname "${BASH_SOURCE[0]}")/InfiR2_RL_FP8_tiny_stage1.sh"
