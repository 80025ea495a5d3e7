#!/usr/bin/env bash
#SBATCH --job-name=gpqa
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# GPQA diamond: 198 questions with four choices.
# sbatch eval/gpqa_eval.sh, or bash eval/gpqa_eval.sh on one machine; --help says what can be set.
set -euo pipefail

# shellcheck disable=SC2034  # for run.sh
BENCHMARK=gpqa
: "${MAX_NEW_TOKENS:=26000}" "${GENERATED_NUM:=8}" "${EVAL_BATCH:=32}" "${PROMPT_TOKENS:=4096}"

# Slurm runs a copy of this file: the repository is where the original lies.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $HERE/run.sh ]] ||
  HERE=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\(/.*\)/gpqa_eval.sh.*|\1|p")
# shellcheck source=eval/run.sh
source "$HERE/run.sh"
