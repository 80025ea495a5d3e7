#!/usr/bin/env bash
# The decay phase on its own: DECAY_ITERS from any checkpoint of the stable phase (--load .../iter_0035000),
# with that run's optimizer, data position and all the numbers of the full recipe.
set -euo pipefail

STAGE=decay
source "$(dirname "${BASH_SOURCE[0]}")/InfiR2_CPT_FP8_0.5B.sh"
