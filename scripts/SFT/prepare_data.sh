#!/usr/bin/env bash
# Turn conversations into the file that SFT reads.
set -euo pipefail

STAGE=SFT FORMAT=infialign
ROWS='{"messages": [{"role", "content"}, ...]}'
FORMATS='    infialign      InfiAlign-SFT: each row as one of the next three, by its keys
    messages       "messages" with role and content
    sharegpt       "conversations" with from and value
    alpaca         "instruction", "input", "output"'
source "$(dirname "${BASH_SOURCE[0]}")/../lib/prepare.sh"
