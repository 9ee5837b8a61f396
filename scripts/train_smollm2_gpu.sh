#!/usr/bin/env bash
# Makes exits and a LayerSkip variant like those that ship for smollm2-135m on one GPU, from prompts
# on; ten minutes on an H100. The same steps on a CPU, which made what ships: distill_smollm2.sh,
# train_smollm2.sh and train_smollm2_layerskip.sh.
#
#   scripts/train_smollm2_gpu.sh PROMPT_DATA LM SPEC_BENCH OUT
#
# PROMPT_DATA  see distill_smollm2.sh
# LM           folder with wikitext2_v1_train.txt.gz and wikitext2_v1_valid.txt.gz
# SPEC_BENCH   Spec-Bench's question.jsonl: kept out of the prompts
# OUT          gets prompts/, answers (base.jsonl, self.jsonl, heldout.jsonl), exits/, smollm2-135m-layerskip/
#
# Run again with the same arguments to go on after an interruption. Sizes: ROWS=1024 texts at once, SELF=40000 prompts the
# model makes up itself, SETS=3 sets of long-input tasks, PLAIN=4000 pieces of plain text,
# DISTILL_MINUTES=2 and TRAIN_MINUTES=3, HEAD="--batch-targets 6144", LORA="--batch-tokens 16384".
# MODEL and DEVICE=cpu serve to try it.
set -euo pipefail
[ $# -eq 4 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env test # with the training libraries
data=$1 lm=$2 spec=$3 out=$4
model=${MODEL:-smollm2-135m} device=${DEVICE:-cuda} rows=${ROWS:-1024}
minutes=${DISTILL_MINUTES:-2}
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # what runs beside a step that failed
hispec() { "$PYTHON" -m hispec.cli "$@"; }
distill() {
    hispec distill --model "$model" --device "$device" --rows "$rows" --resume "$@"
}
answer() { # NAME PROMPTS: what exits are trained on
    distill --prompts "$2" --exclude "$spec" --out "$out/$1.jsonl" --shard-rows $((8 * rows)) \
        --max-prompt-tokens 800 --max-new-tokens 192 --sampled-fraction 0.35 --seed 7 \
        --minutes "$minutes"
}

"$PYTHON" "$ROOT/scripts/training_prompts.py" --dolly "$data/dolly15k.jsonl.gz" \
    --gsm8k "$data/gsm8k_train.jsonl.gz" --code "$data/gpteacher_codegen.jsonl.gz" \
    --wikitext "$lm/wikitext2_v1_train.txt.gz" --sets "${SETS:-3}" --out "$out/prompts"
answer base "$out/prompts/train.jsonl" &
base=$!
[ -s "$out/plain.jsonl" ] || "$PYTHON" "$ROOT/scripts/plain_texts.py" --model "$model" --text "$lm/wikitext2_v1_train.txt.gz" \
    --out "$out/plain.jsonl" --limit "${PLAIN:-4000}" &
plain=$!
[ -s "$out/prompts/self.jsonl" ] ||
    "$PYTHON" "$ROOT/scripts/self_prompts.py" --model "$model" --device "$device" --rows "$rows" \
        --count "${SELF:-40000}" --out "$out/prompts/self.jsonl"
distill --prompts "$out/prompts/heldout.jsonl" --out "$out/heldout.jsonl" --max-new-tokens 160 \
    --sampled-fraction 0 --keep-order
answer self "$out/prompts/self.jsonl"
wait $base
wait $plain

train() {
    hispec train --model "$model" --held-out "$out/heldout.jsonl" --minutes "${TRAIN_MINUTES:-3}" \
        --epochs 3 --resume "$@"
}
# shellcheck disable=SC2086 # options
train --mode lora --data "$out/base.jsonl" "$out/self.jsonl" "$out/plain.jsonl" --exits 8 \
    --rank 64 --deep-rank 8 --alpha 8 --keep 3 --keep-share 1 --keep-fraction 0.5 --soft 0.7 \
    --lr 0.0006 --max-length 768 --perplexity "$lm/wikitext2_v1_valid.txt.gz" \
    ${LORA:---batch-tokens 16384} --out "$out/smollm2-135m-layerskip" &
lora=$!
# shellcheck disable=SC2086
train --data "$out/base.jsonl" "$out/self.jsonl" --exits 0,4,8 --head block --context deep \
    --head-vocab 8192 --lr 0.001 --soft 1.0 --dropout 0.1 ${HEAD:---batch-targets 6144} \
    --out "$out/exits"
wait $lora
