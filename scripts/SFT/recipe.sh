# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# Supervised fine-tuning: the arrays that all recipes of this folder share. A recipe sets its numbers and sources this
# file. The entrypoint is slime's train.py: its train_async.py, which the original used, draws the next rollout's data
# before it saves the data position, so that a resumed run skips a batch [slime train_async.py:26-50].

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
KIND=SFT ORIGINAL_ARGS=("$@")
source "$REPO/scripts/lib/slime.sh"
folder_variables() { :; }
usage() { slime_usage 'Hugging Face model: its tokenizer, chat template and config are used, not its weights'; }

: "${NNODES:=2}" "${FP8_SCALE_FORMAT:=pow2}"  # Transformer Engine's default, written out
: "${HF_CHECKPOINT:=$REPO/models/$MODEL-Instruct}" "${DATA_DIR:=$REPO/data/sft_$STAGE.jsonl}"
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-$BATCH_SIZE} CUDA_ALLOC_CONF=expandable_segments:True
slime_setup
slime_read "$@"
positive NUM_EPOCH
((!LIST)) || { list_recipe "epochs: $NUM_EPOCH, samples of a step: $BATCH_SIZE" && exit; }
start_rollouts
LENGTH_CHECK=(--max-tokens $((MAX_TOKENS * CP)))  # the GPUs of a context parallel group share a micro batch
check_rollout_data --input-key messages --num-epoch "$NUM_EPOCH" ${NUM_ROLLOUT:+--num-rollout "$NUM_ROLLOUT"}

slime_arrays
SFT_ARGS=(
  --rollout-function-path slime.rollout.sft_rollout.generate_rollout
  --prompt-data "$DATA_FILE" --input-key messages --rollout-shuffle
  --num-epoch "$NUM_EPOCH" --rollout-batch-size "$BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction 0.05
  --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95
)
ARGS=(
  "${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${VOCAB_ARGS[@]}" "${CKPT_ARGS[@]}" "${SFT_ARGS[@]}"
  "${OPTIMIZER_ARGS[@]}" "${PERF_ARGS[@]}" "${PRECISE_ARGS[@]}" "${WANDB_ARGS[@]}" "${MISC_ARGS[@]}"
  "${EXTRA_ARGS[@]}"
)
slime_command

header() {
  slime_header schedule "$NUM_EPOCH epochs${TARGET:+ = $TARGET rollouts} of $BATCH_SIZE samples, learning rate $LR to $MIN_LR"
}
CHECKS=()
[[ ! -f $HF_CHECKPOINT/config.json ]] || CHECKS+=(--hf-config "$HF_CHECKPOINT")
slime_run header "${CHECKS[@]}"
