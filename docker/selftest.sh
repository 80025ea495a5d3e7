#!/usr/bin/env bash
# Compare what is installed with docker/versions.env, import it, multiply two matrices in block FP8 if there is a GPU.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ${1-} == --help ]]; then
  cat <<'TEXT'
usage: bash docker/selftest.sh [--no-import] [--only NAME...]

Compares what is installed with docker/versions.env, imports it, and multiplies two matrices in block FP8 if there is a
GPU. Exit 1 with one line if something is wrong.

  --no-import   versions only, as at the end of the build, where there is no GPU
  --only NAME   these components only; an unknown NAME lists them

  PYTHON        the Python to look at (python3)
TEXT
  exit
fi
exec "${PYTHON:-python3}" "$HERE/selftest.py" "$@"
