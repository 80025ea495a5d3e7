#!/usr/bin/env bash
# Set up .venv and run every check: ruff, shellcheck, hadolint, pytest.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly REPO
# shellcheck source=scripts/lib/cli.sh
source "${REPO}/scripts/lib/cli.sh"
# shellcheck source=scripts/lib/venv.sh
source "${REPO}/scripts/lib/venv.sh"

usage() {
  cat <<'TEXT'
usage: bash scripts/test.sh [arguments of pytest]
       bash scripts/test.sh --lint [FILE...]

Sets up .venv and runs every check: ruff, shellcheck, hadolint, pytest.

  bash scripts/test.sh                         everything
  bash scripts/test.sh -k contract             the tests whose names have this word, after the linters
  bash scripts/test.sh tests/tools -n 0        those of a folder, one at a time, in this process
  bash scripts/test.sh --lint                  the linters only; with FILEs: of these, as pre-commit does
  UPDATE_GOLDEN=1 bash scripts/test.sh -k golden   write the golden files anew; review the difference

Variables:
  PYTHON            the Python that .venv is made with (python3; 3.10 to 3.12)
  TORCH_INDEX_URL   package index of the torch build, e.g. https://download.pytorch.org/whl/cpu
  OMP_NUM_THREADS   threads of each test process (1)
TEXT
}

# lint FILE...: Python, shell and Docker files; all of the project's without any.
lint() {
  local file python=() shell=() image=()
  for file; do
    case "${file}" in
      *.py) python+=("${file}") ;;
      *.sh | .ci/*) shell+=("${file}") ;;
      */Dockerfile) image+=("${file}") ;;
    esac
  done
  if (($# == 0)); then
    python=(.) image=(docker/Dockerfile)
    mapfile -t shell < <(find scripts eval tests docker .ci -name '*.sh' -o -path '.ci/*' 2>/dev/null)
  fi
  ((${#python[@]} == 0)) || ruff check --force-exclude "${python[@]}"
  ((${#shell[@]} == 0)) || shellcheck -x "${shell[@]}"
  ((${#image[@]} == 0)) || hadolint "${image[@]}"
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
esac
ensure_venv requirements-dev.txt
cd "${REPO}"
export PATH="${VENV}/bin:${PATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two workers on two cores
if [[ ${1:-} == --lint ]]; then
  lint "${@:2}"
  exit
fi
lint
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
