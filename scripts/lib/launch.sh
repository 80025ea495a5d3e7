# shellcheck shell=bash
# Print a command, or run it and judge its end.
#
# In: COMMAND (everything from `env VAR=value ...` on) ENGINE OUT_DIR SAVE_DIR START TRAIN_ITERS NNODES UNIT

# print_command: one flag per line, quoted so that it can be pasted.
print_command() {
  local word text
  printf '%q' "${COMMAND[0]}"
  for word in "${COMMAND[@]:1}"; do
    text=$word
    [[ $word =~ ^[[:alnum:]_./:=,+@%-]+$ ]] || text=${word@Q}
    if [[ $word == --* ]]; then printf ' \\\n  %s' "$text"; else printf ' %s' "$text"; fi
  done
  printf '\n'
}

# engine_commit SUBMODULE: of the pinned upstream, or of this repository for the embedded engine.
engine_commit() {
  local dir=$REPO
  [[ $ENGINE == embedded ]] || dir=$REPO/training/$1
  [[ -e $dir/.git ]] && git -C "$dir" rev-parse --short=12 HEAD 2>/dev/null || echo 'commit unknown'
}

# hold_lock FILE ARG...: one run at a time. Children inherit the lock, so that it also stands for a child whose parent
# was killed. After a wait the script starts over with ARG..., as what is on disk has changed.
hold_lock() {
  mkdir -p "$(dirname "$1")"
  [[ -n $(command -v flock) ]] || { warn 'flock: not found; a second run of this would not be noticed' && return; }
  exec {LOCK_FD}>>"$1"
  ! flock --nonblock "$LOCK_FD" || return 0
  printf 'another run is using %s; waiting for it to end\n' "$(dirname "$1")" >&2
  flock "$LOCK_FD"
  exec {LOCK_FD}>&-  # or the next attempt would wait for this one
  exec "$BASH" "$0" "${@:2}"
}

# children PID: read from /proc, as containers often lack pgrep.
children() {
  local file fields parent
  for file in /proc/[0-9]*/stat; do
    read -r fields <"$file" || continue
    read -r _ parent _ <<<"${fields##*) }"  # "state parent ..." follows the name, which may hold spaces
    [[ $parent != "$1" ]] || printf '%s\n' "${file//[!0-9]/}"
  done 2>/dev/null
}

# stop_child SIGNAL STATUS: SIGTERM makes the engine save and leave (--exit-signal-handler). torchrun would kill
# its workers 30 s after its own SIGTERM, too early for a 7B checkpoint, so its workers are told instead.
stop_child() {
  local targets=()
  STOPPED=$2
  printf '%s: asking the trainer to save and stop\n' "$1" >&2
  [[ $ENGINE != megatron ]] || mapfile -t targets < <(children "$CHILD")
  kill -TERM "${targets[@]:-$CHILD}" 2>/dev/null || true
}

# error_line: of the output of a program, the line that says what went wrong.
error_line() {
  local text
  text=$(grep -a . || true)
  grep -aE '^[A-Za-z_.]*(Error|Exception): ' <<<"$text" | tail -n 1 | cut -c 1-300 || tail -n 1 <<<"$text"
}

# last_lines PID: until tee has shown all; not for ever, as a daemon that was left may hold the pipe.
last_lines() {
  for _ in {1..50}; do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.1
  done
}

# start_apart COMMAND...: starts CHILD in a process group of its own. Ctrl-C reaches it through a trap, once, if at all.
start_apart() {
  set -m
  "$@" &
  CHILD=$!
  set +m
}

# await PID: until it ends, through signals whose trap sets INTERRUPTED; CODE becomes its status.
await() {
  while INTERRUPTED=0 CODE=0; do
    wait "$1" || CODE=$?
    ((INTERRUPTED)) || break
  done
}

# run_child LOG: runs COMMAND, shows and logs its output; sets STATUS, and STOPPED to 128 + signal if told to stop.
# On a terminal the embedded engine draws a progress bar (PROGRESS_FD) in place of its log lines.
run_child() {
  local tee_pid log_fd out_fd progress_fd progress=()
  STOPPED=0
  exec {log_fd}> >(exec tee -aip "$1")
  tee_pid=$!
  trap 'INTERRUPTED=1; stop_child SIGHUP 129' HUP
  trap 'INTERRUPTED=1; stop_child SIGINT 130' INT
  trap 'INTERRUPTED=1; stop_child SIGTERM 143' TERM
  if [[ $ENGINE == embedded && -t 2 ]]; then
    exec {out_fd}>>"$1" {progress_fd}>&2
    progress=(env "PROGRESS_FD=$progress_fd")
  else
    exec {out_fd}>&"$log_fd"
  fi
  # The signal that the trap sends is the one that saves.
  start_apart "${progress[@]}" "${COMMAND[@]}" >&"$out_fd" 2>&"$log_fd" {log_fd}>&- {out_fd}>&-
  exec {log_fd}>&- {out_fd}>&-
  await "$CHILD"
  STATUS=$CODE
  last_lines "$tee_pid"
}

# judge_run LOG: success is status 0 and the tracker at its target. All else says what to do and exits with 75
# (time slice over), 128 + signal, or the trainer's own status. UNIT: what START and TRAIN_ITERS count.
judge_run() {
  local reached done_now
  read_tracker "$SAVE_DIR"
  done_now=${TRACKER:-0}
  # slime's tracker holds the id of the last rollout, from 0.
  [[ ${UNIT:=iteration} != rollout || -z $TRACKER ]] || done_now=$((TRACKER + 1))
  reached="$UNIT $done_now of $TRAIN_ITERS"
  local again="run the same command again to continue"
  if ((STATUS == 0 && done_now >= TRAIN_ITERS)); then
    printf 'done: %s, checkpoints in %s\n' "$reached" "$SAVE_DIR" >&2
  elif ((STOPPED)); then
    printf 'stopped: saved at %s; %s\n' "$reached" "$again" >&2 && exit "$STOPPED"
  elif ((STATUS == 0 && done_now > START)); then
    printf 'time slice over: saved at %s; %s\n' "$reached" "$again" >&2 && exit 75
  elif ((STATUS == 0)); then
    die "the trainer exited with status 0 but saved nothing new (at $reached); see $1"
  else
    printf 'error: the trainer failed with status %s (saved at %s); see %s, then %s\n' \
      "$STATUS" "$reached" "$1" "$again" >&2 && exit "$STATUS"
  fi
}
