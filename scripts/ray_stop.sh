#!/usr/bin/env bash
# Stop the Ray processes of one directory, and nothing else on this machine. Needs only /proc.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib/all.sh"
source "$REPO/scripts/lib/ray.sh"

usage() {
  cat <<EOF
usage: bash scripts/ray_stop.sh [--dry-run]

Stops the head or worker that scripts/ray_start.sh started in RAY_TEMP_DIR (here: $RAY_TEMP_DIR), with its jobs and
actors: SIGTERM, and SIGKILL for what is left after $GRACE_S s (GRACE_S). Other clusters, also of the same user, are not
touched. To let a running job save first, stop its launcher with Ctrl-C.

  --dry-run   list the processes, change nothing
  --help
EOF
}

: "${GRACE_S:=15}"
parse_cli "$@"
((!${#EXTRA_ARGS[@]})) || die "${EXTRA_ARGS[0]}: unknown option; see bash scripts/ray_stop.sh --help"
[[ $GRACE_S =~ ^[0-9]+$ ]] || die "GRACE_S: expected seconds, found '$GRACE_S'"

# Start time by process id: kept between scans, as a process whose parent died no longer shows where it belongs, and
# compared, as an id may be given to a new process.
declare -A FOUND=() ALIVE=()

# belongs DIR: ray_start.sh marks all it starts in the environment, which children inherit; Ray's own options name the
# session directory. Processes that set their title overwrite both: they are found as descendants.
belongs() {
  local words=() more=() word
  mapfile -d '' -t words <"$1/cmdline"
  mapfile -d '' -t more <"$1/environ"
  for word in "${words[@]}" "${more[@]}"; do
    [[ $word != "INFIR2_RAY_TEMP_DIR=$RAY_TEMP_DIR" && $word != --*="$RAY_TEMP_DIR/session_"* ]] || return 0
  done
  return 1
} 2>/dev/null

# scan: FOUND gains all processes of the cluster, ALIVE becomes those that live.
scan() {
  local dir pid line fields above grown=1
  local -A parent=() start=()
  for dir in /proc/[0-9]*; do
    [[ -O $dir ]] || continue
    read -r line <"$dir/stat" || continue
    read -r -a fields <<<"${line##*) }"  # state, parent, ... follow the name, which may hold spaces
    pid=${dir#/proc/}
    [[ ${fields[0]} != [ZX] && $pid != "$$" ]] || continue
    parent[$pid]=${fields[1]} start[$pid]=${fields[19]}
    ! belongs "$dir" || FOUND[$pid]=${start[$pid]}
  done 2>/dev/null
  while ((grown)); do
    grown=0
    for pid in "${!parent[@]}"; do
      above=${parent[$pid]}
      [[ ${FOUND[$above]-none} != "${start[$above]-}" || ${FOUND[$pid]-} == "${start[$pid]}" ]] ||
        FOUND[$pid]=${start[$pid]} grown=1
    done
  done
  ALIVE=()
  for pid in "${!FOUND[@]}"; do [[ ${FOUND[$pid]} != "${start[$pid]-}" ]] || ALIVE[$pid]=1; done
}

# end SIGNAL SECONDS: until nothing is left. The GCS goes last: a raylet that stops says so there, and waits long for
# an answer. Each process is told once, as a second signal would cut short what it does on the first.
end() {
  local deadline=$((SECONDS + $2)) pid
  local -A told=()
  while scan && ((${#ALIVE[@]})); do
    for pid in "${!ALIVE[@]}"; do
      [[ -z ${told[$pid]-} ]] || continue
      ((${#ALIVE[@]} == 1)) || [[ $(<"/proc/$pid/comm") != gcs_server ]] || continue
      kill "-$1" "$pid" && told[$pid]=1
    done 2>/dev/null
    ((SECONDS < deadline)) || return 1
    sleep 0.3
  done
}

if ((DRY_RUN)); then
  scan
  for pid in "${!ALIVE[@]}"; do printf '%s %s\n' "$pid" "$(tr '\0' ' ' <"/proc/$pid/cmdline")"; done 2>/dev/null
  exit
fi
end TERM "$GRACE_S" || end KILL 10 || die "RAY_TEMP_DIR: processes of $RAY_TEMP_DIR that cannot be killed: ${!ALIVE[*]}"
rm -f "$RAY_TEMP_DIR"/{head,worker}
if ((${#FOUND[@]})); then
  printf 'stopped %s processes of Ray in %s\n' "${#FOUND[@]}" "$RAY_TEMP_DIR"
else
  printf 'nothing to do: no Ray runs in %s\n' "$RAY_TEMP_DIR"
fi
