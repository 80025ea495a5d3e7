#!/usr/bin/env bash
# Set up .venv and run every check: ruff, shellcheck, pytest.
#   bash scripts/test.sh              everything
#   bash scripts/test.sh -k contract  further arguments go to pytest; -n 0: one test at a time, in this process
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly REPO
# shellcheck source=scripts/lib/cli.sh
source "${REPO}/scripts/lib/cli.sh"
# shellcheck source=scripts/lib/venv.sh
source "${REPO}/scripts/lib/venv.sh"

if [[ ${1:-} == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
ensure_venv requirements-dev.txt
cd "${REPO}"
export PATH="${VENV}/bin:${PATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two workers on two cores
ruff check .
find scripts eval tests .ci -name '*.sh' -print0 | xargs -0 shellcheck -x
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
