#!/usr/bin/env bash
# Trains the LayerSkip-style variant of smollm2-135m: LoRA on the backbone, shared norm and head at
# layer 8.
#
#   scripts/train_smollm2_layerskip.sh DATA TEXT OUT [hispec train options]
#
# DATA  what scripts/distill_smollm2.sh wrote (train.jsonl, heldout.jsonl)
# TEXT  WikiText-2's validation text, to report perplexity on
# OUT   gets the adapter, quality.json and OUT/merged, a plain Llama checkpoint
#
# Run again with the same arguments to go on after an interruption.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
data=$1 text=$2 out=$3
shift 3

exec "$VENV/bin/hispec" train --mode lora --model smollm2-135m --exits 8 --resume \
  --data "$data/train.jsonl" --held-out "$data/heldout.jsonl" --max-length 768 \
  --rank 64 --deep-rank 8 --batch-tokens 2048 --keep-every 3 --steps 900 --lr 0.0015 \
  --perplexity "$text" --out "$out" "$@"
