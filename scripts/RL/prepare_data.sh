#!/usr/bin/env bash
# Turn questions with answers into the file that RL reads.
set -euo pipefail

STAGE=RL FORMAT=dapo-math
ROWS='{"prompt": [{"role", "content"}], "label"}'
FORMATS='    dapo-math      DAPO-Math-17k, and whatever has the layout of verl; each question is kept once
    prompt-label   "prompt" and "label", or the keys in --prompt-key and --label-key
  --instruction    boxed (default): DAPO asks for "Answer: ...", which becomes "Answer: \boxed{...}", what --rm-type
                   deepscaler reads | keep: what --rm-type dapo reads'
source "$(dirname "${BASH_SOURCE[0]}")/../lib/prepare.sh"
