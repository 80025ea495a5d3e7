# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# The server of one evaluation: started in a session of its own, asked until it answers with the right model, stopped.

# choose_port: from the job, so that two on one node differ; the next free one.
choose_port() {
  if [[ -n $API_PORT ]]; then
    ((DRY_RUN)) || [[ -z $(listener "$API_PORT") ]] || die "API_PORT: $API_PORT is in use"
    return
  fi
  API_PORT=$((20000 + ${SLURM_JOB_ID:-$$} % 12000))
  ((DRY_RUN)) || while [[ -n $(listener "$API_PORT") ]]; do API_PORT=$((API_PORT + 1)); done
}

# server_command: SERVER_COMMAND (empty where one is running already), URL, MODEL_NAME as the server knows it.
server_command() {
  read -r -a WORKERS <<<"$SERVER_URL"
  WORKERS=("${WORKERS[@]%/}")
  WORKERS=("${WORKERS[@]%/v1}")
  SERVER_COMMAND=() MODEL_NAME=$SERVED_NAME
  if ((${#WORKERS[@]} == 1)); then
    URL=${WORKERS[0]}
    : "${API_KEY:=EMPTY}"
    return
  fi
  choose_port
  URL=http://127.0.0.1:$API_PORT
  if ((${#WORKERS[@]} > 1)); then
    : "${API_KEY:=EMPTY}"
    SERVER_COMMAND=("$PYTHON" -m sglang_router.launch_router --worker-urls "${WORKERS[@]}" --host 127.0.0.1 --port "$API_PORT"
      --policy power_of_two)  # the default keeps one worker busy until the others are 64 behind
    [[ $API_KEY == EMPTY ]] || SERVER_COMMAND+=(--api-key "$API_KEY")
  elif [[ $SERVER == sglang ]]; then
    # Only this run's client knows the key; a fixed one would also fit another user's server on this port.
    [[ -n $API_KEY ]] || if ((DRY_RUN)); then API_KEY=RANDOM; else API_KEY=$(od -An -N 16 -tx1 /dev/urandom | tr -d ' \n'); fi
    SERVER_COMMAND=(
      "$PYTHON" -m sglang.launch_server --model-path "$MODEL_PATH" --served-model-name "$SERVED_NAME"
      --host 127.0.0.1 --port "$API_PORT" --api-key "$API_KEY" --tp-size "$TP_SIZE" --dp-size "$DP_SIZE"
      --context-length "$CONTEXT_LENGTH" --chunked-prefill-size "$CHUNKED_PREFILL_SIZE"
    )
    [[ -z $MAX_RUNNING_REQUESTS ]] || SERVER_COMMAND+=(--max-running-requests "$MAX_RUNNING_REQUESTS")
    [[ -z $MEM_FRACTION ]] || SERVER_COMMAND+=(--mem-fraction-static "$MEM_FRACTION")
  else
    # It has neither keys nor names for models, and whether it samples the model's generation_config.json decides.
    : "${API_KEY:=EMPTY}"
    MODEL_NAME=$OUT_DIR/model
    SERVER_COMMAND=(
      env HF_HUB_OFFLINE=1 "$PYTHON" -m transformers.cli.transformers serve "$MODEL_NAME"
      --host 127.0.0.1 --port "$API_PORT" --device "$DEVICE"
    )
  fi
  SERVER_COMMAND+=("${SERVER_FLAGS[@]}")
}

# start_server: returns when it has answered one request with the right model.
start_server() {
  local flags=(--url "$URL" --model "$MODEL_NAME" --timeout "$READY_TIMEOUT" --log "$SERVER_LOG") url
  if ((${#SERVER_COMMAND[@]})); then
    [[ $MODEL_NAME != "$OUT_DIR/model" ]] || "$PYTHON" "$REPO/eval/check.py" view --model "$MODEL_PATH" \
      --output "$MODEL_NAME" --temperature "$TEMPERATURE" >/dev/null || exit 1
    printf 'starting the server at %s; its output: %s\n' "$URL" "$SERVER_LOG" >&2
    setsid setpriv --pdeathsig TERM "${SERVER_COMMAND[@]}" >>"$SERVER_LOG" 2>&1 </dev/null &
    SERVER_PID=$!
    flags+=(--pid "$SERVER_PID")
    for url in "${WORKERS[@]}"; do flags+=(--worker "$url"); done
  fi
  API_KEY=$API_KEY "$PYTHON" "$REPO/eval/probe.py" "${flags[@]}" &
  CLIENT=$!
  wait "$CLIENT" || exit 1
  CLIENT=''
}

# session SID: the processes of a session, those too that changed their group.
session() {
  local file fields
  for file in /proc/[0-9]*/stat; do
    read -r fields <"$file" || continue
    read -r -a fields <<<"${fields##*) }"  # state ppid pgrp session ... follow the name, which may hold spaces
    [[ ${fields[3]} != "$1" || ${fields[0]} == [ZX] ]] || printf '%s\n' "${file//[!0-9]/}"
  done 2>/dev/null
}

# stop_session PID: SIGTERM to all of the session that PID leads, and SIGKILL to what is left after 8 s: Slurm's KillWait
# may be as short as 10 s.
stop_session() {
  local left signal=TERM attempt
  [[ -n ${1-} ]] || return 0
  for attempt in {1..50}; do
    mapfile -t left < <(session "$1")
    ((${#left[@]})) || return 0
    ((attempt != 40)) || signal=KILL
    ((attempt != 1 && attempt < 40)) || kill "-$signal" "${left[@]}" 2>/dev/null || true
    sleep 0.2
  done
  warn "processes that cannot be killed: ${left[*]}"
}

stop_server() {
  [[ -n ${SERVER_PID-} ]] || return 0
  printf 'stopping the server\n' >&2
  stop_session "$SERVER_PID"
  SERVER_PID=''
}
