# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# One benchmark from its checks to its numbers: a server, evalscope, the summary. Sourced by the *_eval.sh scripts,
# which set BENCHMARK and its numbers.

REPO=${HERE%/*}
source "$REPO/scripts/lib/cli.sh"
source "$REPO/scripts/lib/checks.sh"
source "$REPO/scripts/lib/launch.sh"
source "$REPO/eval/server.sh"
source "$REPO/eval/evalscope.sh"

usage() {
  cat <<TEXT
usage: bash eval/${BENCHMARK}_eval.sh [options] [any flag of the server, passed through last]

Starts a server, waits until it answers with this model, runs evalscope against it, stops the server, and prints the
result with its confidence interval. The same command goes on after an interruption, and does nothing once it is done.
sbatch eval/${BENCHMARK}_eval.sh does the same in a job; options of sbatch override the #SBATCH lines.

  --dry-run   print the checks' result and the exact commands, start nothing
  --help

Variables, with their values here. The model and its server:
TEXT
  variable MODEL_PATH 'checkpoint in the Hugging Face format; one in FP8 is served in FP8'
  variable SERVED_NAME 'its name in requests and results'
  variable SERVER 'sglang, or transformers: transformers serve, small models, on a CPU too'
  variable SERVER_URL 'a server that is running already; several, separated by spaces: sglang-router before them'
  variable TP_SIZE 'GPUs of one copy of the model'
  variable DP_SIZE 'copies'
  variable CONTEXT_LENGTH "tokens; empty: the model's max_position_embeddings"
  variable MEM_FRACTION "share of a GPU's memory for weights and cache; empty: SGLang's choice"
  variable MAX_RUNNING_REQUESTS "requests at a time; empty: SGLang's choice"
  variable CHUNKED_PREFILL_SIZE 'tokens of a prompt in one step (sglang)'
  variable DEVICE 'cpu, cuda or auto (transformers)'
  variable API_PORT 'on 127.0.0.1; empty: a free one'
  echo "  API_KEY                    of the server; a random one for a SGLang that is started here"
  printf '\nThe benchmark and how it is asked:\n'
  variable OUT_DIR 'one run; other settings need another one'
  variable DATASET_LOCAL 'directory with the data, for machines without a network'
  variable EVALSCOPE "release: ${VERSIONS[0]}, or ${VERSIONS[1]}, which scores as the paper did (eval/setup_strict.sh)"
  variable GENERATED_NUM 'samples of a question'
  variable MAX_NEW_TOKENS 'tokens of an answer, at most'
  variable PROMPT_TOKENS 'tokens kept for a prompt'
  variable TEMPERATURE 'of sampling'
  variable TOP_P 'of sampling'
  variable SYSTEM_PROMPT "instead of the benchmark's; set to nothing: none"
  variable FEW_SHOT "worked examples before a question (gpqa); empty: the release's default"
  variable LIMIT 'only the first so many questions; the result is then not to be published'
  variable LABEL "what the result is called, for other data in this benchmark's format"
  if [[ -n ${START_DATE-} ]]; then
    variable START_DATE 'contests from'
    variable END_DATE 'contests to'
    variable ALLOW_CODE_EXECUTION "1: grade, that is run the model's programs, isolated (eval/isolate.sh); 0: only generate"
    variable GRADERS 'programs that run at a time'
  fi
  printf '\nThe run:\n'
  variable EVAL_BATCH 'questions at a time'
  variable EVAL_TIMEOUT 'seconds for an answer'
  variable READY_TIMEOUT 'seconds until the server must answer'
  variable MIN_FREE_MB 'free space that OUT_DIR must have'
  variable PYTHON 'interpreter with the packages of requirements.txt'
  variable STRICT_VENV "environment of release ${VERSIONS[1]}"
}

# eval_settings: defaults of all variables.
eval_settings() {
  : "${MODEL_PATH:=}" "${TP_SIZE:=1}" "${DP_SIZE:=1}" "${TEMPERATURE:=0.65}" "${TOP_P:=0.95}" "${LIMIT:=}"
  : "${SERVER_URL:=}" "${API_PORT:=}" "${API_KEY:=}" "${CONTEXT_LENGTH:=}" "${DATASET_LOCAL:=}"
  : "${EVALSCOPE:=${VERSIONS[0]}}" "${EVAL_TIMEOUT:=18000}" "${READY_TIMEOUT:=1800}" "${GRADERS:=1}"
  : "${MAX_RUNNING_REQUESTS:=}" "${CHUNKED_PREFILL_SIZE:=4096}" "${MEM_FRACTION:=}" "${ALLOW_CODE_EXECUTION:=0}"
  : "${LABEL:=$BENCHMARK}" "${FEW_SHOT:=}" "${DEVICE:=auto}" "${MIN_FREE_MB:=1024}"
  : "${STRICT_VENV:=$REPO/.venv-strict}"
  [[ -z $MODEL_PATH || ! -d $MODEL_PATH ]] || MODEL_PATH=$(cd "$MODEL_PATH" && pwd)
  : "${SERVED_NAME:=$(basename "${MODEL_PATH:-model}")}"
  : "${OUT_DIR:=$REPO/exp/eval/$SERVED_NAME/$BENCHMARK}"
  : "${SERVER:=$([[ -n $(command -v nvidia-smi) ]] && echo sglang || echo transformers)}"
  OUT_DIR=$(absolute "$OUT_DIR")
  default_python
}

check_settings() {
  local name
  one_of SERVER sglang transformers
  one_of EVALSCOPE "${VERSIONS[@]}"
  one_of ALLOW_CODE_EXECUTION 0 1
  positive MAX_NEW_TOKENS GENERATED_NUM EVAL_BATCH EVAL_TIMEOUT READY_TIMEOUT PROMPT_TOKENS TP_SIZE DP_SIZE GRADERS \
    ${LIMIT:+LIMIT} ${API_PORT:+API_PORT} ${CONTEXT_LENGTH:+CONTEXT_LENGTH} ${MAX_RUNNING_REQUESTS:+MAX_RUNNING_REQUESTS}
  for name in TEMPERATURE TOP_P; do
    [[ ${!name} =~ ^[0-9]*\.?[0-9]+$ ]] || die "$name: expected a number, found '${!name}'"
  done
  [[ -n $MODEL_PATH$SERVER_URL ]] || die "MODEL_PATH: set it to a checkpoint in the Hugging Face format, or SERVER_URL to a server"
  [[ -z $MODEL_PATH || -f $MODEL_PATH/config.json ]] || die "MODEL_PATH: expected a directory with config.json, found $MODEL_PATH"
  [[ $TEMPERATURE =~ [1-9] ]] || ((GENERATED_NUM == 1)) ||
    die "TEMPERATURE: at 0 all $GENERATED_NUM samples of a question are the same; set GENERATED_NUM=1"
  # transformers serve answers a request for n samples with one.
  [[ $EVALSCOPE != 0.17.1 || $SERVER != transformers || -n $SERVER_URL ]] || ((GENERATED_NUM == 1)) ||
    die "SERVER: transformers serve gives one sample for a request of n=$GENERATED_NUM, which evalscope 0.17.1 sends; set GENERATED_NUM=1 or another SERVER"
}

# check_sizes: the context holds the prompt and what may be generated, and the model can be split over TP_SIZE GPUs.
check_sizes() {
  [[ -n $MODEL_PATH ]] || return 0
  CONTEXT_LENGTH=$("$PYTHON" "$REPO/eval/check.py" sizes --model "$MODEL_PATH" --max-tokens "$MAX_NEW_TOKENS" \
    --prompt-tokens "$PROMPT_TOKENS" --tensor-parallel "$TP_SIZE" \
    ${CONTEXT_LENGTH:+--context-length "$CONTEXT_LENGTH"}) || exit 1
}

# check_dataset: sets QUESTIONS where the data is at hand.
check_dataset() {
  QUESTIONS=''
  [[ -n $DATASET_LOCAL ]] || return 0
  [[ -d $DATASET_LOCAL ]] || die "DATASET_LOCAL: expected a directory, found $DATASET_LOCAL"
  DATASET_LOCAL=$(cd "$DATASET_LOCAL" && pwd)
  QUESTIONS=$(offline "$EVAL_PYTHON" "$REPO/eval/check.py" dataset --benchmark "$BENCHMARK" --evalscope "$EVALSCOPE" \
    --path "$DATASET_LOCAL" ${START_DATE:+--window "$START_DATE" "$END_DATE"} ${LIMIT:+--limit "$LIMIT"}) || exit 1
}

# check_run: OUT_DIR holds this run or nothing. What decides the score is in run.json; another value would mix two runs.
check_run() {
  local settings=(
    "benchmark=$LABEL" "format=$BENCHMARK" "model=$SERVED_NAME" "model_path=$MODEL_PATH" "evalscope=$EVALSCOPE" "dataset=$DATASET_LOCAL"
    "questions=$QUESTIONS" "samples=$GENERATED_NUM" "max_tokens=$MAX_NEW_TOKENS" "temperature=$TEMPERATURE"
    "top_p=$TOP_P" "limit=$LIMIT" "window=${START_DATE+$START_DATE $END_DATE}"
    "server=${SERVER_URL:-$SERVER}" "few_shot=$FEW_SHOT" "system_prompt=${SYSTEM_PROMPT-default}"
  )
  "$PYTHON" "$REPO/eval/check.py" run --file "$OUT_DIR/run.json" ${1:+"$1"} -- "${settings[@]}" || exit 1
}

show() {
  printf '%s\n' "$BENCHMARK"
  printf '  %-10s %s\n' model "${MODEL_PATH:-$SERVED_NAME}${CONTEXT_LENGTH:+, context $CONTEXT_LENGTH tokens}" \
    server "${SERVER_URL:-$SERVER, tensor parallel $TP_SIZE, data parallel $DP_SIZE}" \
    evalscope "$EVALSCOPE" data "${DATASET_LOCAL:-from the hub}${QUESTIONS:+, $QUESTIONS questions}" \
    sampling "$GENERATED_NUM per question, temperature $TEMPERATURE, top-p $TOP_P, at most $MAX_NEW_TOKENS tokens" \
    output "$OUT_DIR"
}

# on_signal STATUS: the client and the server end in finish(), by the EXIT trap.
on_signal() {
  trap '' HUP INT TERM
  STOPPED=$1
  printf 'stopped by signal %s; run the same command again to continue\n' "$(($1 - 128))" >&2
  exit "$1"
}

# finish: nothing of this run is left, however it ended.
finish() {
  local status=$?
  trap - EXIT
  trap '' HUP INT TERM
  kill "${SLEEPER-}" 2>/dev/null || true
  stop_session "${CLIENT-}"
  stop_server
  [[ -z ${TEE-} ]] || last_lines "$TEE"
  exit "$status"
}

# wait_for_client: until evalscope ends; a server that dies ends it.
wait_for_client() {
  CLIENT_STATUS=0
  while kill -0 "$CLIENT" 2>/dev/null; do
    if [[ -n $SERVER_PID ]] && ! kill -0 "$SERVER_PID" 2>/dev/null; then
      stop_session "$CLIENT"
      die "the server died while evalscope ran: $(error_line <"$SERVER_LOG"); see $SERVER_LOG"
    fi
    sleep 1 &
    SLEEPER=$!
    wait "$SLEEPER" || true
  done
  wait "$CLIENT" || CLIENT_STATUS=$?
  CLIENT=''
}

# client LOG COMMAND...: in a session of its own, watched. No colours and cursor movements in a log.
client() {
  local log_fd
  exec {log_fd}> >(exec tee -aip "$1")
  TEE=$!
  NO_COLOR=1 TQDM_POSITION=0 setsid setpriv --pdeathsig TERM "${@:2}" >&"$log_fd" 2>&1 {log_fd}>&- &
  CLIENT=$!
  exec {log_fd}>&-
  wait_for_client
  last_lines "$TEE"
  ((CLIENT_STATUS == 0)) || die "evalscope failed with status $CLIENT_STATUS: $(error_line <"$1"); see $1, then run the same command again to continue"
}

main() {
  local stages=()
  eval_settings
  parse_cli "$@"
  SERVER_FLAGS=("${EXTRA_ARGS[@]}")
  check_settings
  find_evalscope
  check_sizes
  check_dataset
  server_command
  evalscope_arguments
  show >&2
  if ((DRY_RUN)); then
    [[ ${#SERVER_COMMAND[@]} == 0 ]] || { COMMAND=("${SERVER_COMMAND[@]}") && print_command; }
    evalscope_command generate && print_command
    if [[ $BENCHMARK == livecodebenchv5 ]]; then evalscope_command grade && print_command; fi
    exit
  fi
  check_room
  hold_lock "$OUT_DIR/.lock" "$@"
  check_run --write
  SERVER_LOG=$OUT_DIR/server.log EVAL_LOG=$OUT_DIR/evalscope.log CLIENT='' SERVER_PID=''
  if [[ -f $OUT_DIR/summary.json ]] && ! { ((ALLOW_CODE_EXECUTION)) && [[ -s $OUT_DIR/evalscope/grading/ungraded.jsonl ]]; }; then
    printf 'nothing to do: %s\n' "$OUT_DIR/summary.json" >&2
    summarize
    exit
  fi
  trap finish EXIT
  trap 'on_signal 129' HUP
  trap 'on_signal 130' INT
  trap 'on_signal 143' TERM
  if [[ ! -f $OUT_DIR/generated ]]; then
    start_server
    evalscope_command generate
    client "$EVAL_LOG" "${COMMAND[@]}"
    touch "$OUT_DIR/generated"
    stop_server
  fi
  if [[ $BENCHMARK == livecodebenchv5 ]]; then grade; fi
  summarize
}

# summarize: exit status 2 when the number is not to be published.
summarize() {
  "$PYTHON" "$REPO/eval/summarize.py" "$OUT_DIR" --output "$OUT_DIR"
}

# check_room: evalscope loses samples on a full disk.
check_room() {
  local free
  mkdir -p "$OUT_DIR" 2>/dev/null || die "OUT_DIR: cannot be made: $OUT_DIR"
  [[ -w $OUT_DIR ]] || die "OUT_DIR: cannot write to $OUT_DIR"
  free=$(df -Pm "$OUT_DIR" | awk 'END { print $4 }')
  ((free >= MIN_FREE_MB)) || die "OUT_DIR: expected $MIN_FREE_MB MB of free space, found $free in $OUT_DIR"
}

main "$@"
