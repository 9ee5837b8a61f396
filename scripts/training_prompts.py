"""Writes the prompts that the shipped exits' training data was distilled from.

Instructions of Dolly, GSM8K's training questions and code instructions as they are, plus tasks put
together from the same texts and WikiText-2 so that long inputs occur: summaries, answers from
passages, translation. Only prompts are written; the model answers them itself (`hispec distill`).

    python scripts/training_prompts.py --dolly dolly15k.jsonl.gz --gsm8k gsm8k_train.jsonl.gz \
        --code gpteacher_codegen.jsonl.gz --wikitext wikitext2_v1_train.txt.gz --out prompts/

`prompts/heldout.jsonl` gets Dolly's rows with split "test" and 60 GSM8K questions, which are then
in no other file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def chat(identity: str, category: str, content: str) -> dict:
    messages = [{"role": "user", "content": content.strip()}]
    return {"id": identity, "category": category, "messages": messages}


def wiki_paragraphs(path: Path) -> list[str]:
    """Paragraphs as prose: WikiText's tokenisation undone, unknown words left out."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    paragraphs = []
    for line in lines:
        if len(line) < 300 or line.startswith("="):
            continue
        line = line.replace("<unk> ", "").replace(" <unk>", "")
        line = re.sub(r" @(.)@ ", r"\1", line)
        line = re.sub(r" ([,.;:!?)%]|'s\b|'t\b)", r"\1", line).replace("( ", "(")
        line = re.sub(r'" ([^"]*) "', r'"\1"', line)
        paragraphs.append(line)
    return paragraphs


def passages(paragraphs: list[str], rng: random.Random, count: int, low: int, high: int):
    """Runs of neighbouring paragraphs, between ``low`` and ``high`` characters each.

    One in eight is up to twice as long: an answer to a long input costs many times a short one's.
    """
    for _ in range(count):
        size, at, text = rng.randint(low, high), rng.randrange(len(paragraphs)), ""
        size = round(size * (rng.uniform(1, 2) if rng.random() < 0.125 else 1))
        while len(text) < size:
            text += ("\n" if text else "") + paragraphs[at % len(paragraphs)]
            at += 1
        yield text[:size].rsplit(". ", 1)[0] + "."


def made_up(
    dolly: list[dict], paragraphs: list[str], rng: random.Random, number: int
) -> list[dict]:
    """Set ``number`` of long-input tasks from Dolly's contexts and WikiText."""
    mark = f"{number}." if number else ""
    rows = []
    contexts = [d for d in dolly if 400 <= len(d["context"]) <= 2000]
    texts = [d["context"] for d in rng.sample(contexts, 1000)]
    texts += passages(paragraphs, rng, 1200, 500, 1800)
    for i, text in enumerate(texts):
        ask = f"Summarize: {text}" if rng.random() < 0.8 else f"{text}\n\nSummarize this text."
        rows.append(chat(f"summary:{mark}{i}", "summarization", ask))

    asked = [d for d in contexts if d["category"] in ("closed_qa", "information_extraction")]
    for i, d in enumerate(asked):
        parts = [d["context"]]
        if rng.random() < 0.5:  # a second passage, as retrieval brings them
            parts += passages(paragraphs, rng, 1, 300, 700)
            rng.shuffle(parts)
        rows.append(chat(f"rag:{mark}{i}", "rag", "\n".join([*parts, d["instruction"]])))
    open_questions = [d["instruction"] for d in dolly if d["category"] == "open_qa"]
    texts = passages(paragraphs, rng, 500, 600, 1800)
    for i, text in enumerate(texts):  # the passages may not hold the answer: that occurs, too
        rows.append(chat(f"rag-open:{mark}{i}", "rag", f"{text}\n{rng.choice(open_questions)}"))

    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?]) ", p) if 40 <= len(s) <= 220]
    languages = ["German"] * 4 + ["French"] * 2 + ["Spanish"]
    for i, sentence in enumerate(rng.sample(sentences, 1500)):
        language = rng.choice(languages)
        ask = f"Translate English to {language}: {sentence}"
        rows.append(chat(f"translation:{mark}{i}", "translation", ask))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("dolly", "gsm8k", "code", "wikitext", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", type=int, default=1, help="of tasks put together")
    args = parser.parse_args()
    rng = random.Random(args.seed)

    heldout, train = [], []
    dolly = rows_of(args.dolly)
    for i, row in enumerate(dolly):
        text = "\n\n".join(part for part in (row["instruction"], row["context"]) if part)
        made = chat(f"dolly:{i}", row["category"], text)
        (heldout if row["split"] == "test" else train).append(made)
    gsm8k = rows_of(args.gsm8k)
    kept_out = set(rng.sample(range(len(gsm8k)), 60))
    for i, row in enumerate(gsm8k):
        made = chat(f"gsm8k:{i}", "math_reasoning", row["question"])
        (heldout if i in kept_out else train).append(made)
    for i, row in enumerate(rows_of(args.code)):
        text = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        train.append(chat(f"code:{i}", "coding", text))
    texts, paragraphs = [d for d in dolly if d["split"] != "test"], wiki_paragraphs(args.wikitext)
    for number in range(args.sets):
        train += made_up(texts, paragraphs, rng, number)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        with open(args.out / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
