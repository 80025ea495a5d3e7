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
# shellcheck source=scripts/lib/progress.sh
source "${REPO}/scripts/lib/progress.sh"
# shellcheck source=scripts/models/qwen2.5-tiny.sh
source "${REPO}/scripts/models/qwen2.5-tiny.sh"

# Every stage is a function `stage_<name>`, what it leaves behind is listed by `result_<name>`, in this order.
readonly STAGES=(
  install corpus arithmetic tokenizer data cpt_fp8 cpt_bf16 sft_stage1 sft_stage2 sft_scratch rollout_model rl_stage1
  rl_stage2 accuracy evaluation report
)
# What a stage does, and how long on two cores.
declare -rA ABOUT=(
  [install]='the pinned packages into .venv; minutes the first time, most of them for PyTorch'
  [corpus]='real text, the docstrings of installed packages; seconds'
  [arithmetic]='sums with worked steps for SFT, RL and evaluation; seconds'
  [tokenizer]='a tokenizer for this text; seconds'
  [data]='text and sums as tokens; seconds'
  [cpt_fp8]='pre-training with FP8 linear layers; 3 to 5 min'
  [cpt_bf16]='the same in BF16, to compare with; 3 to 4 min'
  [sft_stage1]='fine-tuning on worked sums; 1 min'
  [sft_stage2]='fine-tuning on harder sums, half of the answers wrong on purpose; 1 min'
  [sft_scratch]='both again from random weights: what pre-training is worth; 1 to 2 min'
  [rollout_model]='the model cast to 128x128 FP8 blocks, for rollouts; seconds'
  [rl_stage1]='reinforcement learning with FP8 rollouts; 1 to 2 min'
  [rl_stage2]='the same with longer answers at a higher temperature; 1 to 3 min'
  [accuracy]='the model after each stage, on held-out sums; 1 to 2 min'
  [evaluation]='the last model behind a server, in BF16 and in FP8, by evalscope; 1 to 2 min'
  [report]='curves, tables and what to do next, on one page; seconds'
)

OUT="${OUT_DIR:-${REPO}/exp/quickstart}"
SEED="${SEED:-1236}"
PYTHON_VENV="${VENV}/bin/python"
CPT_FLAGS=()

usage() {
  cat <<'TEXT'
usage: bash scripts/quickstart.sh [options] [-- flags for the CPT recipe]

Installs into .venv and takes a tiny Qwen2.5 through the recipe: pre-training in FP8, and in BF16 beside it; SFT in two
stages, and from random weights beside it; the cast to FP8; RL in two stages with FP8 rollouts; evaluation of the result
in BF16 and FP8 behind a server. Ends with exp/quickstart/report.html, one page: held-out accuracy after each stage,
curves, FP8 beside BF16; report.md is the same text. Interrupt it at any time: the same command goes on where it
stopped, and does nothing when all is done. What the stages print goes to exp/quickstart/quickstart.log.

  --list          name the stages
  --from STAGE    start at STAGE
  --only STAGE    run only STAGE
  --again         first throw away the results of the chosen stages and of those that follow
  --dry-run       print the commands of the chosen stages and run nothing
  --help          this text

environment:
  OUT_DIR         where everything goes (default exp/quickstart)
  SEED            of data, weights and rollouts (default 1236)
  SFT_FLAGS, RL_FLAGS, ARITHMETIC_FLAGS  further flags for these recipes and for the data, separated by spaces
  OMP_NUM_THREADS threads of a process (all cores unless set; in the evaluation, two at a time, 1)
  PROGRESS_SECONDS  between two lines of progress where there is no terminal (default 15)
  PYTHON          the Python that .venv is made with (default python3; 3.10 to 3.12)
  TORCH_INDEX_URL package index of the torch build, e.g. https://download.pytorch.org/whl/cpu
TEXT
}

result_install() { echo "${VENV}/.requirements.txt.installed"; }
stage_install() {
  if [[ ${DRY_RUN} == 1 ]]; then
    run "${PYTHON_VENV}" -m pip install -r "${REPO}/requirements.txt"
  else
    PIP_VERBOSE=1 ensure_venv requirements.txt  # verbose and, as ensure_venv has it, quiet: what pip prints on its own
  fi
}

result_corpus() { echo "${OUT}/corpus.jsonl"; }
stage_corpus() { run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/corpus.py" --output "${OUT}/corpus.jsonl"; }

result_arithmetic() { echo "${OUT}/arithmetic"; }
stage_arithmetic() {
  # shellcheck disable=SC2086  # words
  run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/arithmetic.py" --output-dir "${OUT}/arithmetic" \
    --seed "${SEED}" ${ARITHMETIC_FLAGS:-}
}

result_tokenizer() { echo "${OUT}/tokenizer"; }
stage_tokenizer() {
  run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/tokenizer.py" \
    --input "${OUT}/corpus.jsonl" "${OUT}/arithmetic/sft_stage1.jsonl" --output-dir "${OUT}/tokenizer" \
    -- "${MODEL_ARGS[@]}" --attention-dropout 0.0
}

result_data() { echo "${OUT}/data"; }
stage_data() {
  prepare "${OUT}/corpus.jsonl" text
  prepare "${OUT}/arithmetic/pretrain.jsonl" sums
  await_all
}
prepare() {
  beside env ENGINE=embedded PYTHON="${PYTHON_VENV}" bash "${REPO}/scripts/CPT/prepare_data.sh" \
    --input "$1" --output-prefix "${OUT}/data/$2" --tokenizer "${OUT}/tokenizer"
}

# The launchers themselves know whether a run is fresh, to be resumed or finished.
result_cpt_fp8() { echo "${OUT}/cpt_fp8"; }
stage_cpt_fp8() { pretrain cpt_fp8 fp8; }
result_cpt_bf16() { echo "${OUT}/cpt_bf16"; }
stage_cpt_bf16() { pretrain cpt_bf16 bf16; }
pretrain() {
  run env PRECISION="$2" OUT_DIR="${OUT}/$1" TOKENIZER_MODEL="${OUT}/tokenizer" PYTHON="${PYTHON_VENV}" \
    bash "${REPO}/scripts/CPT/InfiR2_CPT_FP8_tiny.sh" --from-scratch --seed "${SEED}" \
    --data-path 0.2 "${OUT}/data/text_text_document" 0.8 "${OUT}/data/sums_text_document" \
    ${CPT_FLAGS[@]+"${CPT_FLAGS[@]}"} "${@:3}"
}

result_sft_stage1() { echo "${OUT}/sft_stage1"; }
stage_sft_stage1() { fine_tune sft_stage1 stage1 cpt_fp8; }
result_sft_stage2() { echo "${OUT}/sft_stage2"; }
stage_sft_stage2() { fine_tune sft_stage2 stage2 sft_stage1; }
fine_tune() {
  # shellcheck disable=SC2086  # words
  run env OUT_DIR="${OUT}/$1" DATA_DIR="${OUT}/arithmetic/sft_$2.jsonl" REF_LOAD="${OUT}/$3" \
    HF_CHECKPOINT="${OUT}/tokenizer" PYTHON="${PYTHON_VENV}" RAY_TEMP_DIR="${RAY_TEMP_DIR}" \
    bash "${REPO}/scripts/SFT/InfiR2_SFT_FP8_tiny_$2.sh" --seed "${SEED}" --rollout-seed "${SEED}" ${SFT_FLAGS:-}
}

# What pre-training is worth: the same fine-tuning from random weights, made by a step with a learning rate of 0.
result_sft_scratch() { echo "${OUT}/sft_scratch2"; }
stage_sft_scratch() {
  pretrain random fp8 --train-iters 1 --lr 0 --min-lr 0 --lr-warmup-iters 0 --lr-wsd-decay-iters 1 --eval-iters 0
  fine_tune sft_scratch1 stage1 random
  fine_tune sft_scratch2 stage2 sft_scratch1
}

result_rollout_model() { echo "${OUT}/sft_stage2_fp8"; }
stage_rollout_model() {
  to_hf sft_stage2
  to_fp8 sft_stage2
}
# RL trains with float32 scales, as slime sends them to the rollout engine.
to_fp8() {
  [[ -e ${OUT}/$1_fp8 ]] || run "${PYTHON_VENV}" "${REPO}/tools/bf16_cast_fp8.py" \
    --input-bf16-hf-path "${OUT}/$1_hf" --output-fp8-hf-path "${OUT}/$1_fp8" --force-pow-2-scale False
}
to_hf() {
  [[ -e ${OUT}/$1_hf ]] || run "${PYTHON_VENV}" "${REPO}/tools/convert_torch_dist_to_hf.py" \
    --input-dir "${OUT}/$1/checkpoints" --output-dir "${OUT}/$1_hf" --origin-hf-dir "${OUT}/tokenizer"
}

result_rl_stage1() { echo "${OUT}/rl_stage1"; }
stage_rl_stage1() { reinforce stage1 sft_stage2; }
result_rl_stage2() { echo "${OUT}/rl_stage2"; }
stage_rl_stage2() { reinforce stage2 rl_stage1; }
reinforce() {
  # shellcheck disable=SC2086  # words
  run env OUT_DIR="${OUT}/rl_$1" DATA_DIR="${OUT}/arithmetic/rl.jsonl" REF_LOAD="${OUT}/$2" \
    EVAL_DATA="${OUT}/arithmetic/validation.jsonl" HF_CHECKPOINT="${OUT}/sft_stage2_fp8" PYTHON="${PYTHON_VENV}" \
    RAY_TEMP_DIR="${RAY_TEMP_DIR}" \
    bash "${REPO}/scripts/RL/InfiR2_RL_FP8_tiny_$1.sh" --seed "${SEED}" --rollout-seed "${SEED}" ${RL_FLAGS:-}
}

result_accuracy() { echo "${OUT}/accuracy/rl_stage2.json"; }
stage_accuracy() {
  local name checkpoints=() outputs=()
  for name in cpt_fp8 sft_stage1 sft_scratch2 sft_stage2 sft_stage2_fp8 rl_stage1 rl_stage2; do
    [[ ! -e ${OUT}/accuracy/${name}.json ]] || continue
    if [[ ${name} == sft_stage2_fp8 ]]; then
      checkpoints+=("${OUT}/${name}")
    else
      to_hf "${name}"
      checkpoints+=("${OUT}/${name}_hf")
    fi
    outputs+=("${OUT}/accuracy/${name}.json")
  done
  ((${#outputs[@]})) || return 0
  run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/accuracy.py" \
    --checkpoint "${checkpoints[@]}" --data "${OUT}/arithmetic/held_out.jsonl" --output "${outputs[@]}"
}

result_evaluation() { echo "${OUT}/evaluation/summary.json"; }
stage_evaluation() {
  to_hf rl_stage2
  to_fp8 rl_stage2
  evaluate BF16 rl_stage2_hf
  evaluate FP8 rl_stage2_fp8
  await_all
  run "${PYTHON_VENV}" "${REPO}/eval/summarize.py" "${OUT}/evaluation/FP8" --against "${OUT}/evaluation/BF16" \
    --output "${OUT}/evaluation"
}
# The held-out questions in the format of AIME, by evalscope and a server, as eval/*_eval.sh measure the big models. A
# thread each: those of two servers would wait for each other.
evaluate() {
  beside env MODEL_PATH="${OUT}/$2" SERVED_NAME="$1" OUT_DIR="${OUT}/evaluation/$1" LABEL=arithmetic \
    DATASET_LOCAL="${OUT}/arithmetic/benchmark" SYSTEM_PROMPT= SERVER=transformers SERVER_URL= PYTHON="${PYTHON_VENV}" \
    TEMPERATURE=1.0 TOP_P=1.0 GENERATED_NUM=4 MAX_NEW_TOKENS=96 PROMPT_TOKENS=64 EVAL_BATCH=4 \
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" bash "${REPO}/eval/aime24_eval.sh"
}

result_report() { echo "${OUT}/report.html"; }  # written last, after report.md and its figures
stage_report() {
  run "${PYTHON_VENV}" "${REPO}/training/embedded/quickstart/report.py" \
    --quickstart "${OUT}" --output "${OUT}/report.html"
}

# beside COMMAND...: run, but started only: two that keep a core busy go on side by side. await_all waits for all of
# them, and fails as one of them did.
BESIDE=()
beside() {
  local signal
  if [[ ${DRY_RUN} == 1 ]]; then
    run "$@"
    return
  fi
  if ((${#BESIDE[@]} == 0)); then
    for signal in HUP INT TERM; do
      # shellcheck disable=SC2064  # its name now, the processes when it comes
      trap "INTERRUPTED=1; kill -${signal} \"\${BESIDE[@]/#/-}\" 2>/dev/null" "${signal}"
    done
  fi
  start_apart "$@" </dev/null
  BESIDE+=("${CHILD}")
}
await_all() {
  local pid status=0
  for pid in ${BESIDE[@]+"${BESIDE[@]}"}; do
    await "${pid}"
    ((CODE == 0)) || status=${CODE}
  done
  BESIDE=()
  trap - HUP INT TERM
  return "${status}"
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

# invocation: the command of this call, as far as results depend on it.
invocation() {
  local name words=()
  for name in OMP_NUM_THREADS SFT_FLAGS RL_FLAGS ARITHMETIC_FLAGS; do
    [[ -z ${!name:-} ]] || words+=("${name}=${!name@Q}")
  done
  words+=("SEED=${SEED}" bash scripts/quickstart.sh)
  ((${#CPT_FLAGS[@]} == 0)) || words+=(-- "${CPT_FLAGS[@]@Q}")
  echo "${words[*]//$'\n'/ }"
}

# record STAGE SECONDS: for the report.
record() {
  local commit
  commit="$(git -C "${REPO}" describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null)" || commit=unknown
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "${commit}" "$(invocation)" >>"${OUT}/stages.tsv"
}

# work STAGE: what it prints goes to the log, and how far it is to whoever watches. Sets STATUS.
work() {
  local from
  printf '== %s, %(%F %T)T\n' "$1" -1 >>"${LOG}"
  from="$(stat -c %s "${LOG}")"
  start_progress "${LOG}" "${from}"
  set +e  # a function that is tested, as in `if` or `||`, would go on after an error
  (
    set -e
    "stage_$1"
  ) >>"${LOG}" 2>&1
  STATUS=$?
  set -e
  stop_progress
  SHOWN="$(tail -c "+$((from + 1))" "${LOG}" | tr '\r' '\n' | tr -d '\0')"
}

# had_nothing_to_do STAGE: so said its launchers.
had_nothing_to_do() {
  [[ $1 == @(cpt|sft|rl)_* ]] && grep -aq '^nothing to do: ' <<<"${SHOWN}" && ! grep -aq '^done: ' <<<"${SHOWN}"
}

# fail STAGE: with the end of what it said; whoever stopped it knows why.
fail() {
  if ((STATUS > 128)); then
    printf 'stopped in stage %s: %s\n' "$1" "$(tail -n 1 <<<"${SHOWN}")" >&2
  else
    tail -n 15 <<<"${SHOWN}" >&2
    printf 'error: stage %s failed with status %s; all that it printed: %s\n' "$1" "${STATUS}" "${LOG}" >&2
  fi
  exit "${STATUS}"
}

# leave: however this ends. One Ray serves all stages, started by the first that needs it.
leave() {
  [[ -z ${STAGE} ]] || record "${STAGE}" "$((SECONDS - STARTED))"
  stop_progress
  RAY_TEMP_DIR="${RAY_TEMP_DIR}" PYTHON="${PYTHON_VENV}" bash "${REPO}/scripts/ray_stop.sh" >/dev/null 2>&1 || true
}

# finished STAGE: nothing is left to do for it. Results appear whole, so one that is there is complete; whether a run
# is, its launcher knows.
finished() {
  local result tracker
  result="$("result_$1")"
  case "$1" in
    cpt_* | sft_* | rl_*) return 1 ;;
    install) venv_ready requirements.txt ;;
    data) [[ -e ${result}/text_text_document.idx && -e ${result}/sums_text_document.idx ]] ;;
    report)
      [[ -e ${result} ]] || return
      for tracker in "${OUT}"/*/checkpoints/latest_checkpointed_iteration.txt "${OUT}"/accuracy/*.json \
        "${OUT}/evaluation/summary.json"; do
        [[ ! ${tracker} -nt ${result} ]] || return
      done
      ;;
    *) [[ -e ${result} ]] ;;
  esac
}

main() {
  local from="" only="" again=0 reached=0 chosen=() stage number=0 arguments=("$@")
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
    LOG="${OUT}/quickstart.log" STAGE=''
    export PYTHONUNBUFFERED=1  # or the log would lag behind
    # glibc would give a step's memory back to the kernel, and take it again page by page at the next.
    export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    trap leave EXIT
  fi
  RAY_TEMP_DIR="/tmp/infir2-${UID}/$(cksum <<<"${OUT}" | cut -d ' ' -f 1)"
  if [[ ${DRY_RUN} == 0 && ${again} == 1 ]]; then
    for stage in "${STAGES[@]}"; do
      [[ ${stage} != "${chosen[0]}" ]] || reached=1
      [[ ${reached} == 1 && ${stage} != install ]] || continue
      rm -rf "$("result_${stage}")"
      [[ ! -e ${OUT}/stages.tsv ]] || sed -i "/^${stage}\t/d" "${OUT}/stages.tsv"
      case "${stage}" in
        sft_scratch) rm -rf "${OUT}/random" "${OUT}/sft_scratch1" ;;
        accuracy) rm -rf "${OUT}/accuracy" "${OUT}"/{cpt_fp8,sft_stage1,sft_scratch2,rl_stage1,rl_stage2}_hf ;;
        evaluation) rm -rf "${OUT}/evaluation" "${OUT}/rl_stage2_fp8" ;;
        rollout_model) rm -rf "${OUT}/sft_stage2_hf" ;;
        report) rm -f "${OUT}"/report*.png "${OUT}/report.md" ;;
      esac
    done
  fi
  for stage in "${chosen[@]}"; do
    number=$((number + 1))
    if [[ ${DRY_RUN} == 0 ]] && finished "${stage}"; then
      echo "== ${number}/${#chosen[@]} ${stage}: done before"
      continue
    fi
    echo "== ${number}/${#chosen[@]} ${stage}: ${ABOUT[${stage}]}"
    if [[ ${DRY_RUN} == 1 ]]; then
      "stage_${stage}"
    else
      STARTED=${SECONDS} STAGE="${stage}"
      work "${stage}"
      ((STATUS == 0)) || fail "${stage}"
      if had_nothing_to_do "${stage}"; then
        echo "== ${stage}: done before"
      else
        echo "== ${stage} took $(clock "$((SECONDS - STARTED))")"
        record "${stage}" "$((SECONDS - STARTED))"
      fi
      STAGE=''
    fi
  done
  [[ ${DRY_RUN} == 1 || ${chosen[-1]} != report ]] || conclude
}

# conclude: what came out (the list at the head of the report), and where it is.
conclude() {
  echo
  sed -n '/^## /q; s/^- //p' "${OUT}/report.md"
  printf 'report: %s, one file for any browser\n' "${OUT}/report.html"
}

main "$@"
