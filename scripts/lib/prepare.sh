# shellcheck shell=bash disable=SC2153
# Body of scripts/{SFT,RL}/prepare_data.sh: data by tools/prepare_data.py.
#
# In: STAGE FORMAT (the default) ROWS (what is written) FORMATS (for the help, with the stage's own options)

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$REPO/scripts/lib/all.sh"
default_python

usage() {
  cat <<EOF
usage: bash scripts/$STAGE/prepare_data.sh --input FILE... --output FILE [options] [more flags of prepare_data.py]

Writes $ROWS a line; DATA_DIR of a recipe is the output. It appears when
it is complete; one that is there is either the same, and there is nothing to do, or an error.

  --input FILE...  .jsonl, .parquet, or .json with one list; several are joined in this order
  --output FILE    .jsonl or .parquet
  --format NAME    $FORMAT unless given:
$FORMATS
  --drop-invalid   leave invalid rows out and count them; without it the first one is an error that names its line
  --dry-run        print the exact command, change nothing
  --help

Variables, with their values here:
EOF
  variable PYTHON 'interpreter'
}

DRY_RUN=0 FLAG='' INPUTS=() EXTRA_ARGS=()
for ARG; do
  case $ARG in
    -h | --help) usage && exit ;;
    --dry-run) DRY_RUN=1 && continue ;;
    --*) FLAG=${ARG%%=*} ;;&
    --input=*) INPUTS+=("${ARG#*=}") ;;
    --*) ;;
    *) [[ $FLAG != --input ]] || INPUTS+=("$ARG") ;;
  esac
  EXTRA_ARGS+=("$ARG")
done
((${#INPUTS[@]})) || die '--input: expected a file, found nothing'
OUTPUT=$(last_value --output '' "${EXTRA_ARGS[@]}")
[[ -n $OUTPUT && $OUTPUT != --* ]] || die "--output: expected a .jsonl or .parquet file, found '$OUTPUT'"
for ARG in "${INPUTS[@]}"; do [[ -f $ARG ]] || missing "--input: $ARG not found"; done
passed --format || EXTRA_ARGS+=(--format "$FORMAT")
COMMAND=("$PYTHON" "$REPO/tools/prepare_data.py" "${EXTRA_ARGS[@]}")
if ((DRY_RUN)); then
  print_command
  exit
fi
"${COMMAND[@]}"
printf 'DATA_DIR=%q\n' "$(absolute "$OUTPUT")"
