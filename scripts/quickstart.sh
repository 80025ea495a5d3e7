#!/usr/bin/env bash
# The recipe in miniature on this machine: real text, a tiny Qwen2.5, the stages of the big runs. Minutes on two cores.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly REPO
# shellcheck source=scripts/lib/cli.sh
source "${REPO}/scripts/lib/cli.sh"
# shellcheck source=scripts/lib/venv.sh
source "${REPO}/scripts/lib/venv.sh"
# shellcheck source=scripts/lib/launch.sh
source "${REPO}/scripts/lib/launch.sh"
# shellcheck source=scripts/models/qwen2.5-tiny.sh
source "${REPO}/scripts/models/qwen2.5-tiny.sh"

# Every stage is a function `stage_<name>`, what it leaves behind is listed by `result_<name>`, in this order.
readonly STAGES=(install corpus tokenizer data cpt_fp8 cpt_bf16 report)

OUT="${OUT_DIR:-${REPO}/exp/quickstart}"
PYTHON_VENV="${VENV}/bin/python"
TINY="${REPO}/scripts/CPT/InfiR2_CPT_FP8_tiny.sh"
CPT_FLAGS=()

usage() {
  cat <<'TEXT'
usage: bash scripts/quickstart.sh [options] [-- flags for the CPT recipe]

Installs into .venv, builds a corpus and a tokenizer, and trains a tiny Qwen2.5 from scratch twice with the same data and
seed: FP8 and BF16 linear layers. Ends with exp/quickstart/report.md. Interrupt it at any time: the same command goes on
where it stopped, and does nothing when all is done.

  --list          name the stages
  --from STAGE    start at STAGE
  --only STAGE    run only STAGE
  --again         first throw away the results of the chosen stages and of those that follow
  --dry-run       print the commands of the chosen stages and run nothing
  --help          this text

environment:
  OUT_DIR         where everything goes (default exp/quickstart)
  PYTHON          the Python that .venv is made with (default python3; 3.10 to 3.12)
  TORCH_INDEX_URL package index of the torch build, e.g. https://download.pytorch.org/whl/cpu
TEXT
}

result_install() { echo "${VENV}/.requirements.txt.installed"; }
stage_install() { ensure_venv requirements.txt; }

result_corpus() { echo "${OUT}/corpus.jsonl"; }
stage_corpus() { run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/corpus.py" --output "${OUT}/corpus.jsonl"; }

result_tokenizer() { echo "${OUT}/tokenizer"; }
stage_tokenizer() {
  run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/tokenizer.py" \
    --input "${OUT}/corpus.jsonl" --output-dir "${OUT}/tokenizer" -- "${MODEL_ARGS[@]}" --attention-dropout 0.0
}

result_data() { echo "${OUT}/data/text_text_document.idx"; }
stage_data() {
  run env ENGINE=embedded PYTHON="${PYTHON_VENV}" bash "${REPO}/scripts/CPT/prepare_data.sh" \
    --input "${OUT}/corpus.jsonl" --output-prefix "${OUT}/data/text" --tokenizer "${OUT}/tokenizer"
}

# The launcher itself knows whether a run is fresh, to be resumed or finished.
result_cpt_fp8() { echo "${OUT}/cpt_fp8"; }
stage_cpt_fp8() { train fp8; }
result_cpt_bf16() { echo "${OUT}/cpt_bf16"; }
stage_cpt_bf16() { train bf16; }
train() {
  run env PRECISION="$1" OUT_DIR="${OUT}/cpt_$1" DATA_PATH="${OUT}/data/text_text_document" \
    TOKENIZER_MODEL="${OUT}/tokenizer" PYTHON="${PYTHON_VENV}" \
    bash "${TINY}" --from-scratch ${CPT_FLAGS[@]+"${CPT_FLAGS[@]}"}
}

result_report() { echo "${OUT}/report.md"; }  # and report.png
stage_report() {
  run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/report.py" \
    --fp8 "${OUT}/cpt_fp8" --bf16 "${OUT}/cpt_bf16" --output "${OUT}/report.md"
}

# run COMMAND...: prints it under --dry-run.
run() {
  if [[ ${DRY_RUN} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# finished STAGE: nothing is left to do for it. Results appear whole, so one that is there is complete.
finished() {
  local result
  result="$("result_$1")"
  case "$1" in
    cpt_*) return 1 ;;
    install) ensure_venv requirements.txt ;;
    report) [[ -e ${result} && ! ${OUT}/cpt_fp8/checkpoints/latest_checkpointed_iteration.txt -nt ${result} && ! ${OUT}/cpt_bf16/checkpoints/latest_checkpointed_iteration.txt -nt ${result} ]] ;;
    *) [[ -e ${result} ]] ;;
  esac
}

main() {
  local from="" only="" again=0 reached=0 chosen=() stage seconds number=0 arguments=("$@")
  DRY_RUN=0
  while (($#)); do
    case "$1" in
      --help | -h) usage; exit 0 ;;
      --list) printf '%s\n' "${STAGES[@]}"; exit 0 ;;
      --from | --only) [[ $# -ge 2 ]] || die "$1: expected the name of a stage, found nothing"; [[ $1 == --from ]] && from="$2" || only="$2"; shift ;;
      --again) again=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --) shift; CPT_FLAGS=("$@"); break ;;
      *) die "$1: unknown option; see bash scripts/quickstart.sh --help" ;;
    esac
    shift
  done
  [[ -z ${from} || -z ${only} ]] || die "--from and --only: expected one of them, found both"
  stage="${from}${only}"
  [[ -z ${stage} || " ${STAGES[*]} " == *" ${stage} "* ]] || die "${stage}: expected a stage of: ${STAGES[*]}"
  for stage in "${STAGES[@]}"; do
    if [[ -n ${only} ]]; then
      [[ ${stage} == "${only}" ]] && chosen+=("${stage}")
    elif [[ -z ${from} || ${stage} == "${from}" || ${#chosen[@]} -gt 0 ]]; then
      chosen+=("${stage}")
    fi
  done
  if [[ ${DRY_RUN} == 0 ]]; then
    mkdir -p "${OUT}"
    OUT="$(cd "${OUT}" && pwd)"
    hold_lock "${OUT}/.lock" ${arguments[@]+"${arguments[@]}"}
  fi
  if [[ ${DRY_RUN} == 0 && ${again} == 1 ]]; then
    for stage in "${STAGES[@]}"; do
      [[ ${stage} != "${chosen[0]}" ]] || reached=1
      [[ ${reached} == 0 || ${stage} == install ]] || rm -rf "$("result_${stage}")" "${OUT}/report.png"
    done
  fi
  for stage in "${chosen[@]}"; do
    number=$((number + 1))
    seconds=${SECONDS}
    if [[ ${DRY_RUN} == 0 ]] && finished "${stage}"; then
      echo "== ${number}/${#chosen[@]} ${stage}: done before"
      continue
    fi
    echo "== ${number}/${#chosen[@]} ${stage}"
    "stage_${stage}"
    [[ ${DRY_RUN} == 1 ]] || echo "== ${stage} took $((SECONDS - seconds)) s"
  done
}

main "$@"
