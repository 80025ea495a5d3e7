# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# evalscope in its two releases, which differ in names, flags and defaults; evalscope.json holds the benchmarks' data.

# 0.17.1 has the evaluator of commit 89769418 (PR #734), with which the paper's numbers were made.
VERSIONS=(1.14.1 0.17.1)

# offline COMMAND...: without a network where the data is local.
offline() { env HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$@"; }

# find_evalscope: EVAL_PYTHON, which has the release EVALSCOPE.
find_evalscope() {
  local found fix="$PYTHON -m pip install -r requirements.txt"
  EVAL_PYTHON=$PYTHON
  if [[ $EVALSCOPE == 0.17.1 ]]; then
    EVAL_PYTHON=$STRICT_VENV/bin/python fix='bash eval/setup_strict.sh'
    [[ -x $EVAL_PYTHON ]] || { missing "EVALSCOPE: $EVALSCOPE has an environment of its own; run: $fix" && return; }
  fi
  found=$("$EVAL_PYTHON" -c 'from importlib.metadata import version; print(version("evalscope"))' 2>/dev/null) || found=none
  [[ $found == "$EVALSCOPE" ]] || missing "evalscope: expected release $EVALSCOPE beside $EVAL_PYTHON, found $found; run: $fix"
}

# evalscope_arguments: DATASET, DATASET_ARGS and GENERATION_CONFIG, JSON for both releases.
evalscope_arguments() {
  local made
  made=$("$PYTHON" "$REPO/eval/check.py" arguments --benchmark "$BENCHMARK" --evalscope "$EVALSCOPE" \
    --max-tokens "$MAX_NEW_TOKENS" --temperature "$TEMPERATURE" --top-p "$TOP_P" --samples "$GENERATED_NUM" \
    --timeout "$EVAL_TIMEOUT" ${FEW_SHOT:+--few-shot "$FEW_SHOT"} ${SYSTEM_PROMPT+--system-prompt "$SYSTEM_PROMPT"} ${DATASET_LOCAL:+--path "$DATASET_LOCAL"} \
    ${START_DATE:+--window "$START_DATE" "$END_DATE"}) || exit 1
  { read -r DATASET && read -r DATASET_ARGS && read -r GENERATION_CONFIG; } <<<"$made"
}

# evalscope_command STEP: COMMAND. generate: requests, and reviews where that runs no code the model wrote; grade: only
# reviews. Never a seed for the server: it would be the same one for each of a question's samples.
evalscope_command() {
  local work=$OUT_DIR/evalscope program=("$EVAL_PYTHON" -m evalscope.cli.cli) previous=()
  [[ -z $DATASET_LOCAL ]] || program=(env HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "${program[@]}")
  local common=(--model "$MODEL_NAME" --api-key "$API_KEY" --datasets "$DATASET" --dataset-args "$DATASET_ARGS"
    --generation-config "$GENERATION_CONFIG" --work-dir "$work" ${LIMIT:+--limit "$LIMIT"})
  if [[ $EVALSCOPE == 0.17.1 ]]; then
    # It makes a directory with the time in its name; a second one would start over.
    mapfile -t previous < <(find "$work" -mindepth 1 -maxdepth 1 -name '2*_*' 2>/dev/null | sort | head -n 1)
    COMMAND=("${program[@]}" eval "${common[@]}" --model-id "$SERVED_NAME" --eval-type service
      --api-url "$URL/v1/chat/completions" --timeout "$EVAL_TIMEOUT" --eval-batch-size "$EVAL_BATCH"
      ${previous[0]:+--use-cache "${previous[0]}"})
    if [[ $1 == grade ]]; then
      COMMAND=("${COMMAND[@]/#evalscope.cli.cli/eval.grade}" --stage review --judge-worker-num "$GRADERS")
    elif [[ $BENCHMARK == livecodebenchv5 ]]; then
      COMMAND+=(--stage infer)
    fi
    return
  fi
  COMMAND=("${program[@]}" eval "${common[@]}" --model-id "$SERVED_NAME" --eval-type openai_api --api-url "$URL/v1"
    --repeats "$GENERATED_NUM" --no-timestamp)
  [[ ! -f $work/configs/task_config.yaml ]] || COMMAND+=(--use-cache "$work")
  if [[ $1 == grade ]]; then
    COMMAND=("${COMMAND[@]/#evalscope.cli.cli/eval.grade}" --eval-batch-size "$GRADERS" --rerun-review)
  else
    COMMAND+=(--eval-batch-size "$EVAL_BATCH")
    # It has no flag for only generating.
    [[ $BENCHMARK != livecodebenchv5 ]] || COMMAND=(env "PYTHONPATH=$REPO" "${COMMAND[@]/#evalscope.cli.cli/eval.generate}")
  fi
}

# grade: the programs that the model wrote, only with permission and isolated.
grade() {
  if [[ $ALLOW_CODE_EXECUTION != 1 ]]; then
    printf 'generated: %s\n' "$OUT_DIR/evalscope" >&2
    printf 'To grade, programs that the model wrote must run: the same command with ALLOW_CODE_EXECUTION=1 does it, isolated.\n' >&2
    exit
  fi
  evalscope_command grade
  # 0.17.1 would keep the grades of an interrupted call, and of one whose grader failed.
  [[ $EVALSCOPE != 0.17.1 ]] || rm -rf "$OUT_DIR"/evalscope/2*_*/reviews
  client "$OUT_DIR/grade.log" bash "$REPO/eval/isolate.sh" "$OUT_DIR/evalscope" "${COMMAND[@]}"
}
