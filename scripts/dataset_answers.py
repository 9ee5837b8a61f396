"""Writes short answers that Dolly, GSM8K and the code data hold themselves, tokenized for training.

The model's own answers are what exits should be trained on, but decoding them costs a CPU five
times what running the trunk over a given text does. A first part from people teaches the heads to
read the exit's states; the texts are mixed in front of the distilled ones.

    python scripts/dataset_answers.py --data FOLDER --out answers.jsonl --limit 793
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from hispec.model.checkpoint import open_checkpoint


def rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Category, user turn and answer."""

    def lines(name: str) -> Iterator[dict]:
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)

    for row in lines("dolly15k.jsonl.gz"):
        if row["split"] != "test":
            more = f"\n\n{row['context']}" if row["context"] else ""
            yield f"dolly/{row['category']}", row["instruction"] + more, row["response"]
    for row in lines("gsm8k_train.jsonl.gz"):
        yield "gsm8k", row["question"], re.sub(r"<<.*?>>", "", row["answer"])
    for row in lines("gpteacher_codegen.jsonl.gz"):
        more = f"\n\n{row['input']}" if row["input"] else ""
        yield "code", row["instruction"] + more, row["response"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None)
    args = parser.parse_args()
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    made = []
    for category, user, answer in rows(args.data):
        turns = [{"role": "user", "content": user}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        response = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        row = {"category": category, "prompt_ids": prompt["input_ids"], "response_ids": response}
        made.append({"id": str(len(made)), **row})
    random.seed(0)
    random.shuffle(made)
    made = [r for r in made if len(r["prompt_ids"]) + len(r["response_ids"]) <= 1024]
    random.seed(1)
    kept = []
    for row in made:
        prompt, response = len(row["prompt_ids"]), len(row["response_ids"])
        # long prompts cost the trunk most and teach the heads least: keep one in seven
        if (
            response >= 24
            and (prompt <= 140 or random.random() < 0.15)
            and prompt + response <= 700
        ):
            kept.append({**row, "response_ids": row["response_ids"][:300]})
    text = "".join(json.dumps(row) + "\n" for row in kept[: args.limit])
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
