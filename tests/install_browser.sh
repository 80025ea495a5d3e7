#!/usr/bin/env bash
# Install Chromium on Debian, for the tests that look at the quickstart's page in it; they start it themselves.
set -euo pipefail

# shellcheck source=tests/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/packages.sh"

wanted "$@"
if command -v chromium >/dev/null; then exit; fi
install_packages chromium fonts-dejavu-core
