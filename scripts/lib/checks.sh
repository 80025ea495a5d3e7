# shellcheck shell=bash
# What a launch needs. What is wrong on any machine is an error even in a dry run; what only this machine
# lacks goes through missing().

# one_of NAME VALUE...: the variable NAME holds one of the values.
one_of() {
  local name=$1 value
  for value in "${@:2}"; do [[ ${!name} != "$value" ]] || return 0; done
  die "$name: expected one of ${*:2}, found '${!name}'"
}

# check_choices: what all recipes let choose.
check_choices() {
  one_of ENGINE megatron embedded
  one_of PRECISION fp8 bf16
  one_of FP8_SCALE_FORMAT pow2 fp32
}

# positive NAME...: each variable holds an integer > 0.
positive() {
  local name
  for name; do [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name: expected an integer > 0, found '${!name}'"; done
}

# check_submodule DIR ENTRYPOINT: present, complete, and at the commit this repository pins.
check_submodule() {
  local path=training/$1 dir=$REPO/training/$1 pin head
  local fix="git submodule update --init $path (or --engine embedded)"
  if [[ ! -f $dir/$2 ]]; then
    [[ -n $(ls -A "$dir" 2>/dev/null) ]] || { missing "$path: not initialised; run: $fix" && return; }
    missing "$path: half initialised, $2 is not there; run: ${fix/--init/--init --force}" && return
  fi
  pin=$(git -C "$REPO" ls-files -s -- "$path" 2>/dev/null | cut -d ' ' -f 2)
  # Without its own .git the directory would answer with the commit of this repository.
  [[ ! -e $dir/.git ]] || head=$(git -C "$dir" rev-parse HEAD 2>/dev/null)
  if [[ -z $pin || -z ${head-} ]]; then
    warn "$path: not a git checkout, its commit is not verified"
  elif [[ $head != "$pin" ]]; then
    missing "$path: at commit ${head:0:12}, expected ${pin:0:12}; run: $fix"
  fi
}

check_gpus() {
  local found
  found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
  [[ -z ${CUDA_VISIBLE_DEVICES-} ]] || found=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  ((found >= GPUS_PER_NODE)) ||
    missing "GPUS_PER_NODE: expected $GPUS_PER_NODE GPUs, found $found; set GPUS_PER_NODE, or use --engine embedded"
  [[ -n $(command -v torchrun) ]] || missing 'torchrun: not found; install PyTorch, or use --engine embedded'
}

# check_data WORD...: the words of --data-path; numbers are weights, the others prefixes.
check_data() {
  local word suffix
  for word; do
    [[ ! $word =~ ^[0-9.]+(e-?[0-9]+)?$ ]] || continue
    for suffix in bin idx; do
      [[ -f $word.$suffix ]] ||
        missing "DATA_PATH: $word.$suffix not found; set DATA_PATH, or make it with scripts/CPT/prepare_data.sh"
    done
  done
}

# check_tokenizer DIR [VARIABLE]
check_tokenizer() {
  local name=${2-TOKENIZER_MODEL}
  [[ -d $1 ]] || { missing "$name: directory $1 not found" && return; }
  [[ -f $1/tokenizer.json || -f $1/vocab.json || -f $1/tokenizer.model ]] ||
    missing "$name: $1 holds no tokenizer (tokenizer.json or vocab.json)"
}

# check_flags PROGRAM DIR ARG...: the argument list against the pinned parser and its combination rules, and
# against the Hugging Face config.json in DIR when there is one. DIR must be the checkpoint's model.
check_flags() {
  local options=(--program "$1")
  [[ $ENGINE != megatron ]] || options+=(--world-size $((NNODES * GPUS_PER_NODE)))
  [[ ! -f $2/config.json ]] || options+=(--hf-config "$2")
  "$PYTHON" "$REPO/training/contract/check.py" "${options[@]}" -- "${@:3}" >&2
}

# listener PORT: the user id of the process that listens on PORT of this machine, or nothing.
listener() {
  local port on state user
  printf -v port ':%04X' "$1"
  while read -r _ on _ state _ _ _ user _; do
    if [[ $on == *"$port" && $state == 0A ]]; then printf '%s\n' "$user" && return; fi
  done < <(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null)
}
