#!/usr/bin/env bash
# Counts the n-grams of SmolLM2-135M's own answers: the history its drafts start from.
#
#   scripts/history_smollm2.sh DATA OUT
#
# The one that ships was counted over 1.4 M, 0.9 M and (--least 4) 7.25 M tokens one after the other
# and merged (hispec ngrams merge).
#
# DATA  what scripts/distill_smollm2.sh wrote (train.jsonl: answers to training prompts alone)
# OUT   gets history.bin, which comes with hispec in hispec/databases/smollm2-135m
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
mkdir -p "$2"
# Keys of up to three tokens, what occurred twice: what occurred once adds 24 MB and no token a pass.
exec "$PYTHON" -m hispec.cli ngrams build --kind history --model smollm2-135m --longest 3 --least 2 \
  --data "$1/train.jsonl" --out "$2/history.bin"
