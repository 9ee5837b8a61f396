#!/usr/bin/env bash
# Makes the data that the exits shipped for smollm2-135m were trained on, and the references they
# were judged by: the model's own continuations.
#
#   scripts/distill_smollm2.sh PROMPT_DATA SPEC_BENCH OUT
#
# PROMPT_DATA  folder with dolly15k.jsonl.gz, gsm8k_train.jsonl.gz, gpteacher_codegen.jsonl.gz and
#              wikitext2_v1_train.txt.gz (databricks-dolly-15k, grade-school-math, GPTeacher,
#              WikiText-2)
# SPEC_BENCH   Spec-Bench's question.jsonl: kept out of the training prompts, and judged by
# OUT          gets prompts/, train.jsonl (training), heldout.jsonl (tuning), spec_eval.jsonl (judging)
#
# MINUTES=N bounds the training part; run again with the same arguments to go on. The states that
# training reads are kept beside the answers: 4 kB a token, 12 GB for 3 M tokens, as many as the
# shipped exit 8 has seen. Another seed makes other answers (hispec distill --seed).
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,18s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
data=$1 spec=$2 out=$3

"$PYTHON" "$ROOT/scripts/training_prompts.py" --dolly "$data/dolly15k.jsonl.gz" \
  --gsm8k "$data/gsm8k_train.jsonl.gz" --code "$data/gpteacher_codegen.jsonl.gz" \
  --wikitext "$data/wikitext2_v1_train.txt.gz" --out "$out/prompts"

distill() { "$PYTHON" -m hispec.cli distill --model smollm2-135m --resume "$@"; }

distill --prompts "$out/prompts/heldout.jsonl" --out "$out/heldout.jsonl" \
  --max-new-tokens 160 --sampled-fraction 0 --keep-order --rows 96
distill --prompts "$spec" --out "$out/spec_eval.jsonl" --max-prompt-tokens 2400 \
  --max-new-tokens 128 --sampled-fraction 0 --keep-order --rows 96 --shard-rows 480 --states 4,8
distill --prompts "$out/prompts/train.jsonl" --exclude "$spec" --out "$out/train.jsonl" \
  --max-new-tokens 160 --max-prompt-tokens 800 --rows 128 --shard-rows 512 --sampled-fraction 0.35 \
  --states 4,8 ${MINUTES:+--minutes "$MINUTES"}
