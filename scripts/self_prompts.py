"""Writes prompts that the model makes up itself (Magpie, arXiv 2406.08464).

Given only what stands before a user's turn, a chat model writes a turn as its training had them.
Such prompts cover what the exits will meet more widely than a few public sets do.

    python scripts/self_prompts.py --model smollm2-135m --count 20000 --out self.jsonl --device cuda
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from hispec.files import write_whole
from hispec.model.checkpoint import open_checkpoint
from hispec_training.data import Record, encode_prompt
from hispec_training.decode import BatchDecoder, Request
from hispec_training.trunk import Trunk


def opening(tokenizer) -> list[int]:
    """The token ids of the chat template up to where a user's words begin."""
    first, second = (
        encode_prompt(Record("", "", ({"role": "user", "content": text},)), tokenizer)
        for text in ("one", "two")
    )
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[:same]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=20000, help="drawn; fewer are usable")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=400, help="longer ones are left out")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="texts decoded together")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    tokenizer, rng = checkpoint.tokenizer, random.Random(args.seed)
    start = opening(tokenizer)
    requests = [
        Request(start, args.max_tokens, args.temperature, rng.getrandbits(63))
        for _ in range(args.count)
    ]
    decoder = BatchDecoder(
        Trunk(checkpoint, device=args.device), checkpoint.eos_token_ids, args.rows
    )
    seen: set[str] = set()
    lines = []
    for answer in decoder.decode(requests):
        text = tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        if answer.finish != "eos" or len(text.split()) < 4 or text in seen:
            continue
        seen.add(text)
        row = {"id": f"self:{answer.index}", "category": "self"}
        row["messages"] = [{"role": "user", "content": text}]
        lines.append(json.dumps(row) + "\n")
    write_whole(args.out, "".join(lines), sync=True)
    print(f"{len(seen)} prompts of {args.count} drawn in {args.out}")


if __name__ == "__main__":
    main()
