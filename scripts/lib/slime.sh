# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# What SFT and RL share: the options, where a run starts, the arguments that all recipes of slime's train.py have, and
# the Ray job that runs it. A recipe sets its numbers, its folder's recipe.sh the arrays.

source "$REPO/scripts/lib/all.sh"

slime_usage() {
  cat <<EOF
usage: bash scripts/$KIND/$(basename "$0") [options] [any slime flag, passed through last]

Runs on the head node of a Ray cluster (scripts/ray_start.sh); the embedded engine starts one for itself where there is
none. The same command starts the run, resumes it after any interruption, follows a job of this run that is still
there, and does nothing once it is finished. Ctrl-C stops the job.

  --nnodes N            number of nodes of the Ray cluster to use (NNODES; here: $NNODES)
  --engine NAME         megatron: slime on Megatron-LM | embedded (ENGINE; here: $ENGINE)
EOF
  run_options
  variable DATA_DIR 'the .jsonl or .parquet file, or a directory with one'
  variable HF_CHECKPOINT "$1"
  variable REF_LOAD 'weights to start from: a run, a checkpoint root, or .../iter_N'
  folder_variables
  run_variables
  variable RAY_ADDRESS 'the job server, if not that of scripts/ray_start.sh'
  variable RAY_TEMP_DIR 'the one of scripts/ray_start.sh, where that was set; so RAY_PORT'
  variable OMP_NUM_THREADS 'embedded: threads of a process; all cores unless set'
  cat <<EOF

Passed on to the job where set: MASTER_ADDR, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, http_proxy, https_proxy, no_proxy,
WANDB_API_KEY.
EOF
}

# slime_setup: defaults of all variables. In: KIND (SFT, RL) MODEL TP CP NNODES and the recipe's numbers; PREVIOUS, the
# run whose weights are the default of REF_LOAD.
slime_setup() {
  : "${ENGINE:=megatron}" "${PRECISION:=fp8}" "${PROFILE:=0}" "${GPUS_PER_NODE:=8}" "${CP:=1}"
  : "${WANDB_PROJECT=slime-dev}"
  name_run
  [[ $PRECISION != bf16 ]] || PREVIOUS=${PREVIOUS/FP8/BF16}
  : "${REF_LOAD:=$REPO/exp/$PREVIOUS/checkpoints}"
  OWN_FLAGS=(--nnodes --engine) OWN_SWITCHES=(--list)
}

# slime_read ARG...: after slime_setup and the folder's own defaults.
slime_read() {
  local flag
  parse_cli "$@"
  override NNODES --actor-num-nodes
  read_sizes
  for flag in --load --save --ref-load --ref-ckpt-step --start-rollout-id --ckpt-step --finetune --no-load-optim; do
    ! passed "$flag" || die "$flag: the launcher decides how a run starts; use REF_LOAD and OUT_DIR"
  done
  [[ $ENGINE == embedded ]] || ! passed --use-tensorboard ||
    die "--use-tensorboard: the pinned slime stops at its first metric with it (slime/utils/tensorboard_utils.py:33); use WANDB_PROJECT"
  SAVE_DIR=$OUT_DIR/checkpoints
  override DATA_DIR --prompt-data
  override HF_CHECKPOINT --hf-checkpoint
  override SAVE_INTERVAL --save-interval
  override BATCH_SIZE --rollout-batch-size
  override MAX_TOKENS --max-tokens-per-gpu
  override NUM_EPOCH --num-epoch
  override NUM_ROLLOUT --num-rollout
  positive BATCH_SIZE SAVE_INTERVAL MAX_TOKENS
  DATA_FILE=$(data_file "$DATA_DIR")
  if [[ $ENGINE == embedded && -z ${RAY_ADDRESS-}${RAY_TEMP_DIR-} ]]; then
    # A cluster of its own, if none is there: found again by the same command after this launcher was killed.
    OWN_RAY=/tmp/infir2-$UID/$(cksum <<<"$OUT_DIR" | cut -d ' ' -f 1)
  fi
  source "$REPO/scripts/lib/ray.sh"
}

# data_file PATH: the .jsonl or .parquet file itself, or the only one of a directory.
data_file() {
  local found=()
  [[ -d $1 ]] || { printf '%s\n' "$1" && return; }
  mapfile -t found < <(find "$1" -maxdepth 1 \( -name '*.jsonl' -o -name '*.parquet' \) | sort)
  ((${#found[@]} == 1)) || die "DATA_DIR: expected one .jsonl or .parquet file in $1, found ${#found[@]}; name the file"
  printf '%s\n' "${found[0]}"
}

# start_rollouts: sets START (rollouts done), STATE and START_ARGS. slime itself stops with a TypeError on a checkpoint
# without --start-rollout-id, and starts at the first sample again where the data position is missing
# [slime slime/utils/arguments.py:1094, slime/ray/placement_group.py:176, slime/ray/rollout_data_source.py].
start_rollouts() {
  local ref
  locate "$REF_LOAD"
  if [[ -z $TRACKER ]]; then
    missing "REF_LOAD: expected $ROOT/$TRACKER_NAME; it is the checkpoint whose weights this stage starts from"
  else
    require_step "$ROOT" "$STEP" missing
  fi
  ref=$ROOT START_ARGS=(--ref-load "$ROOT")
  [[ -z $NAMED_STEP || $NAMED_STEP == release ]] || START_ARGS+=(--ref-ckpt-step "$NAMED_STEP")
  START=0 STATE="fresh (weights of $ref${STEP:+, $STEP})"
  ! same_dir "$ref" "$SAVE_DIR" || die "REF_LOAD: $ref is where this run writes; set another OUT_DIR"
  START_ARGS+=(--load "$SAVE_DIR" --save "$SAVE_DIR" --save-interval "$SAVE_INTERVAL")
  read_tracker "$SAVE_DIR"
  [[ -n $TRACKER ]] || return 0
  [[ $TRACKER != release ]] || die "$SAVE_DIR: holds a converted checkpoint ('release'); set REF_LOAD to it"
  require_step "$SAVE_DIR" "$TRACKER"
  [[ -f $SAVE_DIR/rollout/global_dataset_state_dict_$TRACKER.pt ]] ||
    die "$SAVE_DIR/rollout/global_dataset_state_dict_$TRACKER.pt: not found, so the data would start over; write the number of an earlier checkpoint into $SAVE_DIR/$TRACKER_NAME"
  START=$((TRACKER + 1)) STATE="resume after rollout $TRACKER"
  START_ARGS+=(--start-rollout-id "$START")
}

# check_rollout_data ARG...: every row, before a job is submitted; sets TARGET, the number of rollouts. LENGTH_CHECK:
# options that need the tokenizer.
check_rollout_data() {
  local found
  PER_EPOCH='' TARGET=${NUM_ROLLOUT-}
  [[ -f $DATA_FILE ]] || { missing "DATA_DIR: $DATA_FILE not found; make it with scripts/$KIND/prepare_data.sh" && return; }
  check_tokenizer "$HF_CHECKPOINT" HF_CHECKPOINT
  [[ ! -d $HF_CHECKPOINT ]] || set -- "$@" --tokenizer "$HF_CHECKPOINT" "${LENGTH_CHECK[@]}"
  ((DRY_RUN)) || mkdir -p "$OUT_DIR"
  ((DRY_RUN)) || set -- "$@" --cache "$OUT_DIR/.data_check.json"
  found=$("$PYTHON" "$REPO/tools/check_data.py" --kind "${KIND,,}" --data "$DATA_FILE" \
    --rollout-batch-size "$BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --save-interval "$SAVE_INTERVAL" \
    --rollouts "$@") || exit 1
  read -r TARGET PER_EPOCH <<<"$found"
}

# slime_arrays: what all recipes of both folders have; a folder adds its own.
slime_arrays() {
  # shellcheck source=/dev/null
  source "$REPO/scripts/models/$MODEL.sh"
  CLUSTER_ARGS=(--actor-num-nodes "$NNODES" --actor-num-gpus-per-node "$GPUS_PER_NODE")
  CKPT_ARGS=(--hf-checkpoint "$HF_CHECKPOINT" "${START_ARGS[@]}")
  PERF_ARGS=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size 1 --context-parallel-size "$CP"
    --expert-model-parallel-size 1 --expert-tensor-parallel-size 1
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --use-dynamic-batch-size --max-tokens-per-gpu "$MAX_TOKENS" --distributed-timeout-minutes 60
  )
  ((TP == 1)) || PERF_ARGS+=(--sequence-parallel)
  # fp8: E4M3, 1x128 activation tiles, 128x128 weight blocks; weights are gathered in FP8. bf16 drops exactly this.
  PRECISE_ARGS=(--transformer-impl transformer_engine --bf16)
  [[ $PRECISION != fp8 ]] || PRECISE_ARGS+=(--fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather)
  # TensorBoard only on the embedded engine: the pinned slime stops at its first metric with --use-tensorboard
  # [slime/utils/tensorboard_utils.py:33], and its --tensorboard-dir is its profiler's.
  WANDB_ARGS=()
  [[ $ENGINE != embedded ]] ||
    WANDB_ARGS+=(--use-tensorboard --tb-project-name "${WANDB_PROJECT:-$RUN_NAME}" --tb-experiment-name "$RUN_NAME")
  [[ -z $WANDB_PROJECT ]] || WANDB_ARGS+=(
    --use-wandb --wandb-mode "${WANDB_MODE:-offline}" --wandb-project "$WANDB_PROJECT" --wandb-group "$RUN_NAME"
    --wandb-dir "$OUT_DIR/logs"
  )
  MISC_ARGS=(
    --attention-dropout 0.0 --hidden-dropout 0.0 --attention-backend flash
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32
  )
  [[ $PROFILE != 1 ]] || MISC_ARGS+=(
    --use-pytorch-profiler --profile-step-start 16 --profile-step-end 18 --record-memory-history
    --tensorboard-dir "$OUT_DIR/profile"
  )
}

# to_json NAME=VALUE...: one JSON object.
to_json() { "$PYTHON" -c 'import json, sys; print(json.dumps(dict(word.split("=", 1) for word in sys.argv[1:])))' "$@"; }

# slime_command: COMMAND, from ARGS.
slime_command() {
  local name scales=0 program=$REPO/training/slime/train.py python=python3
  [[ $FP8_SCALE_FORMAT == pow2 ]] || scales=1
  JOB_ENV=(PYTHONUNBUFFERED=1)
  [[ $PRECISION != fp8 ]] || JOB_ENV+=("NVTE_FP8_BLOCK_SCALING_FP32_SCALES=$scales")
  if [[ $ENGINE == embedded ]]; then
    program=$REPO/training/embedded/train.py python=$PYTHON
    # Ray would give every process one thread.
    JOB_ENV+=("TENSORBOARD_DIR=$OUT_DIR/tensorboard" "PYTHONPATH=$REPO" "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}")
  else
    JOB_ENV+=(
      "PYTHONPATH=$REPO/training/Megatron-LM:$REPO/training/slime${PYTHONPATH:+:$PYTHONPATH}"
      CUDA_DEVICE_MAX_CONNECTIONS=1 "PYTORCH_CUDA_ALLOC_CONF=$CUDA_ALLOC_CONF" TORCH_NCCL_AVOID_RECORD_STREAMS=1
      TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 NVTE_DEBUG=0
    )
  fi
  # W&B's copy of the output and Ray's printing of it wait for each other at the end of a run, for ever.
  [[ -z $WANDB_PROJECT ]] || JOB_ENV+=(WANDB_CONSOLE=off)
  for name in MASTER_ADDR NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME http_proxy https_proxy no_proxy WANDB_API_KEY; do
    [[ -z ${!name-} ]] || JOB_ENV+=("$name=${!name}")
  done
  ADDRESS=$(ray_address)
  JOB_ID=$RUN_NAME-$(date +%Y%m%d-%H%M%S)-$$
  ((!DRY_RUN)) || JOB_ID=$RUN_NAME
  find_ray
  COMMAND=(
    "$RAY" job submit --address "$ADDRESS" --no-wait --submission-id "$JOB_ID"
    --metadata-json "$(to_json "infir2_out_dir=$OUT_DIR")" --runtime-env-json "$(runtime_env '' "${JOB_ENV[@]}")"
    -- "$python" "$program" "${ARGS[@]}"
  )
}

# slime_header LINE_NAME TEXT...: the run; the folder adds lines.
slime_header() {
  local gpus=$((NNODES * GPUS_PER_NODE))
  printf '%s\n' "$RUN_NAME"
  printf '  %-10s %s\n' engine "$ENGINE, $(engine_commit slime)" \
    model "$MODEL, TP $TP, CP $CP, data parallel $((gpus / (TP * CP)))" \
    precision "$PRECISION$([[ $PRECISION == bf16 ]] || echo " (E4M3, 128-blocks, $FP8_SCALE_FORMAT scales)")" \
    data "$DATA_FILE" "$@" state "$STATE" cluster "$ADDRESS, $NNODES x $GPUS_PER_NODE GPUs" output "$OUT_DIR"
}

# start_over_if_moved: a job of this run that goes on without its launcher has saved since the arrays were made.
start_over_if_moved() {
  read_tracker "$SAVE_DIR"
  [[ $TRACKER =~ ^[0-9]+$ ]] && ((TRACKER + 1 != START && ! DRY_RUN)) || return 0
  [[ -z ${LOCK_FD-} ]] || exec {LOCK_FD}>&-
  exec "$BASH" "$0" "${ORIGINAL_ARGS[@]}"
}

# slime_run HEADER_FUNCTION HF_CHECK...: checks, then the job. Everything a launch does after its arrays are made.
slime_run() {
  local header=$1 job said failed=0
  said=$("$PYTHON" "$REPO/training/contract/check.py" --program slime "${@:2}" -- "${ARGS[@]}" 2>&1) || failed=1
  ((!failed)) || start_over_if_moved
  [[ -z $said ]] || printf '%s\n' "$said" >&2
  ((!failed)) || exit 1
  "$header" >&2
  if [[ -n $TARGET ]] && ((START >= TARGET)); then
    printf 'nothing to do: %s has its %s rollouts\n' "$SAVE_DIR" "$TARGET" >&2
    exit
  fi
  if [[ $ENGINE == megatron ]]; then
    check_submodule slime train.py
    check_submodule Megatron-LM pretrain_gpt.py
  fi
  if ((DRY_RUN)); then
    print_command
    exit
  fi
  hold_lock "$OUT_DIR/.lock" "${ORIGINAL_ARGS[@]}"
  mkdir -p "$SAVE_DIR" "$OUT_DIR/logs"
  LOG=$OUT_DIR/logs/train.log TRAIN_ITERS=$TARGET UNIT=rollout
  ensure_cluster
  job=$(find_job "$ADDRESS" "$OUT_DIR")
  if [[ -n $job ]]; then
    printf 'job %s of this run is still there: following it\n' "$job" >&2
  else
    start_over_if_moved
    { "$header" && print_command; } >>"$LOG"
    job=$JOB_ID
    submit_job "$ADDRESS" "$job"
  fi
  follow_job "$ADDRESS" "$job" "$LOG"
  ((STATUS == 0 || STOPPED)) || printf '%s\n' "$JOB_MESSAGE" >&2
  judge_run "$LOG"
}

# ensure_cluster: a Ray that answers. The embedded engine starts one; only one of its own is stopped again.
ensure_cluster() {
  ! ray_answers "$ADDRESS" || return 0
  [[ $ENGINE == embedded && -z ${RAY_ADDRESS-} ]] ||
    die "no Ray cluster answers at $ADDRESS; start one with scripts/ray_start.sh, or set RAY_ADDRESS"
  export RAY_TEMP_DIR=${OWN_RAY:-$RAY_TEMP_DIR}
  [[ -z ${OWN_RAY-} ]] || trap 'bash "$REPO/scripts/ray_stop.sh" >&2' EXIT
  bash "$REPO/scripts/ray_start.sh" --any-port >&2
  ADDRESS=$(ray_address)
  slime_command
}
