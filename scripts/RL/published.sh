# shellcheck shell=bash disable=SC2034
# The numbers of the published recipe, the same for every size. A recipe sets its own and sources this file.

: "${MAX_RESPONSE:=8192}" "${MAX_TOKENS:=8192}" "${TEMPERATURE:=1.0}"
NUM_ROLLOUT=10240 BATCH_SIZE=128 SAMPLES=16 OVER_SAMPLING=384  # one step per rollout; 3 x 128 prompts drawn at a time
LR=1e-6 SAVE_INTERVAL=20
TRAIN_NAME=dapo-math-17k.jsonl EVAL_NAME=aime-2024.jsonl
EVAL_INTERVAL=20 EVAL_SAMPLES=16 EVAL_MAX_RESPONSE=30000

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
