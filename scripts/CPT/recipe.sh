# shellcheck shell=bash disable=SC2153,SC2154
# Continual pre-training: the arrays that all recipes of this folder share. A recipe sets its numbers and sources
# this file; STAGE=decay makes the standalone decay run of the same numbers.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$REPO/scripts/lib/all.sh"

usage() {
  cat <<EOF
usage: bash scripts/CPT/$(basename "$0") [options] [any Megatron-LM flag, passed through last]

The same command starts the run, resumes it after any interruption, and does nothing once it is finished.

EOF
  if [[ $STAGE == decay ]]; then
    echo '  --load PATH           the stable-phase checkpoint to decay from: a root, a run, or .../iter_0035000'
  else
    cat <<EOF
  --load PATH           continue from this checkpoint, with its optimizer: a root, a run, or .../iter_0035000
  --from-scratch        start from random weights, not from INIT_CHECKPOINT
EOF
  fi
  cat <<EOF
  --engine NAME         megatron | embedded (ENGINE; here: $ENGINE)
  --nnodes N            number of nodes (NNODES; here: $NNODES); run the same command on each, with
  --rdzv_endpoint H:P   host and port of the first one (RDZV_ENDPOINT)
EOF
  run_options
  variable DATA_PATH 'prefix of a .bin/.idx pair, or a blend: "0.7 prefix1 0.3 prefix2"'
  variable TOKENIZER_MODEL 'Hugging Face directory; its config.json is compared with the model arguments'
  [[ $STAGE == decay ]] || variable INIT_CHECKPOINT 'weights to start from: a root, a run, or .../iter_N'
  variable DATA_CACHE_PATH 'sample indices'
  run_variables
  variable NODE_RANK "names this node's log; its host name where there are several"
}

human() {  # 167772160000 -> 167.8B
  local unit size=1
  for unit in '' K M B T; do (($1 < size * 1000)) && break; size=$((size * 1000)); done
  printf '%d.%d%s' $((($1 + size / 20) / size)) $((($1 * 10 + size / 2) / size % 10)) "$unit"
}

: "${STAGE:=full}" "${ENGINE:=megatron}" "${PRECISION:=fp8}" "${FP8_SCALE_FORMAT:=pow2}" "${PROFILE:=0}"
: "${CP:=1}" "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${RDZV_ENDPOINT:=localhost:0}"  # port 0: torchrun takes a free one
name_run
: "${DATA_PATH:=$REPO/data/cpt_text_document}" "${DATA_CACHE_PATH:=$OUT_DIR/data_cache}"
: "${TOKENIZER_MODEL:=$REPO/models/$MODEL}" "${INIT_CHECKPOINT=$REPO/models/${MODEL}_torch_dist}"

OWN_FLAGS=(--nnodes --rdzv_endpoint --load --engine) OWN_SWITCHES=(--list) LOAD='' FROM_SCRATCH=0
[[ $STAGE == decay ]] || OWN_SWITCHES+=(--from-scratch)
parse_cli "$@"
read_sizes
((NNODES == 1)) || [[ $RDZV_ENDPOINT =~ ^[^:]+:[1-9][0-9]*$ ]] ||
  die "--rdzv_endpoint: expected HOST:PORT of the first node for --nnodes $NNODES, found '$RDZV_ENDPOINT'"

for flag in --ckpt-step --finetune --no-load-optim --pretrained-checkpoint; do
  ! passed "$flag" || die "$flag: the launcher decides how a run starts; use --load, INIT_CHECKPOINT or --from-scratch"
done

SAVE_DIR=$OUT_DIR/checkpoints LR_STYLE=WSD
[[ $STAGE != decay ]] || WARMUP_ITERS=0  # done in the stable run
override SAVE_DIR --save
override TRAIN_ITERS --train-iters
override WARMUP_ITERS --lr-warmup-iters
override DECAY_ITERS --lr-wsd-decay-iters
override LR_STYLE --lr-decay-style
override SEQ_LENGTH --seq-length
override TOKENIZER_MODEL --tokenizer-model
SAVE_DIR=$(absolute "$SAVE_DIR")
positive TRAIN_ITERS DECAY_ITERS SEQ_LENGTH
if ((LIST)); then
  length=$([[ $STAGE == decay ]] && echo "$DECAY_ITERS" || echo "$TRAIN_ITERS")
  list_recipe "$(human $((length * SEQ_LENGTH * GLOBAL_BATCH_SIZE))) tokens in $length iterations"
  exit
fi
start_run "$STAGE"

# DATA_PATH is one prefix, or a blend "0.7 prefix1 0.3 prefix2"; a prefix that exists may hold spaces.
DATA_WORDS=("$DATA_PATH")
if [[ ! -f $DATA_PATH.idx ]]; then read -r -a words <<<"$DATA_PATH"; fi
if [[ ${words-} =~ ^[0-9.]+$ || -f ${words-}.idx ]]; then DATA_WORDS=("${words[@]}"); fi
for flag in --data-path --data-args-path --train-data-path --per-split-data-args-path --mock-data; do
  ! passed "$flag" || DATA_WORDS=()
done

# shellcheck source=/dev/null
source "$REPO/scripts/models/$MODEL.sh"

DATA_ARGS=(
  ${DATA_WORDS:+--data-path "${DATA_WORDS[@]}"} --data-cache-path "$DATA_CACHE_PATH" --split "90,5,5"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER_MODEL"
  --num-workers 6 --no-create-attention-mask-in-dataloader  # Transformer Engine masks by itself
)
PERF_ARGS=(
  --transformer-impl transformer_engine --seq-length "$SEQ_LENGTH"
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size 1 --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --distributed-timeout-minutes 120
)
((TP == 1)) || PERF_ARGS+=(--sequence-parallel)
OPTIMIZER_ARGS=(
  --lr "$LR" --min-lr "$MIN_LR" --lr-warmup-iters "$WARMUP_ITERS" --train-iters "$TRAIN_ITERS"
  --lr-decay-style WSD --lr-wsd-decay-style cosine --lr-wsd-decay-iters "$DECAY_ITERS"
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
)
# fp8: E4M3, 1x128 activation tiles, 128x128 weight blocks; weights are gathered in FP8. bf16 drops exactly this.
PRECISE_ARGS=(--bf16)
[[ $PRECISION != fp8 ]] || PRECISE_ARGS+=(--fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather)
CKPT_ARGS=(
  --ckpt-format torch_dist --save "$SAVE_DIR" --save-interval "$SAVE_INTERVAL" --exit-signal-handler
  "${START_ARGS[@]}"
)
EVAL_ARGS=(--eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS")
MISC_ARGS=(
  --seed 1236 --init-method-std "$INIT_STD" --attention-dropout 0.0 --hidden-dropout 0.0
  --log-throughput --log-timers-to-tensorboard --log-params-norm --log-num-zeros-in-grad
  --tensorboard-dir "$OUT_DIR/tensorboard"
)
if [[ $PROFILE == 1 ]]; then
  # Steps 10-11 after the start of the process. The last rank dumps its memory history at every log interval.
  MISC_ARGS+=(
    --profile --use-pytorch-profiler --profile-step-start 10 --profile-step-end 12
    --record-memory-history --memory-snapshot-path "$OUT_DIR/logs/memory.pickle" --log-interval 10
  )
else
  MISC_ARGS+=(--log-interval 1)
fi
WANDB_ARGS=()
[[ -z $WANDB_PROJECT ]] ||
  WANDB_ARGS=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$RUN_NAME" --wandb-save-dir "$OUT_DIR/logs")

ARGS=(
  "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${PERF_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PRECISE_ARGS[@]}"
  "${CKPT_ARGS[@]}" "${EVAL_ARGS[@]}" "${MISC_ARGS[@]}" "${WANDB_ARGS[@]}" "${EXTRA_ARGS[@]}"
)

# The scale format is Transformer Engine's switch; its default, power-of-2 scales, is written out.
RUN_ENV=()
[[ $PRECISION != fp8 ]] || RUN_ENV+=("NVTE_FP8_BLOCK_SCALING_FP32_SCALES=$([[ $FP8_SCALE_FORMAT == pow2 ]] && echo 0 || echo 1)")
[[ -z $WANDB_PROJECT ]] || RUN_ENV+=("WANDB_MODE=${WANDB_MODE:-offline}")
if [[ $ENGINE == embedded ]]; then
  COMMAND=(env "${RUN_ENV[@]}" "$PYTHON" "$REPO/training/embedded/pretrain_gpt.py" "${ARGS[@]}")
else
  RUN_ENV+=(
    "PYTHONPATH=$REPO/training/Megatron-LM${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    CUDA_DEVICE_MAX_CONNECTIONS=1  # the order of kernels that overlapped communication relies on
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCH_NCCL_AVOID_RECORD_STREAMS=1 NCCL_NVLS_ENABLE=0
    NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1
  )
  COMMAND=(
    env "${RUN_ENV[@]}" torchrun --nnodes "$NNODES" --nproc_per_node "$GPUS_PER_NODE" --rdzv_backend c10d
    --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "$RUN_NAME"
    "$REPO/training/Megatron-LM/pretrain_gpt.py" "${ARGS[@]}"
  )
fi

header() {
  local per_step=$((SEQ_LENGTH * GLOBAL_BATCH_SIZE)) stable_end=$((TRAIN_ITERS - DECAY_ITERS)) first name last schedule=
  [[ $LR_STYLE == WSD ]] || schedule="$LR_STYLE, warm-up $WARMUP_ITERS of $TRAIN_ITERS iterations"
  first=${DECAY_START%% *}
  for name in warm-up:"$WARMUP_ITERS" stable:"$stable_end" decay:"$TRAIN_ITERS"; do
    last=${name#*:}
    if [[ $LR_STYLE != WSD ]] || ((last <= ${first:=0})); then continue; fi
    schedule+="${schedule:+, }${name%:*} $((first + 1))-$last ($(human $(((last - first) * per_step))))"
    first=$last
  done
  printf '%s\n' "$RUN_NAME"
  printf '  %-10s %s\n' engine "$ENGINE, $(engine_commit Megatron-LM)" \
    model "$MODEL, TP $TP, CP $CP" \
    precision "$PRECISION$([[ $PRECISION == bf16 ]] || echo " (E4M3, 128-blocks, $FP8_SCALE_FORMAT scales)")" \
    data "${DATA_WORDS[*]:-as passed through}" \
    tokens "$(human "$per_step") per step ($GLOBAL_BATCH_SIZE x $SEQ_LENGTH), $(human $((per_step * TRAIN_ITERS))) in $TRAIN_ITERS iterations" \
    schedule "$schedule" state "$STATE" output "$OUT_DIR"
}

check_flags pretrain_gpt "$TOKENIZER_MODEL" "${ARGS[@]}"
header >&2
if ((FINISHED)); then
  printf 'nothing to do: %s has its %s iterations\n' "$SAVE_DIR" "$TRAIN_ITERS" >&2
  exit
fi
[[ $ENGINE == embedded ]] || { check_submodule Megatron-LM pretrain_gpt.py && check_gpus; }
check_data "${DATA_WORDS[@]}"
check_tokenizer "$TOKENIZER_MODEL"
if ((DRY_RUN)); then
  print_command
  exit
fi

# Every node of a run enters the same directory.
((NNODES > 1)) || hold_lock "$OUT_DIR/.lock" "$@"
LOG=$OUT_DIR/logs/train_node${NODE_RANK:-$( ((NNODES == 1)) && echo 0 || echo "$HOSTNAME")}.log
mkdir -p "$SAVE_DIR" "$OUT_DIR/logs"
if [[ -n $DECAY_START ]]; then
  printf '%s\n' "$DECAY_START" >"$SAVE_DIR/.decay_start.$$"
  mv "$SAVE_DIR/.decay_start.$$" "$SAVE_DIR/decay_start.txt"
fi
{ header && print_command; } >>"$LOG"
run_child "$LOG"
judge_run "$LOG"
