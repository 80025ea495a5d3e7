# shellcheck shell=bash disable=SC2034,SC2153
# Ray: where its job server is, and one job from submission to its end.
#
# In: PYTHON, RAY_ADDRESS (optional). RAY_TEMP_DIR is the directory of one cluster: scripts/ray_start.sh writes
# the addresses of its head to RAY_TEMP_DIR/head, scripts/ray_stop.sh stops the processes that belong to it.

# Not under TMPDIR, which is often long, and another one in each job of a batch system.
RAY_TEMP_DIR=$(realpath -m -- "${RAY_TEMP_DIR:-/tmp/infir2-$UID/ray}")

# find_ray: RAY is the program beside PYTHON, or the one on PATH.
find_ray() {
  local python
  python=$(command -v "$PYTHON") || { missing "PYTHON: $PYTHON not found" && RAY=ray && return; }
  RAY=$(dirname "$python")/ray
  [[ -f $RAY && -x $RAY ]] || RAY=$(command -v ray) ||
    { missing "ray: not found beside $python or on PATH; run: $PYTHON -m pip install -r requirements.txt" && RAY=ray; }
}

# ray_address: the job server: RAY_ADDRESS, the head of RAY_TEMP_DIR, or Ray's default, if no one else has it.
ray_address() {
  local address=${RAY_ADDRESS-} user
  [[ -n $address || ! -r $RAY_TEMP_DIR/head ]] || read -r address _ <"$RAY_TEMP_DIR/head"
  [[ -n $address ]] || address=http://127.0.0.1:8265
  [[ $address == *://* || ! $address =~ ^[^/]+:[0-9]+$ ]] || address=http://$address
  [[ $address =~ ^https?://[^/]+ && ! $address =~ :(6379|${RAY_PORT:-6379})/?$ ]] ||
    die "RAY_ADDRESS: expected Ray's job server (its dashboard), e.g. http://127.0.0.1:8265, found '$RAY_ADDRESS'"
  if [[ -z ${RAY_ADDRESS-} && $address =~ //127\.0\.0\.1:([0-9]+) ]]; then
    user=$(listener "${BASH_REMATCH[1]}")
    [[ ${user:=$UID} == "$UID" ]] ||
      die "$address: belongs to another user ($user); run scripts/ray_start.sh --any-port, or set RAY_ADDRESS"
  fi
  printf '%s\n' "${address%/}"
}

# http_says URL TEXT: URL answers, not through a proxy, with TEXT somewhere. A demand for a token, which Ray's own
# programs bring, is an answer too.
http_says() {
  "$PYTHON" -c '
import sys, urllib.error, urllib.request
url, text = sys.argv[1:]
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10)
    sys.exit(text not in answer.read().decode())
except urllib.error.HTTPError as error:
    sys.exit(error.code not in (401, 403))
except Exception:
    sys.exit(1)' "$1" "$2"
}

# ray_answers ADDRESS: is it a job server of Ray?
ray_answers() { http_says "$1/api/version" ray_version; }

# with_ray ADDRESS COMMAND...: no proxy between us and the job server, and ADDRESS in the variables that Ray prefers
# to any argument.
with_ray() {
  local host=${1#*://}
  host=${host%%/*} && host=${host%:*}
  host=${host//[][]/},${no_proxy:-${NO_PROXY-}}
  env "RAY_ADDRESS=$1" "RAY_API_SERVER_ADDRESS=$1" "no_proxy=$host" "NO_PROXY=$host" "${@:2}"
}

# job_api ADDRESS SECONDS CODE WORD...: runs CODE with `client` connected to the job server, for at most so long (0: no
# limit). Ray's own requests wait for ever. timeout(1) also keeps Ctrl-C away.
job_api() {
  with_ray "$1" timeout "$2" "$PYTHON" -c "
import asyncio, os, sys, time
from ray.job_submission import JobSubmissionClient
client, words = JobSubmissionClient(os.environ['RAY_ADDRESS']), sys.argv[1:]
$3" "${@:4}"
}

# runtime_env WORKING_DIR NAME=VALUE...: the JSON for --runtime-env-json. In a VALUE, Ray itself replaces $NAME and
# ${NAME} where its own environment has them.
runtime_env() {
  "$PYTHON" -c '
import json, sys
env = {"env_vars": dict(word.split("=", 1) for word in sys.argv[2:])}
if sys.argv[1]:
    env["working_dir"] = sys.argv[1]
print(json.dumps(env))' "$@"
}

# find_job ADDRESS OUT_DIR: the id of the unfinished job that was submitted with this infir2_out_dir, or nothing.
find_job() {
  local said code='
jobs = [job for job in client.list_jobs() if (job.metadata or {}).get("infir2_out_dir") == words[0]]
jobs = [job for job in jobs if job.submission_id and job.status.value in ("PENDING", "RUNNING")]
print(max(jobs, key=lambda job: job.start_time).submission_id if jobs else "")'
  { said=$(job_api "$1" 60 "$code" "$2" 2>&1 >&3); } 3>&1 || die "Ray at $1: $(error_line <<<"$said")"
}

# catch_signals [ADDRESS ID]: from here on Ctrl-C and the like stop this job, or are kept for when there is one.
catch_signals() {
  local signal
  JOB=("$@")
  for signal in HUP:129 INT:130 TERM:143; do
    # shellcheck disable=SC2064  # now, not when the signal comes
    trap "stop_job SIG${signal%:*} ${signal#*:}" "${signal%:*}"
  done
}

# stop_job SIGNAL STATUS: Ray sends SIGTERM to the driver, and kills it if it then takes too long.
stop_job() {
  STOPPED=$2 INTERRUPTED=1
  ((${#JOB[@]})) || return 0
  printf '%s: asking Ray to stop job %s, which may first save\n' "$1" "${JOB[1]}" >&2
  job_api "${JOB[0]}" 60 '
while not client.stop_job(words[0]) and client.get_job_status(words[0]).value in ("PENDING", "RUNNING"):
    time.sleep(1)' "${JOB[1]}" 2>/dev/null || true
}

# apart COMMAND...: runs it in a process group of its own, as neither Ctrl-C nor a signal to the launcher's group may
# cut it off, and waits, which a signal only interrupts; CODE becomes its status.
apart() {
  start_apart "$@"
  await "$CHILD"
}

# submit_job ADDRESS ID: runs COMMAND, `ray job submit --no-wait --submission-id ID ...`. A signal that comes now is
# kept for follow_job.
submit_job() {
  local output said
  STOPPED=0 output=$(mktemp)
  catch_signals
  apart with_ray "$1" timeout 120 "${COMMAND[@]}" >"$output" 2>&1
  said=$(error_line <"$output") && rm -f "$output"
  ((CODE == 0)) || ((STOPPED)) || die "job $2 was not accepted by Ray at $1: $said"
  ((CODE == 0)) || exit "$STOPPED"
}

# follow_job ADDRESS ID LOG: shows the job's output and appends it to LOG, until it ends; sets STATUS (0 succeeded, 1
# failed, 128 + signal stopped) and JOB_MESSAGE, and STOPPED to 128 + signal if told to stop. LOG.following.ID
# holds what has been shown, so that a launcher that takes over, or a stream that broke, goes on from there.
follow_job() {
  local state lost=0 again=0 seen=$3.following.$2 other
  catch_signals "$1" "$2"
  ((${STOPPED:=0} == 0)) || stop_job signal "$STOPPED"
  touch "$seen"
  for other in "$3".following.*; do [[ $other == "$seen" ]] || rm -f "$other"; done
  while :; do
    apart stream_job "$1" "$2" "$3" "$seen" "$seen.state"
    state='' JOB_MESSAGE=''
    [[ -s $seen.state ]] || job_state "$1" "$2" >"$seen.state" || true
    read -r state JOB_MESSAGE <"$seen.state" || true
    rm -f "$seen.state"
    case $state in
      SUCCEEDED | FAILED | STOPPED) if ((CODE && !again)); then again=1; else break; fi ;;  # once more for the rest
      PENDING | RUNNING) lost=$((CODE ? lost + 1 : 0)) ;;
      *) lost=$((lost + 1)) ;;
    esac
    ((lost < 5)) || break
    ((lost != 1)) || warn "the Ray head at $1 does not answer; trying again"
    sleep 3 || true
  done
  case $state in
    SUCCEEDED) STATUS=0 ;;
    FAILED) STATUS=1 ;;
    STOPPED) STATUS=$((STOPPED ? STOPPED : 143)) ;;
    *) STATUS=1 JOB_MESSAGE="the Ray head at $1 no longer answers" ;;
  esac
  [[ $state =~ ^(SUCCEEDED|FAILED|STOPPED)$ ]] || return 0
  rm -f "$seen"
  ((!CODE)) || warn "Ray could not show all of the job's output; on its head: session_latest/logs/job-driver-$2.log"
}

# Of a job: its status and Ray's message, without the output that Ray quotes.
readonly JOB_STATE='
def state(job):
    info = client.get_job_info(job)
    return " ".join((info.status.value, *(info.message or "").split(", last available logs")[0].split()))

'

# job_state ADDRESS ID
job_state() { job_api "$1" 30 "$JOB_STATE"'print(state(words[0]))' "$2" 2>/dev/null; }

# stream_job ADDRESS ID LOG SEEN STATE: the job's output from where SEEN ends, which grows like LOG. Status 0 if the
# stream ended by itself and had something to say; STATE then says what job_state does, if Ray still answers. Three
# things are watched: a head that is killed may leave the connection open, a job whose supervisor died may stay PENDING
# (Ray itself gives up after 900 s), and the launcher may be gone.
stream_job() {
  job_api "$1" 0 "$JOB_STATE"'
job, skip, launcher, file, got = words[0], int(words[1]), words[2], words[3], 0

async def copy():
    global got
    async for text in client.tail_job_logs(job):
        data = text.encode()
        sys.stdout.buffer.write(data[max(0, skip - got) :])
        sys.stdout.buffer.flush()
        got += len(data)

async def watch():
    while True:
        for _ in range(30):
            await asyncio.sleep(1)
            os.stat("/proc/" + launcher)
        info = await asyncio.wait_for(asyncio.to_thread(client.get_job_info, job), 60)
        if info.status.value == "PENDING" and time.time() - info.start_time / 1000 > 1000:
            return

async def main():
    copying, watching = asyncio.ensure_future(copy()), asyncio.ensure_future(watch())
    await asyncio.wait({copying, watching}, return_when=asyncio.FIRST_COMPLETED)
    ended = copying.done() and not copying.exception()
    if ended:
        try:
            said = await asyncio.wait_for(asyncio.to_thread(state, job), 30)
            with open(file, "w") as output:
                print(said, file=output)
        except Exception:
            pass
    os._exit(not (got and ended))

asyncio.run(main())' "$2" "$(stat -c %s "$4")" "$$" "$5" 2>/dev/null | tee -aip "$4" "$3"
}
