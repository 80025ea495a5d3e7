#!/usr/bin/env bash
# The steps of docker/Dockerfile, one function each. The versions are those of docker/versions.env.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${CONTEXT:=/context}"     # the submodules, as far as the build context has them
: "${BUILD:=/build}"         # sources of what is compiled
: "${WHEELS:=/wheels}"       # what came of it
: "${TARGET:=/opt/InfiR2}"   # the repository in the image
: "${SLIME_SGLANG_PATCH:=1}" # 0: SGLang as it is

usage() {
  cat <<TEXT
usage: bash docker/install.sh [--dry-run] STEP [ARGUMENT]

  base              check the base image: SGLang's release, CUDA
  wheel NAME        compile into $WHEELS: ${!WHEEL_STEPS[*]}
  packages          install what PyPI has, then $WHEELS
  engines           put Megatron-LM and slime into $TARGET/training, install them, patch SGLang as slime does
  checksum DIR      print the checksum of a checkout's files, for the _FILES lines of docker/versions.env

  --dry-run         print the commands that change something, run none of them
  --help

MEGATRON_COMMIT   another commit, branch or tag of Megatron-LM; main and ${MEGATRON_TAG} stand for the pinned commit
MAX_JOBS          compilers at a time; as many as there are cores unless set
SLIME_SGLANG_PATCH=0   leave SGLang as it is, without slime's docker/patch/latest/sglang.patch (docker/README.md)
CONTEXT BUILD WHEELS TARGET   directories: $CONTEXT $BUILD $WHEELS $TARGET
TEXT
}

say() { printf '%s\n' "$*" >&2; }

die() { say "error: $*" && exit 1; }

# run COMMAND...: all that changes something goes through it.
run() {
  if ((DRY_RUN)); then printf '%q ' "$@" && printf '\n'; else "$@"; fi
}

# read_versions: the file, then what the build arguments say otherwise.
read_versions() {
  local asked=${MEGATRON_COMMIT-}
  # shellcheck source=docker/versions.env
  source "$HERE/versions.env"
  # shellcheck disable=SC2034  # obtain reads MEGATRON_FILES by its name
  case $asked in
    '' | main | "$MEGATRON_TAG" | "$MEGATRON_COMMIT") ;;
    *) MEGATRON_COMMIT=$asked MEGATRON_FILES='' ;;
  esac
}

# sources_in DIR: the files of a checkout, as ./path, each ended by NUL: neither git's own nor what a build leaves behind.
sources_in() {
  (cd "$1" && find . \( -name .git -o -name __pycache__ -o -name '*.egg-info' -o -name build \) -prune \
    -o -type f ! -name '*.so' ! -name '*.pyc' -print0) | LC_ALL=C sort -z
}

# checksum DIR: of their names and contents.
checksum() { (cd "$1" && sources_in . | xargs -0 sha256sum) | sha256sum | cut -d ' ' -f 1; }

# copy_sources FROM TO
copy_sources() {
  mkdir -p "$2"
  sources_in "$1" | tar -C "$1" --null -T - -cf - | tar -C "$2" --no-same-owner -xf -
}

# obtain PREFIX DIR [SUBMODULE...]: the sources that PREFIX_COMMIT names, in DIR. From the build context where its
# submodule has exactly those files, as a context without .git cannot say its commit; else from PREFIX_URL.
obtain() {
  local url=$1_URL commit=$1_COMMIT files=$1_FILES dir=$2 name=${2##*/} mounted=$CONTEXT/${2##*/}
  commit=${!commit}
  if [[ -n ${!files-} && -n $(ls -A "$mounted" 2>/dev/null) ]]; then
    if [[ $(checksum "$mounted") == "${!files}" ]]; then
      say "$name: $commit, from the submodule"
      run copy_sources "$mounted" "$dir"
      return
    fi
    say "warning: training/$name: its files are not those of ${commit:0:12}, all submodules included; cloning that commit"
  fi
  say "$name: $commit, from ${!url}"
  run git init --quiet "$dir"
  run git -C "$dir" fetch --quiet --depth 1 "${!url}" "$commit" || die "$name: ${!url} has no $commit"
  run git -C "$dir" checkout --quiet --detach FETCH_HEAD
  (($# == 2)) || run git -C "$dir" submodule --quiet update --init --depth 1 -- "${@:3}"
}

# build_wheel SOURCE [NAME=VALUE...]: with the torch that is installed, and nothing else than SOURCE.
build_wheel() {
  run env "TORCH_CUDA_ARCH_LIST=$CUDA_ARCHS" "${@:2}" python3 -m pip wheel --verbose --no-deps --no-build-isolation \
    --no-cache-dir --wheel-dir "$WHEELS" "$1"
}

# The GitHub releases of FlashAttention have wheels for other versions of torch: FORCE_BUILD.
flash_attn() {
  build_wheel "flash-attn==$FLASH_ATTN_VERSION" FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=90
}

# Its setup.py fetches the nvcc and ptxas that it wants from developer.download.nvidia.com.
flash_attn_3() {
  obtain FLASH_ATTN_3 "$BUILD/flash-attention" csrc/cutlass
  build_wheel "$BUILD/flash-attention/hopper" FLASH_ATTENTION_FORCE_BUILD=TRUE
}

apex() {
  obtain APEX "$BUILD/apex"
  build_wheel "$BUILD/apex" APEX_CPP_EXT=1 APEX_CUDA_EXT=1
}

grouped_gemm() {
  obtain GROUPED_GEMM "$BUILD/grouped_gemm" third_party/cutlass
  build_wheel "$BUILD/grouped_gemm"
}

mbridge() {
  obtain MBRIDGE "$BUILD/mbridge"
  build_wheel "$BUILD/mbridge"
}

# Without the commit in its version, which only a clone could say. --no-deps also leaves out nvdlfw-inspect, a tool for
# debugging that nothing imports by itself.
transformer_engine() {
  run python3 -m pip install --no-cache-dir "pybind11==$PYBIND11_VERSION"
  obtain TRANSFORMER_ENGINE "$BUILD/TransformerEngine" 3rdparty/cudnn-frontend
  build_wheel "$BUILD/TransformerEngine" NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 NVTE_NO_LOCAL_VERSION=1
}

declare -A WHEEL_STEPS=([flash-attn]=flash_attn [flash-attn-3]=flash_attn_3 [apex]=apex [grouped-gemm]=grouped_gemm
  [mbridge]=mbridge [transformer-engine]=transformer_engine)

step_wheel() {
  [[ -n ${1-} && -n ${WHEEL_STEPS[$1]-} ]] || die "wheel: expected one of ${!WHEEL_STEPS[*]}, found '${1-}'"
  "${WHEEL_STEPS[$1]}"
}

# step_base: before hours of compiling.
step_base() {
  local found
  found=$(python3 -c 'from importlib.metadata import version; print(version("sglang"))' 2>/dev/null) || found=none
  [[ $found == "$SGLANG_VERSION" ]] ||
    die "SGLANG_VERSION: expected a base image with sglang $SGLANG_VERSION, found $found; build with v$SGLANG_VERSION, or change docker/versions.env and docker/Dockerfile"
  found=$(python3 -c 'import torch; print(torch.version.cuda)' 2>/dev/null) || found=none
  [[ $found =~ ^[0-9] && $(printf '%s\n' "$CUDA_MINIMUM" "$found" | sort -V | head -n 1) == "$CUDA_MINIMUM" ]] ||
    die "SGLANG_VERSION: expected a base image with CUDA $CUDA_MINIMUM or newer, for block FP8, found $found"
  say "base image: sglang $SGLANG_VERSION, CUDA $found"
}

# origin_of MODULE: its file; nothing is imported.
origin_of() {
  python3 -c 'import sys; from importlib.util import find_spec; print(find_spec(sys.argv[1]).origin)' "$1" 2>/dev/null ||
    die "$1: not installed"
}

# step_packages: one resolution with sglang among the requirements, so that pip keeps what sglang pins, torch and
# transformers above all. What was compiled here goes in as it is.
step_packages() {
  local origin packages=(
    "sglang==$SGLANG_VERSION" "numpy==$NUMPY_VERSION" "ray[default]==$RAY_VERSION" "sglang-router==$SGLANG_ROUTER_VERSION"
    "torch_memory_saver==$TORCH_MEMORY_SAVER_VERSION" "evalscope==$EVALSCOPE_VERSION" "accelerate==$ACCELERATE_VERSION"
    "matplotlib==$MATPLOTLIB_VERSION" "numba==$NUMBA_VERSION" "tensorboard==$TENSORBOARD_VERSION" "wandb==$WANDB_VERSION"
    "httpx[http2]==$HTTPX_VERSION" "pylatexenc==$PYLATEXENC_VERSION" "pybind11==$PYBIND11_VERSION"
    datasets pillow pyyaml regex six safetensors scipy tqdm  # in the base image already
  )
  run python3 -m pip install --no-cache-dir "${packages[@]}"
  run python3 -m pip install --no-cache-dir --no-deps "$WHEELS"/*.whl
  # TransformerEngine looks for the Hopper build's interface in a package flash_attn_3; its wheel has it at the top.
  if ((DRY_RUN)); then
    say 'flash_attn_interface.py: would be copied into a package flash_attn_3 beside it'
    return
  fi
  origin=$(origin_of flash_attn_interface)
  mkdir -p "${origin%/*}/flash_attn_3"
  cp "$origin" "${origin%/*}/flash_attn_3/flash_attn_interface.py"
}

# step_engines: the recipes run them from here, by PYTHONPATH; installed, they are importable anywhere. Megatron-LM runs
# `make` for its index builder at every start, which must find nothing to do where the user cannot write.
step_engines() {
  local datasets=$TARGET/training/Megatron-LM/megatron/core/datasets
  obtain MEGATRON "$TARGET/training/Megatron-LM"
  obtain SLIME "$TARGET/training/slime"
  run python3 -m pip install --no-cache-dir --no-deps --editable "$TARGET/training/Megatron-LM" \
    --editable "$TARGET/training/slime"
  ((DRY_RUN)) || compgen -G "$datasets/helpers_cpp*.so" >/dev/null ||
    die "Megatron-LM: its index builder, megatron/core/datasets/helpers.cpp, was not compiled"
  run make --directory "$datasets"
  if [[ $SLIME_SGLANG_PATCH == 1 ]]; then patch_sglang; fi
}

# patch_sglang: all or nothing. slime's RL needs it: while an engine's memory is released, /health as it is does not
# answer, and the router takes the engine out.
patch_sglang() {
  local patch=$TARGET/training/slime/docker/patch/latest/sglang.patch root
  root=$(origin_of sglang)
  root=${root%/python/sglang/__init__.py}
  [[ -d $root/python/sglang ]] || die "sglang: expected a checkout, as in the base image, found $root"
  run git -C "$root" apply --check "$patch" || die "$patch: does not apply to $root"
  run git -C "$root" apply "$patch"
}

main() {
  DRY_RUN=0
  read_versions
  case ${1-} in
    -h | --help) usage && exit ;;
    --dry-run) DRY_RUN=1 && shift ;;
  esac
  case ${1-} in
    base | wheel | packages | engines) "step_$1" "${@:2}" ;;
    checksum) [[ -d ${2-} ]] || die "checksum: expected a directory, found '${2-}'" && checksum "$2" ;;
    *) die "expected a step, found '${1-}'; see --help" ;;
  esac
}

main "$@"
