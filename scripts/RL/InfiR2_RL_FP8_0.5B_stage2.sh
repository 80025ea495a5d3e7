#!/usr/bin/env bash
# Reinforcement learning of Qwen2.5-0.5B, stage 2: from stage 1, responses of up to 16K tokens, hotter.
set -euo pipefail

PREVIOUS=InfiR2_RL_FP8_0.5B_stage1
MAX_RESPONSE=16384 MAX_TOKENS=16384 TEMPERATURE=1.1
source "$(dirname "${BASH_SOURCE[0]}")/InfiR2_RL_FP8_0.5B_stage1.sh"
