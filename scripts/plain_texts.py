"""Writes pieces of a plain text as rows for training: tokens, and where the loss begins.

`lora` mode pulls the adapted model back to the original at positions of its training texts. Rows
from a chat model's answers alone would leave out plain prose, on which perplexity is measured.

    python scripts/plain_texts.py --text wikitext2_v1_train.txt.gz --out plain.jsonl --limit 160
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

from hispec.model.checkpoint import open_checkpoint

TOKENS, FIRST = 256, 16  # of a piece, and before its first target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    opener = gzip.open if args.text.suffix == ".gz" else open
    with opener(args.text, "rt", encoding="utf-8") as file:
        text = file.read()
    tokenizer = open_checkpoint(args.model).tokenizer
    rng, rows = random.Random(args.seed), []
    for number in range(args.limit):
        start = rng.randrange(len(text) - 16 * TOKENS)
        start = text.index(" ", start)
        ids = tokenizer(text[start : start + 16 * TOKENS], verbose=False)["input_ids"][:TOKENS]
        parts = {"prompt_ids": ids[:FIRST], "response_ids": ids[FIRST:]}
        rows.append({"id": f"plain:{number}", "category": "plain", **parts})
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
