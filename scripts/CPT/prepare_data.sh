#!/usr/bin/env bash
# Turn jsonl, one {"text": ...} a line, into the .bin/.idx pair that pre-training reads.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$REPO/scripts/lib/all.sh"

usage() {
  cat <<EOF
usage: bash scripts/CPT/prepare_data.sh --input FILE --output-prefix PREFIX [options] [more flags of preprocess_data.py]

Writes PREFIX_text_document.bin and .idx, every document ended by the tokenizer's end-of-text token. Both appear when
they are complete, the index last; a pair that is there is left alone. DATA_PATH of a recipe is PREFIX_text_document.

  --input FILE            jsonl, one {"text": ...} a line
  --output-prefix PREFIX  where to write
  --tokenizer DIR         HuggingFace tokenizer (TOKENIZER_MODEL)
  --workers N             parallel tokenisers (WORKERS)
  --engine NAME           megatron: the pinned tools/preprocess_data.py | embedded: the same bytes from PyPI packages
                          alone (ENGINE)
  --dry-run               print the exact command, change nothing
  --help

Variables, with their values here:
EOF
  variable TOKENIZER_MODEL '--tokenizer'
  variable WORKERS '--workers'
  variable ENGINE '--engine'
  variable PYTHON 'interpreter'
}

: "${ENGINE:=megatron}" "${TOKENIZER_MODEL:=$REPO/models/qwen2.5-7B}" "${WORKERS:=$(nproc)}"
default_python

OWN_FLAGS=(--input --output-prefix --tokenizer --workers --engine) INPUT='' OUTPUT_PREFIX='' TOKENIZER=$TOKENIZER_MODEL
parse_cli "$@"
[[ -n $INPUT ]] || die '--input: expected a jsonl file, found nothing'
[[ -n $OUTPUT_PREFIX ]] || die '--output-prefix: expected a path, found nothing'
one_of ENGINE megatron embedded
positive WORKERS
PREFIX=$(absolute "$OUTPUT_PREFIX")
RESULT=${PREFIX}_text_document
if [[ -f $RESULT.idx && -f $RESULT.bin ]]; then
  printf 'nothing to do: %s.{bin,idx} are there\n' "$RESULT" >&2
  exit
fi
[[ -f $INPUT ]] || missing "--input: $INPUT not found"
check_tokenizer "$TOKENIZER"
[[ $ENGINE == embedded ]] || check_submodule Megatron-LM tools/preprocess_data.py

# A prefix of its own, so that a conversion that is cut off leaves nothing that looks like data.
PARTIAL=$(dirname "$PREFIX")/.$(basename "$PREFIX").partial
FLAGS=(
  --input "$INPUT" --output-prefix "$PARTIAL" --json-keys text --append-eod
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
  --workers "$WORKERS" "${EXTRA_ARGS[@]}"
)
if [[ $ENGINE == embedded ]]; then
  COMMAND=("$PYTHON" "$REPO/training/embedded/preprocess_data.py" "${FLAGS[@]}")
else
  COMMAND=(
    env "PYTHONPATH=$REPO/training/Megatron-LM${PYTHONPATH:+:$PYTHONPATH}"
    "$PYTHON" "$REPO/training/Megatron-LM/tools/preprocess_data.py" "${FLAGS[@]}"
  )
fi
if ((DRY_RUN)); then
  print_command
  exit
fi

hold_lock "$PARTIAL.lock" "$@"
trap 'rm -f "$PARTIAL"_text_document.{bin,idx}' EXIT
"${COMMAND[@]}" || die "--input $INPUT: not converted, see above; nothing was written"
[[ -s ${PARTIAL}_text_document.idx ]] || die "--input $INPUT: the converter left no index; nothing was written"
mv "${PARTIAL}_text_document.bin" "$RESULT.bin"
mv "${PARTIAL}_text_document.idx" "$RESULT.idx"
printf 'DATA_PATH=%q\n' "$RESULT"
