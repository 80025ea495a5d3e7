#!/usr/bin/env bash
#SBATCH --job-name=aime24
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# AIME 2024: 30 questions.
# sbatch eval/aime24_eval.sh, or bash eval/aime24_eval.sh on one machine; --help says what can be set.
set -euo pipefail

# shellcheck disable=SC2034  # for run.sh
BENCHMARK=aime24
: "${MAX_NEW_TOKENS:=31000}" "${GENERATED_NUM:=32}" "${EVAL_BATCH:=32}" "${PROMPT_TOKENS:=1024}"

# Slurm runs a copy of this file: the repository is where the original lies.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $HERE/run.sh ]] ||
  HERE=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\(/.*\)/aime24_eval.sh.*|\1|p")
# shellcheck source=eval/run.sh
source "$HERE/run.sh"
