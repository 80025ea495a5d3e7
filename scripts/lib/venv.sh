# shellcheck shell=bash
# The project's Python environment, .venv in the repository root (VENV_NAME: another one). Sourced after REPO is set.

readonly VENV="${REPO}/${VENV_NAME:=.venv}"

# require_python PROGRAM: a Python that the pins resolve on, with venv.
require_python() {
  local version
  command -v "$1" >/dev/null || die "${1}: not found; install Python 3.10, 3.11 or 3.12, or set PYTHON"
  version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || die "${1}: does not run"
  case "${version}" in
    3.10 | 3.11 | 3.12) ;;
    *) die "${1}: expected Python 3.10, 3.11 or 3.12, found ${version}; set PYTHON" ;;
  esac
  "$1" -c 'import ensurepip, venv' 2>/dev/null \
    || die "${1}: has no venv module; on Debian and Ubuntu: apt-get install python${version}-venv"
}

# stamp_venv REQUIREMENTS_FILE: the path of its stamp, and the checksum that the stamp of a complete installation holds.
stamp_venv() {
  STAMP="${VENV}/.${1//\//_}.installed"
  CHECKSUM="$(cd "${REPO}" && cat requirements.txt "$1" | cksum)"
}

# venv_ready REQUIREMENTS_FILE: is all of it installed?
venv_ready() {
  stamp_venv "$1"
  [[ -f ${STAMP} && $(<"${STAMP}") == "${CHECKSUM}" ]]
}

# ensure_venv REQUIREMENTS_FILE: .venv holds what the file pins (requirements-dev.txt includes requirements.txt). The
# stamp makes the next call immediate; an environment without any was cut off while it was made, and is made anew.
ensure_venv() {
  local requirements="$1" torch
  venv_ready "${requirements}" && return
  local python="${PYTHON:-python3}"
  require_python "${python}"
  if ! compgen -G "${VENV}/.*.installed" >/dev/null; then
    echo "creating ${VENV} with $("${python}" --version)"
    "${python}" -m venv --clear "${VENV}"
  fi
  rm -f "${STAMP}"
  local pip=("${VENV}/bin/python" -m pip install --disable-pip-version-check --quiet)
  if [[ -n ${TORCH_INDEX_URL:-} ]]; then
    torch="$(grep '^torch==' "${REPO}/requirements.txt")"
    "${pip[@]}" --index-url "${TORCH_INDEX_URL}" "${torch%% *}"
  fi
  echo "installing $(basename "${requirements}") into ${VENV_NAME}; the first time takes minutes"
  "${pip[@]}" -r "${REPO}/${requirements}"
  [[ ${requirements} == */* ]] || set -- requirements.txt "$1"  # requirements-dev.txt includes it
  for requirements; do
    stamp_venv "${requirements}"
    echo "${CHECKSUM}" >"${STAMP}"
  done
}
