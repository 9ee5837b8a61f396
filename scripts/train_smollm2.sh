#!/usr/bin/env bash
# Trains the exits that ship for smollm2-135m: block heads with deep context before the first layer
# and after layers 4 and 8.
#
#   scripts/train_smollm2.sh DATA OUT [hispec train options]
#
# DATA  what scripts/distill_smollm2.sh wrote (train.jsonl, heldout.jsonl, spec_eval.jsonl)
# OUT   gets the exits, their report, and OUT/work, which can be deleted afterwards
#
# Two passes over the texts. The shipped weights came about in stages, each from the ones before
# (`--start-from DIR`) on new answers: exits 4 and 8 on 0.68 M, then 1.4 M tokens, exit 8 on 0.9 M
# more; exit 0 began as an exit 2 of the second stage and took the last 0.9 M three times. Then exits
# 0 and 8 saw 0.5 M more, all three 0.3 M twice (`--epochs 1.3 --lr 0.0006`), and exit 8 0.5 M
# twice (`--epochs 1.5`); after each of these average_exits.py took the mean of before and after.
# scripts/results/LOG.md has the curves and why fresh texts count for more than passes.
#
# Run again with the same arguments to go on after an interruption.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
data=$1 out=$2
shift 2

"$PYTHON" -m hispec.cli train --model smollm2-135m --exits 0,4,8 --resume \
  --data "$data/train.jsonl" --held-out "$data/heldout.jsonl" \
  --head block --context deep --head-vocab 8192 \
  --epochs 2 --lr 0.001 --soft 1.0 --dropout 0.1 --out "$out" "$@"

"$PYTHON" -m hispec_training.measure --model smollm2-135m --exits "$out" \
  --data "$data/spec_eval.jsonl" --name "the model's greedy answers to Spec-Bench" --write
