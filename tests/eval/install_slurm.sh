#!/usr/bin/env bash
# Install Slurm and munge on Debian or Ubuntu, for tests/eval/test_slurm.py; the test starts them itself.
set -euo pipefail

# shellcheck source=tests/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/../packages.sh"

wanted "$@"
PATH=$PATH:/usr/sbin
if command -v slurmctld slurmd munged mungekey >/dev/null; then exit; fi
install_packages slurm-wlm munge
