#!/usr/bin/env bash
# List the recipes: engine, size and length of each, from the recipe itself.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPO/scripts/lib/cli.sh"

usage() {
  cat <<EOF
usage: bash scripts/list.sh [WORD...]

Prints a line for each recipe whose name has all WORDs: its engine, nodes and GPUs of one, tensor and context parallel
size, and how long it trains. Variables that change a recipe change its line; --help of the recipe names them.

  bash scripts/list.sh            all
  bash scripts/list.sh RL 0.5B    reinforcement learning of the 0.5B
EOF
}

parse_cli "$@"
FOUND=0
for recipe in "$REPO"/scripts/{CPT,SFT,RL}/InfiR2_*.sh; do
  for word in "${EXTRA_ARGS[@]}"; do [[ ${recipe##*/} == *"$word"* ]] || continue 2; done
  ((FOUND++)) || printf '%-46s %-9s %-14s %s  %s  %s\n' recipe engine 'nodes x GPUs' TP CP length
  bash "$recipe" --list
done
((FOUND)) || die "${EXTRA_ARGS[*]}: no recipe has these words in its name; see bash scripts/list.sh"
