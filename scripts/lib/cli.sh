# shellcheck shell=bash disable=SC2034
# Messages, the launcher's own options, and look-ups in an argument list.

warn() { printf 'warning: %s\n' "$*" >&2; }

die() { printf 'error: %s\n' "$*" >&2 && exit 1; }

# What this machine lacks stops a real launch; a dry run only names it.
missing() { if ((DRY_RUN)); then warn "$@"; else die "$@"; fi; }

# absolute PATH: no trailing slashes, links kept.
absolute() {
  local path=$1
  while [[ $path == ?*/ ]]; do path=${path%/}; done
  [[ $path == /* ]] || path=$PWD/$path
  printf '%s\n' "$path"
}

# name_run: RUN_NAME and OUT_DIR, from the name of the recipe.
name_run() {
  RUN_NAME=$(basename "$0" .sh)
  [[ $PRECISION != bf16 ]] || RUN_NAME=${RUN_NAME/FP8/BF16}
  OUT_DIR=$(absolute "${OUT_DIR:-$REPO/exp/$RUN_NAME}")
}

# default_python: PYTHON is the project's own environment where there is one.
default_python() {
  [[ -z ${PYTHON-} ]] || return 0
  PYTHON=$REPO/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
}

# last_value FLAG DEFAULT ARG...: what argparse keeps, from the last `--flag v` or `--flag=v`.
last_value() {
  local flag=$1 value=$2 previous='' arg
  shift 2
  for arg; do
    [[ $previous != "$flag" ]] || value=$arg
    [[ $arg != "$flag="* ]] || value=${arg#*=}
    previous=$arg
  done
  printf '%s\n' "$value"
}

# passed FLAG: is it among the flags passed through?
passed() {
  local arg
  for arg in "${EXTRA_ARGS[@]}"; do [[ ${arg%%=*} != "$1" ]] || return 0; done
  return 1
}

# override VARIABLE FLAG: a passed-through flag replaces the recipe's number everywhere: in the header, the state and
# the success check.
override() { printf -v "$1" '%s' "$(last_value "$2" "${!1-}" "${EXTRA_ARGS[@]}")"; }

OWN_FLAGS=() OWN_SWITCHES=()

# parse_cli ARG...: the options in OWN_FLAGS take a value and become variables (--load: LOAD), those in OWN_SWITCHES
# become 0 or 1; what is not the script's own goes to EXTRA_ARGS.
parse_cli() {
  local name
  DRY_RUN=0 EXTRA_ARGS=()
  for name in "${OWN_SWITCHES[@]#--}"; do name=${name//-/_} && printf -v "${name^^}" 0; done
  while (($#)); do
    name=${1#--} name=${name%%=*} name=${name//-/_}
    if [[ " ${OWN_FLAGS[*]} " == *" ${1%%=*} "* ]]; then
      [[ $1 != *=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
      [[ -n ${2-} && $2 != --* ]] || die "$1: expected a value, found '${2-}'"
      printf -v "${name^^}" '%s' "$2"
      shift 2
      continue
    fi
    case $1 in
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage && exit ;;
      *) if [[ " ${OWN_SWITCHES[*]} " == *" $1 "* ]]; then printf -v "${name^^}" 1; else EXTRA_ARGS+=("$1"); fi ;;
    esac
    shift
  done
}
