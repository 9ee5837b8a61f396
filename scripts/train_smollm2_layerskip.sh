#!/usr/bin/env bash
# Trains the LayerSkip-style variant of smollm2-135m: LoRA on the backbone, shared norm and head at
# layer 8. It ships as smollm2-135m-layerskip.
#
#   scripts/train_smollm2_layerskip.sh DATA PLAIN TEXT OUT [hispec train options]
#
# DATA   what scripts/distill_smollm2.sh wrote (train.jsonl, heldout.jsonl)
# PLAIN  WikiText-2's training text: some of it is trained on, so that plain prose stays as it is
# TEXT   WikiText-2's validation text, to report perplexity on
# OUT    gets the adapter, quality.json and OUT/merged, a plain Llama checkpoint
#
# Run again with the same arguments to go on after an interruption. The shipped adapter saw less
# than this asks for, and went on with every text to the last layer, which kept the model better:
#   hispec train … --start-from OUT --rank 64 --deep-rank 12 --batch-tokens 1536 \
#     --keep 6 --keep-share 1 --keep-fraction 1 --lr 0.0004 --soft 0.7
# and nine tenths of it shipped:
#   scripts/scale_adapter.py OUT 0.9 SHIPPED --held-out OUT/work/held_out --perplexity TEXT
# scripts/results/LOG.md has the runs.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,20s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
data=$1 plain=$2 text=$3 out=$4
shift 4

[ -s "$data/plain.jsonl" ] ||
    "$PYTHON" "$ROOT/scripts/plain_texts.py" --text "$plain" --out "$data/plain.jsonl" --limit 160

exec "$PYTHON" -m hispec.cli train --mode lora --model smollm2-135m --exits 8 --resume \
  --data "$data/train.jsonl" "$data/plain.jsonl" --held-out "$data/heldout.jsonl" \
  --max-length 768 --rank 64 --deep-rank 8 --alpha 8 --batch-tokens 1536 \
  --keep-share 0.25 --keep-fraction 0.5 --steps 2000 --lr 0.0004 --soft 0.7 \
  --perplexity "$text" --out "$out" "$@"
