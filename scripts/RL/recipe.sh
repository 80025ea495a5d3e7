# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# Reinforcement learning: GRPO with clip-higher, dynamic sampling and truncated importance sampling, on rollouts in FP8.
# The arrays that all recipes of this folder share; a recipe sets its numbers and sources this file.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
KIND=RL ORIGINAL_ARGS=("$@")
source "$REPO/scripts/lib/slime.sh"
folder_variables() {
  variable EVAL_DATA 'held-out prompts; empty: no evaluation'
  variable KL_LOSS_COEF '0: no KL term, and no reference model; otherwise low_var_kl against REF_LOAD'
  variable DYNAMIC_SAMPLING '1: prompts whose samples all have the same reward are drawn again; 0: they are kept'
}
usage() { slime_usage 'Hugging Face model that the rollout engine loads, in FP8 (tools/bf16_cast_fp8.py)'; }

# fp32: the format in which slime casts the weights that it sends to the rollout engine
# [slime slime/utils/fp8_kernel.py:44].
: "${NNODES:=4}" "${FP8_SCALE_FORMAT:=fp32}" "${KL_LOSS_COEF:=0.00}" "${DYNAMIC_SAMPLING:=1}"
: "${HF_CHECKPOINT:=$REPO/models/InfiR2_SFT_FP8_${MODEL#*-}_stage2_hf_fp8}"
: "${DATA_DIR:=$REPO/data/$TRAIN_NAME}" "${EVAL_DATA=$REPO/data/$EVAL_NAME}"
CUDA_ALLOC_CONF=max_split_size_mb:2048  # --colocate offloads weights, which expandable segments cannot
GLOBAL_BATCH_SIZE=$((BATCH_SIZE * SAMPLES))
slime_setup
slime_read "$@"
override SAMPLES --n-samples-per-prompt
override MAX_RESPONSE --rollout-max-response-len
override TEMPERATURE --rollout-temperature
positive SAMPLES MAX_RESPONSE NUM_ROLLOUT
((!LIST)) || { list_recipe "$NUM_ROLLOUT rollouts of $BATCH_SIZE x $SAMPLES samples, up to $MAX_RESPONSE tokens" && exit; }
one_of DYNAMIC_SAMPLING 0 1
[[ $PRECISION == bf16 || $FP8_SCALE_FORMAT == fp32 || $ENGINE == embedded ]] ||
  warn 'FP8_SCALE_FORMAT=pow2: slime sends weights with float32 scales to the rollout engine all the same'
start_rollouts
LENGTH_CHECK=()
check_rollout_data --input-key prompt --label-key label --apply-chat-template --n-samples-per-prompt "$SAMPLES" \
  --num-rollout "$NUM_ROLLOUT"
[[ -z $EVAL_DATA || -f $EVAL_DATA ]] ||
  missing "EVAL_DATA: $EVAL_DATA not found; make it with scripts/RL/prepare_data.sh, or set EVAL_DATA= for no evaluation"

slime_arrays
CLUSTER_ARGS+=(--colocate)
ROLLOUT_ARGS=(
  --prompt-data "$DATA_FILE" --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
  --rm-type deepscaler --num-rollout "$NUM_ROLLOUT" --rollout-batch-size "$BATCH_SIZE"
  --n-samples-per-prompt "$SAMPLES" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --rollout-max-response-len "$MAX_RESPONSE" --rollout-temperature "$TEMPERATURE"
  --over-sampling-batch-size "$OVER_SAMPLING" --balance-data
)
((!DYNAMIC_SAMPLING)) || ROLLOUT_ARGS+=(
  --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
)
EVAL_ARGS=()
[[ -z $EVAL_DATA ]] || EVAL_ARGS=(
  --eval-interval "$EVAL_INTERVAL" --eval-prompt-data "${EVAL_NAME%%-*}" "$EVAL_DATA"
  --n-samples-per-eval-prompt "$EVAL_SAMPLES" --eval-max-response-len "$EVAL_MAX_RESPONSE"
  --eval-top-p 0.7 --eval-temperature 1.0
)
GRPO_ARGS=(
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0.00 --use-tis
)
# A KL term costs a forward pass of the reference model in every rollout, also with a coefficient of 0.
[[ $KL_LOSS_COEF =~ ^0*\.?0*$ ]] ||
  GRPO_ARGS+=(--use-kl-loss --kl-loss-coef "$KL_LOSS_COEF" --kl-loss-type low_var_kl)
OPTIMIZER_ARGS=(
  --optimizer adam --lr "$LR" --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
)
SGLANG_ARGS=(
  --rollout-num-gpus-per-engine "$ENGINE_GPUS" --sglang-mem-fraction-static 0.5 --sglang-max-running-requests 128
)
ARGS=(
  "${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${VOCAB_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}"
  "${OPTIMIZER_ARGS[@]}" "${GRPO_ARGS[@]}" "${PERF_ARGS[@]}" "${EVAL_ARGS[@]}" "${SGLANG_ARGS[@]}"
  "${PRECISE_ARGS[@]}" "${WANDB_ARGS[@]}" "${MISC_ARGS[@]}" "${EXTRA_ARGS[@]}"
)
slime_command

CHECKS=() ROLLOUT_FORMAT='checkpoint not found'
if [[ -f $HF_CHECKPOINT/config.json ]]; then
  CHECKS=(--hf-config "$HF_CHECKPOINT")
  [[ $PRECISION == bf16 ]] || CHECKS+=(--scale-format "$FP8_SCALE_FORMAT")
  ROLLOUT_FORMAT=$("$PYTHON" "$REPO/training/contract/check.py" --program slime --hf-config "$HF_CHECKPOINT" \
    --print-scale-format) || exit 1
fi
header() {
  slime_header schedule "$NUM_ROLLOUT rollouts of $BATCH_SIZE x $SAMPLES samples, learning rate $LR" \
    rollouts "up to $MAX_RESPONSE tokens at temperature $TEMPERATURE; $HF_CHECKPOINT: $ROLLOUT_FORMAT"
}
slime_run header "${CHECKS[@]}"
