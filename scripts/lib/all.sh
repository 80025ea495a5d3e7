# shellcheck shell=bash
# Everything that a launcher needs of this folder.

source "$REPO/scripts/lib/cli.sh"
source "$REPO/scripts/lib/state.sh"
source "$REPO/scripts/lib/checks.sh"
source "$REPO/scripts/lib/launch.sh"
