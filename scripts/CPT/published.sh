# shellcheck shell=bash disable=SC2034
# The numbers of the published recipes, the same for every size. A recipe sets its own and sources this file.

SEQ_LENGTH=32768 MICRO_BATCH_SIZE=1 GLOBAL_BATCH_SIZE=128     # 4.2M tokens per step
TRAIN_ITERS=40000 WARMUP_ITERS=5000 DECAY_ITERS=5000          # 21.0B + 125.8B + 21.0B tokens
LR=1e-4 MIN_LR=1e-5 INIT_STD=0.008
SAVE_INTERVAL=1000 EVAL_INTERVAL=100 EVAL_ITERS=10

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
