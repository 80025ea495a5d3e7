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

# name_run: RUN_NAME and OUT_DIR, from the name of the recipe; PYTHON.
name_run() {
  RUN_NAME=$(basename "$0" .sh)
  [[ $PRECISION != bf16 ]] || RUN_NAME=${RUN_NAME/FP8/BF16}
  OUT_DIR=$(absolute "${OUT_DIR:-$REPO/exp/$RUN_NAME}")
  default_python
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

# variable NAME MEANING: its entry in a help, with the value that it has here.
variable() {
  local setting="$1=${!1-}"
  ((${#setting} <= 26)) || setting+=$'\n'$(printf '%28s' '')
  printf '  %-26s %s\n' "$setting" "$2"
}

# run_options: the last options of every recipe, and the head of its variables.
run_options() {
  cat <<'EOF'
  --dry-run             print the run and its exact command, change nothing
  --list                print the line of scripts/list.sh
  --help

Variables, with their values here:
EOF
}

# read_sizes: choices and sizes of all recipes, after parse_cli: a flag that is passed through wins.
read_sizes() {
  check_choices
  override GLOBAL_BATCH_SIZE --global-batch-size
  override TP --tensor-model-parallel-size
  override CP --context-parallel-size
  positive NNODES GPUS_PER_NODE TP CP GLOBAL_BATCH_SIZE
}

# run_variables: those of all recipes.
run_variables() {
  variable OUT_DIR 'checkpoints, logs, metrics'
  variable PRECISION 'fp8, or bf16: the same recipe without the FP8 flags'
  variable FP8_SCALE_FORMAT "pow2, Transformer Engine's default, or fp32"
  variable TP 'tensor parallel size'
  variable CP 'context parallel size'
  variable GPUS_PER_NODE 'GPUs of one node'
  variable WANDB_PROJECT 'of W&B; empty: no W&B'
  variable WANDB_MODE 'online, offline (unless set) or disabled'
  variable PROFILE '1: PyTorch profiler and memory history'
  variable PYTHON 'interpreter'
}

# list_recipe LENGTH: a recipe's answer to --list, a line of scripts/list.sh.
list_recipe() {
  local path
  path=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
  printf '%-46s %-9s %-14s %2s  %2s  %s\n' \
    "${path#"$REPO"/}" "$ENGINE" "$NNODES x $GPUS_PER_NODE" "$TP" "$CP" "$1"
}

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
