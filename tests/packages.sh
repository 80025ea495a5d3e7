# shellcheck shell=bash
# Packages of Debian and Ubuntu that some tests need. Sourced.

# wanted ARGUMENT...: exits for --help, with the line under the script's #!.
wanted() {
  [[ ${1:-} == --help ]] || return 0
  printf 'usage: bash %s\n\n' "tests/${0##*tests/}"
  sed -n '2s/^# //p' "$0"
  exit
}

# install_packages NAME...: as root, or by sudo.
install_packages() {
  local as_root=()
  ((EUID == 0)) || as_root=(sudo)
  export DEBIAN_FRONTEND=noninteractive
  "${as_root[@]}" apt-get update -q
  # Packages may start daemons of theirs, which nobody here needs.
  "${as_root[@]}" apt-get install -q -y --no-install-recommends "$@"
}
