#!/usr/bin/env bash
# Run a grader where programs that a model wrote may run: no network, no privileges, nothing to write but a copy.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib/cli.sh"
source "$REPO/scripts/lib/checks.sh"

usage() {
  cat <<TEXT
usage: bash eval/isolate.sh DIRECTORY COMMAND...

COMMAND works on a copy of DIRECTORY, which it sees in its place; if it succeeds, what it wrote comes back. All else is
read-only. Docker if it has the image GRADER_IMAGE, else the kernel's user namespaces (unshare).

Variables, with their values here:
TEXT
  variable ISOLATION 'auto, docker or namespaces'
  variable GRADER_IMAGE 'an image whose python3 has this evalscope'
  variable GRADE_TIMEOUT 'seconds for all'
  variable GRADE_MEMORY_MB 'of each process'
  variable GRADE_PROCESSES 'at a time, at most'
  variable DATASET_LOCAL 'directory with data that COMMAND reads'
}

: "${ISOLATION:=auto}" "${GRADER_IMAGE:=infir2-training:latest}" "${GRADE_TIMEOUT:=86400}" "${GRADE_MEMORY_MB:=16384}" "${GRADE_PROCESSES:=1024}"

# inside WHERE DIRECTORY COMMAND...: in the namespaces, as their root, which outside is nobody special.
inside() {
  local point options kind
  mount --make-rprivate /
  mount --bind "$1" "$1"
  mount --bind "$1/copy" "$2"
  # Flags that the outer mount has cannot be dropped, so each is named again.
  while read -r _ _ _ _ point options kind; do
    point=$(printf '%b' "$point")
    kind=${kind#*- }
    [[ $point != "$1" && $point != "$2" && $kind != @(proc|sysfs|devpts|mqueue|cgroup|cgroup2)\ * ]] || continue
    [[ ,$options, == *,rw,* ]] || continue
    mount -o "remount,bind,${options/rw/ro}" "$point" 2>/dev/null || [[ $point == /dev* || ! -w $point ]] ||
      { printf 'error: %s: cannot be made read-only\n' "$point" >&2 && exit 1; }
  done </proc/self/mountinfo
  mount -t tmpfs -o size=1g,mode=0700 tmpfs "$1/tmp"
  [[ ! -d /dev/shm ]] || mount -t tmpfs -o size=256m tmpfs /dev/shm
  mount -t proc proc /proc
  ip link set lo up 2>/dev/null || true  # for the grader's own processes
  cd "$1/tmp"
  ulimit -c 0 -f $((1 << 18)) -v $((GRADE_MEMORY_MB * 1024)) -u "$GRADE_PROCESSES"
  exec env -i "PATH=$PATH" "HOME=$1/tmp" "TMPDIR=$1/tmp" LANG=C.UTF-8 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
    "PYTHONPATH=$REPO" PYTHONDONTWRITEBYTECODE=1 "HF_HOME=$1/tmp/hf" "MODELSCOPE_CACHE=$1/tmp/ms" \
    setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "${@:3}"
}

# as_nobody WHERE DIRECTORY COMMAND...: root in a user namespace would be root for the files outside, so the user nobody
# makes it. Nobody may not enter every directory on the way to what is needed: such a one is hidden, here only, under an
# empty one that holds nothing else.
as_nobody() {
  local where=$1 nobody=(setpriv --reuid 65534 --regid 65534 --clear-groups) needed=("$2" "$REPO") path barrier number
  local -A hidden=()
  for path in "${@:3}" ${DATASET_LOCAL:+"$DATASET_LOCAL"}; do
    [[ $path != /* || ! -d $path ]] || needed+=("$path")
    [[ $path != */bin/python* ]] ||
      mapfile -t -O "${#needed[@]}" needed < <("$path" -c 'import sys; print(sys.prefix, sys.base_prefix, sep="\n")')
  done
  mount --make-rprivate /
  for number in "${!needed[@]}"; do
    path=${needed[number]} barrier=''
    [[ $path != "$2"/* ]] || continue
    while [[ $barrier != "$path" ]] && "${nobody[@]}" test -x "${barrier:-/}"; do
      barrier+=/$(cut -d / -f 1 <<<"${path#"$barrier"/}")
    done
    [[ $barrier != "$path" ]] || continue  # nobody can enter all above it
    hidden[$number]=$barrier
    mkdir -p "$where/needed/$number"
    mount --rbind "$path" "$where/needed/$number"
  done
  for barrier in "${hidden[@]}"; do
    mountpoint -q "$barrier" || mount -t tmpfs -o mode=755 tmpfs "$barrier"
  done
  for number in "${!hidden[@]}"; do
    mkdir -p "${needed[number]}"
    mount --move "$where/needed/$number" "${needed[number]}"
  done
  for path in "${@:3}"; do
    [[ $path != */bin/python* ]] || "${nobody[@]}" "$path" -c '' 2>/dev/null ||
      die "$path: root grades as the user nobody, who cannot run it; grade as another user"
  done
  exec "${nobody[@]}" "${@:3}"
}

NAMESPACES=(unshare --user --map-root-user --net --mount --pid --ipc --uts --fork --kill-child)
case ${1-} in
  --inside) inside "${@:2}" ;;
  --as-nobody) as_nobody "${@:2}" ;;
esac
case ${1-} in
  -h | --help) usage && exit ;;
esac
(($# >= 2)) || die "expected DIRECTORY COMMAND..., found $# words; see bash eval/isolate.sh --help"
one_of ISOLATION auto docker namespaces
DIRECTORY=$(cd "$1" && pwd) || die "$1: not a directory"
shift

has_image() { docker image inspect "$GRADER_IMAGE" >/dev/null 2>&1; }
if [[ $ISOLATION == auto ]]; then
  if has_image; then ISOLATION=docker; else ISOLATION=namespaces; fi
fi

WHERE=$(TMPDIR=/tmp mktemp -d)  # a short path: sockets of the grader lie in it
trap 'rm -rf "$WHERE"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$WHERE/tmp"
cp -r "$DIRECTORY" "$WHERE/copy"
if ((UID == 0)); then
  chmod 755 "$WHERE"
  chown -R 65534:65534 "$WHERE"
fi

if [[ $ISOLATION == docker ]]; then
  has_image || die "GRADER_IMAGE: docker has no image $GRADER_IMAGE; build it, or set ISOLATION=namespaces"
  WORDS=("$@")
  for i in "${!WORDS[@]}"; do [[ ${WORDS[i]} != */bin/python* ]] || WORDS[i]=python3; done
  RUN=(
    docker run --rm --network none --read-only --user "$(((UID == 0) ? 65534 : UID))" --cap-drop ALL
    --security-opt no-new-privileges --pids-limit "$GRADE_PROCESSES" --memory "${GRADE_MEMORY_MB}m" --cpus "$(nproc)"
    --tmpfs /tmp:size=1g -e HOME=/tmp -e HF_HOME=/tmp/hf -e MODELSCOPE_CACHE=/tmp/ms -e HF_HUB_OFFLINE=1 -e PYTHONPATH="$REPO"
    -v "$REPO:$REPO:ro" ${DATASET_LOCAL:+-v "$DATASET_LOCAL:$DATASET_LOCAL:ro"} -v "$WHERE/copy:$DIRECTORY" -w /tmp
    "$GRADER_IMAGE" "${WORDS[@]}"
  )
else
  command -v unshare >/dev/null || die 'unshare: not found (util-linux); set ISOLATION=docker, or grade on another machine'
  unshare --user --map-root-user --net --mount --pid --fork true 2>/dev/null ||
    die 'user namespaces are off on this machine (kernel.unprivileged_userns_clone, user.max_user_namespaces); set ISOLATION=docker, or grade on another machine'
  export GRADE_MEMORY_MB GRADE_PROCESSES
  RUN=("${NAMESPACES[@]}" bash "$REPO/eval/isolate.sh" --inside "$WHERE" "$DIRECTORY" "$@")
  ((UID != 0)) || RUN=(unshare --mount bash "$REPO/eval/isolate.sh" --as-nobody "$WHERE" "$DIRECTORY" "${RUN[@]}")
fi
STATUS=0
timeout --kill-after=2 "$GRADE_TIMEOUT" "${RUN[@]}" &
wait $! || STATUS=$?
# 137: unshare does not end at SIGTERM, and was killed.
((STATUS != 124 && STATUS != 137 || SECONDS < GRADE_TIMEOUT)) ||
  die "GRADE_TIMEOUT: grading took more than $GRADE_TIMEOUT s"
((STATUS == 0)) || exit "$STATUS"

# Links and the like may point anywhere.
find "$WHERE/copy" ! -type f ! -type d -delete
for name in "$WHERE"/copy/*/; do
  name=$(basename "$name")
  rm -rf "${DIRECTORY:?}/.$name.new"
  cp -r "$WHERE/copy/$name" "$DIRECTORY/.$name.new"
  rm -rf "${DIRECTORY:?}/$name"
  mv "$DIRECTORY/.$name.new" "$DIRECTORY/$name"
done
