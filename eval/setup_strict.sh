#!/usr/bin/env bash
# Make .venv-strict: the evalscope release that scores as the paper did, which does not fit beside the current one.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib/cli.sh"
VENV_NAME=.venv-strict
source "$REPO/scripts/lib/venv.sh"

if [[ ${1:-} == --help ]]; then
  printf 'usage: bash eval/setup_strict.sh\n\n'
  sed -n '2s/^# //p' "${BASH_SOURCE[0]}"
  printf 'Then EVALSCOPE=0.17.1 before eval/*_eval.sh uses it. PYTHON and TORCH_INDEX_URL as for scripts/quickstart.sh.\n'
  exit
fi
ensure_venv eval/requirements-strict.txt
