# shellcheck shell=bash disable=SC2034
# Where a run starts: fresh, resumed or finished, decided from Megatron's tracker files before the engine runs.
# The engine itself starts from random weights without a word when a tracker is missing, exits with status 0
# on an unreadable one, and lets --ckpt-step beat the tracker at every restart
# [Megatron-LM megatron/training/checkpointing.py:1033-1070].
#
# In:  SAVE_DIR LOAD INIT_CHECKPOINT FROM_SCRATCH TRAIN_ITERS DECAY_ITERS
# Out: START (iterations done), STATE (for people), START_ARGS (for the engine), TRAIN_ITERS (decay)

readonly TRACKER_NAME=latest_checkpointed_iteration.txt

# read_tracker ROOT: TRACKER becomes '' (there is none), an iteration > 0, or 'release'.
read_tracker() {
  local file=$1/$TRACKER_NAME
  TRACKER=''
  [[ -e $file ]] || return 0
  [[ -f $file && -r $file ]] || die "$file: expected a readable file with an iteration number"
  read -r -d '' TRACKER <"$file" || true
  [[ $TRACKER == release ]] && return
  [[ $TRACKER =~ ^0*[1-9][0-9]{0,8}$ ]] ||
    die "$file: expected an iteration > 0 or 'release', found '${TRACKER:0:40}'; write the number of a complete iter_ directory"
  TRACKER=$((10#$TRACKER))
}

# require_step ROOT STEP: the engine has no fallback to an earlier step.
require_step() {
  local dir=$1/release
  [[ $2 == release ]] || printf -v dir '%s/iter_%07d' "$1" "$2"
  [[ -d $dir ]] || "${3:-die}" "$dir: checkpoint directory not found"
}

# locate PATH: ROOT and STEP of a run directory, a checkpoint root (STEP from its tracker), .../iter_N or .../release.
locate() {
  ROOT=$(absolute "$1") STEP=''
  [[ ! -d $ROOT/checkpoints || -e $ROOT/$TRACKER_NAME ]] || ROOT=$ROOT/checkpoints
  if [[ $ROOT =~ /iter_0*([1-9][0-9]*)$ ]]; then STEP=${BASH_REMATCH[1]}; fi
  [[ $ROOT != */release ]] || STEP=release
  [[ -z $STEP ]] || ROOT=${ROOT%/*}
  NAMED_STEP=$STEP
  read_tracker "$ROOT"
  STEP=${STEP:-$TRACKER}
}

same_dir() { [[ $1 == "$2" || $1 -ef $2 ]]; }

# own_checkpoint: sets START from the run's own tracker; fails when there is none yet.
own_checkpoint() {
  read_tracker "$SAVE_DIR"
  [[ -n $TRACKER ]] || return 1
  [[ $TRACKER != release ]] ||
    die "$SAVE_DIR: holds a converted checkpoint ('release'); set INIT_CHECKPOINT to it and OUT_DIR to another directory"
  require_step "$SAVE_DIR" "$TRACKER"
  START=$TRACKER STATE="resume from $TRACKER" START_ARGS=(--load "$SAVE_DIR")
  [[ -n $LOAD ]] || return 0
  locate "$LOAD"
  ! same_dir "$ROOT" "$SAVE_DIR" || [[ ${NAMED_STEP:-$START} == "$START" ]] ||
    die "--load $LOAD: this run is at $START; to go back, write $NAMED_STEP into $SAVE_DIR/$TRACKER_NAME"
}

# A full run starts from INIT_CHECKPOINT's weights, from --load (weights, optimizer, position), or from nothing.
start_full() {
  [[ ! -e $SAVE_DIR/decay_start.txt ]] || die "$SAVE_DIR: belongs to a decay run; set another OUT_DIR"
  own_checkpoint && return
  START=0
  if [[ -n $LOAD ]]; then
    locate "$LOAD"
    ! same_dir "$ROOT" "$SAVE_DIR" || die "--load $LOAD: this run has no checkpoint there yet"
    [[ -n $STEP ]] || die "--load $LOAD: expected $TRACKER_NAME in $ROOT, or .../iter_N"
    if [[ $STEP != release ]]; then
      require_step "$ROOT" "$STEP" missing
      START=$STEP STATE="continue $ROOT from $STEP, with its optimizer"
      START_ARGS=(--load "$ROOT" --ckpt-step "$STEP")
      return
    fi
    warn "--load $LOAD: a converted checkpoint has no optimizer; used as INIT_CHECKPOINT"
    INIT_CHECKPOINT=$LOAD
  fi
  # A tracker appears in SAVE_DIR with the first save; from then on --load wins over --pretrained-checkpoint.
  START_ARGS=(--load "$SAVE_DIR") STATE='fresh (random weights)'
  ((FROM_SCRATCH)) && return
  [[ -n $INIT_CHECKPOINT ]] ||
    die 'INIT_CHECKPOINT: expected a checkpoint to start from; set it, or pass --from-scratch for random weights'
  locate "$INIT_CHECKPOINT"
  # --pretrained-checkpoint wants a tracker even when --ckpt-step names the step.
  if [[ -z $TRACKER ]]; then
    missing "INIT_CHECKPOINT: expected $ROOT/$TRACKER_NAME; make it with tools/convert_hf_to_torch_dist.py, or pass --from-scratch"
  else
    [[ $STEP != release || $TRACKER == release ]] ||
      die "INIT_CHECKPOINT: $ROOT/$TRACKER_NAME says $TRACKER, expected release"
    require_step "$ROOT" "$STEP" missing
  fi
  STATE="fresh (weights of $ROOT${STEP:+, $STEP})" START_ARGS+=(--pretrained-checkpoint "$ROOT")
  [[ -z $NAMED_STEP || $NAMED_STEP == release ]] || START_ARGS+=(--ckpt-step "$NAMED_STEP")
}

# A decay run starts from a stable-phase checkpoint with its optimizer and ends DECAY_ITERS later. Where it
# started is kept in decay_start.txt: later launches need the number, and the stable run may have moved on.
start_decay() {
  local record=$SAVE_DIR/decay_start.txt from='' root=''
  if [[ -f $record ]]; then
    read -r from root <"$record" || true
    [[ $from =~ ^[1-9][0-9]*$ && $root == /* ]] || die "$record: expected '<iteration> <checkpoint root>'"
  fi
  if [[ -n $LOAD ]]; then
    locate "$LOAD"
    if same_dir "$ROOT" "$SAVE_DIR"; then
      [[ -n $from ]] || die "--load $LOAD: a decay run must not write where it starts; set another OUT_DIR"
    elif [[ -n $from ]]; then
      same_dir "$ROOT" "$root" && [[ ${NAMED_STEP:-$from} == "$from" ]] ||
        die "--load $LOAD: $SAVE_DIR decays from $root at $from; set another OUT_DIR for a second decay"
    else
      [[ $STEP =~ ^[0-9]+$ ]] || die "--load $LOAD: expected a training checkpoint (tracker with a number, or .../iter_N), found '${STEP:-none}'"
      from=$STEP root=$ROOT
    fi
  fi
  [[ -n $from || ! -e $SAVE_DIR/$TRACKER_NAME ]] || die "$SAVE_DIR: not a decay run (no decay_start.txt); set another OUT_DIR"
  [[ -n $from ]] || die "--load: expected the stable-phase checkpoint to decay from, e.g. --load $REPO/exp/${RUN_NAME%_decay}/checkpoints/iter_0035000"
  passed --train-iters || TRAIN_ITERS=$((from + DECAY_ITERS))
  DECAY_START="$from $root"
  if ! own_checkpoint; then
    require_step "$root" "$from" missing
    START=$from STATE="decay of $root from $from" START_ARGS=(--load "$root" --ckpt-step "$from")
  fi
  START_ARGS+=(--override-opt_param-scheduler)
}

# start_run STAGE: the run is finished when its own checkpoint has reached TRAIN_ITERS.
start_run() {
  DECAY_START='' FINISHED=0
  "start_$1"
  ((START < TRAIN_ITERS)) && return
  read_tracker "$SAVE_DIR"
  [[ -n $TRACKER ]] || die "--train-iters $TRAIN_ITERS: nothing to train, the start is at iteration $START"
  FINISHED=1 STATE="finished at $START"
}
