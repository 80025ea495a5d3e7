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

# parse_cli ARG...: own options become variables (--load: LOAD), everything else goes to EXTRA_ARGS.
parse_cli() {
  local name
  DRY_RUN=0 FROM_SCRATCH=0 LOAD='' EXTRA_ARGS=()
  while (($#)); do
    case $1 in
      --nnodes | --rdzv_endpoint | --load | --engine)
        [[ -n ${2-} && $2 != --* ]] || die "$1: expected a value, found '${2-}'"
        name=${1#--}
        printf -v "${name^^}" '%s' "$2"
        shift
        ;;
      --nnodes=* | --rdzv_endpoint=* | --load=* | --engine=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
      --from-scratch) FROM_SCRATCH=1 ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage && exit ;;
      *) EXTRA_ARGS+=("$1") ;;
    esac
    shift
  done
}
