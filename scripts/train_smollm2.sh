#!/usr/bin/env bash
# Trains the exits that ship for smollm2-135m: block heads with deep context at layers 4 and 8.
#
#   scripts/train_smollm2.sh PROMPT_DATA DATA OUT [hispec train options]
#
# PROMPT_DATA  the folder scripts/distill_smollm2.sh was given (Dolly, GSM8K, code instructions)
# DATA         what scripts/distill_smollm2.sh wrote (train.jsonl, heldout.jsonl, spec_eval.jsonl)
# OUT          gets the exits, their report, and OUT/work, which can be deleted afterwards
#
# The recipe of the shipped weights on two passes over the texts. They themselves saw a third of
# the texts first (1,051 steps at a rate of 2e-3) and then all of them (850 steps from 1e-3 to 0);
# scripts/results/LOG.md has the curve and why fresh texts count for more than passes.
#
# Run again with the same arguments to go on after an interruption.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
prompts=$1 data=$2 out=$3
shift 3

answers="$data/answers.jsonl"
[ -s "$answers" ] ||
    "$PYTHON" "$ROOT/scripts/dataset_answers.py" --data "$prompts" --out "$answers" --limit 1000

"$VENV/bin/hispec" train --model smollm2-135m --exits 4,8 --resume \
  --data "$answers" "$data/train.jsonl" --held-out "$data/heldout.jsonl" \
  --head block --context deep --head-vocab 8192 \
  --epochs 2 --lr 0.001 --soft 1.0 --dropout 0.1 --out "$out" "$@"

"$PYTHON" -m hispec_training.measure --model smollm2-135m --exits "$out" \
  --data "$data/spec_eval.jsonl" --name "the model's greedy answers to Spec-Bench" --write
