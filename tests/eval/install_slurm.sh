#!/usr/bin/env bash
# Install Slurm and munge on Debian or Ubuntu, for tests/eval/test_slurm.py; the test starts them itself.
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  sed -n '2s/^# //p' "${BASH_SOURCE[0]}"
  printf 'usage: bash tests/eval/install_slurm.sh\n'
  exit
fi
PATH=$PATH:/usr/sbin
if command -v slurmctld slurmd munged mungekey >/dev/null; then exit; fi
AS_ROOT=()
((EUID == 0)) || AS_ROOT=(sudo)
export DEBIAN_FRONTEND=noninteractive
"${AS_ROOT[@]}" apt-get update -q
# Packages may start daemons of theirs, which nobody here needs.
"${AS_ROOT[@]}" apt-get install -q -y --no-install-recommends slurm-wlm munge
