#!/usr/bin/env bash
# Start a Ray head on this machine, or join one as a worker; return when it is ready for jobs.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib/all.sh"
source "$REPO/scripts/lib/ray.sh"

usage() {
  cat <<EOF
usage: bash scripts/ray_start.sh [options] [-- more flags of ray start]

  --worker HOST[:PORT]  join the head at HOST; PORT is that of its GCS (6379), not that of its dashboard (8265)
  --any-port            a head on free ports, so that several clusters fit on one machine
  --dry-run             print the exact command, change nothing
  --help

The same command again does nothing while the cluster answers, and replaces one that was killed. The addresses are
printed and kept in RAY_TEMP_DIR/head. scripts/ray_stop.sh stops it.

Variables, with their values here:
EOF
  variable MASTER_ADDR 'IP address of the head; for 127.0.0.1 Ray takes its address to the outside'
  variable RAY_PORT 'port of the GCS, which workers join'
  variable RAY_DASHBOARD_HOST 'from where jobs, that is any program, can be submitted; 0.0.0.0: from everywhere'
  variable RAY_DASHBOARD_PORT 'port of the dashboard and job server'
  variable RAY_AUTH_MODE 'disabled, or token: who has ~/.ray/auth_token; export it for workers and launchers too'
  variable NUM_GPUS 'GPUs of this machine that Ray has'
  variable NUM_CPUS 'its CPUs; empty: all'
  variable RAY_TEMP_DIR 'sockets and logs; one directory is one head or worker'
  variable RAY_JOB_STOP_WAIT_TIME_S 'seconds from SIGTERM to SIGKILL for a job that is told to stop'
  variable RAY_START_TIMEOUT 'seconds that a worker waits for its head'
  variable PYTHON 'interpreter that has Ray'
}

count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    grep -o '[^,]\+' <<<"$CUDA_VISIBLE_DEVICES" | wc -l
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU'
  fi || true
}

: "${MASTER_ADDR:=127.0.0.1}" "${RAY_PORT:=6379}" "${RAY_DASHBOARD_HOST:=127.0.0.1}" "${RAY_DASHBOARD_PORT:=8265}"
: "${NUM_GPUS:=$(count_gpus)}" "${NUM_CPUS:=}" "${RAY_START_TIMEOUT:=300}" "${RAY_AUTH_MODE:=disabled}"
: "${RAY_JOB_STOP_WAIT_TIME_S:=300}"  # Ray's 3 s are too few to save a checkpoint in
default_python

OWN_FLAGS=(--worker) OWN_SWITCHES=(--any-port) WORKER='' ANY_PORT=0 ARGUMENTS=("$@")
parse_cli "$@"
if [[ ${EXTRA_ARGS-} == -- ]]; then
  EXTRA_ARGS=("${EXTRA_ARGS[@]:1}")
elif ((${#EXTRA_ARGS[@]})); then
  die "${EXTRA_ARGS[0]}: unknown option; see bash scripts/ray_start.sh --help"
fi
set -- "${EXTRA_ARGS[@]}"
[[ $NUM_GPUS =~ ^[0-9]+$ ]] || die "NUM_GPUS: expected an integer >= 0, found '$NUM_GPUS'"
positive RAY_PORT RAY_DASHBOARD_PORT RAY_JOB_STOP_WAIT_TIME_S RAY_START_TIMEOUT ${NUM_CPUS:+NUM_CPUS}
if [[ -n $WORKER ]]; then
  [[ $WORKER == *:* ]] || WORKER=$WORKER:$RAY_PORT
  [[ $WORKER =~ ^[A-Za-z0-9._-]+:[1-9][0-9]*$ ]] || die "--worker: expected HOST[:PORT] of the head, found '$WORKER'"
fi
find_ray

# <107 bytes of a socket> - </session_2026-11-26_00-04-57_477945_1234567/sockets/dash_MetricsHead>
readonly LONGEST=39
bytes() { local LC_ALL=C && printf '%s\n' "${#1}"; }
(($(bytes "$RAY_TEMP_DIR") <= LONGEST)) ||
  die "RAY_TEMP_DIR: expected at most $LONGEST bytes, as sockets have long names in it, found '$RAY_TEMP_DIR'"

# A port outside of the range that the kernel gives to programs that ask for any.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12768)) && [[ -n $(listener "$port") ]]; do :; done
  printf -v "$1" '%s' "$port"
}

# named_port NAME: one that others know, so that it cannot be replaced.
named_port() {
  local user
  user=$(listener "${!1}")
  [[ -z $user ]] || missing "$1: ${!1} is in use (by user $user); set $1, or use --any-port"
}

# RAY_TEMP_DIR/head and /worker: <job server, or - on a worker> <GCS> <agent of this node>.
STATE=$RAY_TEMP_DIR/$([[ -n $WORKER ]] && echo worker || echo head)
PARTIAL=$RAY_TEMP_DIR/.${STATE##*/}.partial

# ready: the agent is what starts jobs; the dashboard answers long before it.
ready() {
  local jobs agent
  read -r jobs _ agent <"$1" && http_says "$agent/api/local_raylet_healthz" success || return 1
  [[ $jobs == - ]] || { http_says "$jobs/api/gcs_healthz" success && ray_answers "$jobs"; }
}

# await WHAT SECONDS TEST...: until TEST holds.
await() {
  local start=$SECONDS said=$SECONDS
  until "${@:3}"; do
    ((SECONDS - start < $2)) || return 1
    if ((SECONDS - said >= 10)); then
      printf 'waiting for %s (%s s)\n' "$1" $((SECONDS - start)) >&2
      said=$SECONDS
    fi
    sleep 0.5
  done
}

announce() {
  local jobs gcs again=''
  read -r jobs gcs _ <"$STATE"
  printf '%s\n  GCS         %s\n' "$1" "$gcs"
  if [[ $STATE == */head ]]; then
    [[ $gcs != *:6379 ]] || again='  (or without :6379)'
    printf '  job server  %s\n  a worker    bash scripts/ray_start.sh --worker %s%s\n' "$jobs" "$gcs" "$again"
  fi
}

build_command() {
  local client
  COMMAND=(
    env -u RAY_ADDRESS -u RAY_API_SERVER_ADDRESS "INFIR2_RAY_TEMP_DIR=$RAY_TEMP_DIR"  # how ray_stop.sh knows them
    RAY_USAGE_STATS_ENABLED=0 RAY_COLOR_PREFIX=0 "RAY_JOB_STOP_WAIT_TIME_S=$RAY_JOB_STOP_WAIT_TIME_S"
    # or a head would ask for a token, and workers and clients not send it, where ~/.ray/auth_token happens to be there
    "RAY_AUTH_MODE=$RAY_AUTH_MODE"
    DASHBOARD_METRIC_PORT=0 AUTOSCALER_METRIC_PORT=0  # any free one, as for all ports that Ray need not be told
    "$RAY" start --disable-usage-stats --log-style record --log-color false --temp-dir "$RAY_TEMP_DIR"
    --num-gpus "$NUM_GPUS" ${NUM_CPUS:+--num-cpus "$NUM_CPUS"} --min-worker-port 0 --max-worker-port 0
  )
  free_port AGENT_PORT
  COMMAND+=(--dashboard-agent-listen-port "$AGENT_PORT")
  if [[ -n $WORKER ]]; then
    COMMAND+=(--address "$WORKER" "$@")
    return
  fi
  if ((ANY_PORT)); then
    RAY_PORT=0
    free_port RAY_DASHBOARD_PORT
  else
    named_port RAY_PORT
    named_port RAY_DASHBOARD_PORT
  fi
  free_port client
  COMMAND+=(
    --head --node-ip-address "$MASTER_ADDR" --port "$RAY_PORT" --ray-client-server-port "$client"
    --dashboard-host "$RAY_DASHBOARD_HOST" --dashboard-port "$RAY_DASHBOARD_PORT" "$@"
  )
}

opens() { timeout 5 bash -c ": </dev/tcp/${1/://}" 2>/dev/null; }

gone() { ! kill -0 "$1" 2>/dev/null; }

# start_once: on failure REASON says why.
start_once() {
  local pid gcs host jobs=-
  set -m  # Ctrl-C in this terminal is not for Ray's processes
  "${COMMAND[@]}" </dev/null >"$LOG" 2>&1 &
  pid=$!
  set +m
  await 'the processes of Ray' 600 gone "$pid" || kill "$pid"
  wait "$pid" || { REASON=$(error_line <"$LOG") && return 1; }
  read -r gcs <"$RAY_TEMP_DIR/ray_current_cluster"  # where Ray's own programs look
  host=$RAY_DASHBOARD_HOST
  [[ $host != 0.0.0.0 && $host != :: ]] || host=${gcs%:*}
  [[ -n $WORKER ]] && gcs=$WORKER || jobs=http://$host:$RAY_DASHBOARD_PORT
  printf '%s %s http://127.0.0.1:%s\n' "$jobs" "$gcs" "$AGENT_PORT" >"$PARTIAL"
  await 'its agent' 120 ready "$PARTIAL" || { REASON='its agent does not answer' && return 1; }
  mv "$PARTIAL" "$STATE"
}

stop_all() { bash "$REPO/scripts/ray_stop.sh" && rm -f "$PARTIAL"; }

if ((DRY_RUN)); then
  build_command "$@"
  print_command
  exit
fi

(umask 077 && mkdir -p "$RAY_TEMP_DIR")
[[ -O $RAY_TEMP_DIR && ($RAY_TEMP_DIR != "/tmp/infir2-$UID/ray" || -O ${RAY_TEMP_DIR%/*}) ]] ||
  die "RAY_TEMP_DIR: $RAY_TEMP_DIR belongs to another user"
hold_lock "$RAY_TEMP_DIR/.lock" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
for other in "$RAY_TEMP_DIR"/{head,worker}; do
  answers=0
  for _ in 1 2 3; do
    [[ -e $other ]] || break
    ready "$other" && answers=1 && break
    sleep 1
  done
  ((answers)) || continue
  [[ $other == "$STATE" ]] ||
    die "RAY_TEMP_DIR: $RAY_TEMP_DIR is that of a running ${other##*/}; set another one"
  [[ -z $WORKER || " $(<"$STATE") " == *" $WORKER "* ]] ||
    die "--worker $WORKER: $RAY_TEMP_DIR has joined another head; first run scripts/ray_stop.sh"
  announce 'nothing to do: Ray is running'
  exit
done
LEFT=$(bash "$REPO/scripts/ray_stop.sh" --dry-run | wc -l)
if ((LEFT)); then
  warn "$RAY_TEMP_DIR: stopping the $LEFT processes that are left of a cluster that does not answer"
  stop_all >&2
fi

if [[ -n $WORKER ]]; then
  ! http_says "http://$WORKER/api/version" ray_version ||
    die "--worker: $WORKER is a dashboard; expected the port of the GCS, 6379 unless the head printed another one"
  await "the head at $WORKER" "$RAY_START_TIMEOUT" opens "$WORKER" ||
    die "--worker: nothing answers at $WORKER; expected the GCS of a head, as scripts/ray_start.sh prints it there"
fi

LOG=$RAY_TEMP_DIR/start.log
trap 'stop_all >/dev/null 2>&1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# On a busy machine Ray gives up after 30 s without its raylet, a number that cannot be set.
for attempt in 1 2 3; do
  build_command "$@"
  printf 'starting Ray, %s GPUs, in %s\n' "$NUM_GPUS" "$RAY_TEMP_DIR" >&2
  start_once && break
  ((attempt < 3)) || die "Ray did not start in 3 attempts: $REASON; see $LOG"
  warn "attempt $attempt of 3: $REASON; trying again"
  stop_all >/dev/null
done
trap - EXIT
announce "Ray is running: $NUM_GPUS GPUs"
