"""What a distillation run will decode: rows in an order, each with its temperature and seed.

Everything random is drawn here, from the run's seed, so that what a shard holds depends on its rows
and nothing else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hispec_training.data import Record, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One continuation to make.

    Attributes:
        id: The prompt's.
        category: The prompt's.
        prompt_ids: Chat template applied.
        temperature: 0 is greedy.
        seed: Of this row's random numbers.
    """

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int


def plan_rows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    sampled_fraction: float,
    temperatures: Sequence[float],
    max_prompt_tokens: int,
    text_prefix_tokens: int = 64,
    shuffle: bool = True,
) -> tuple[list[Row], Counter[str]]:
    """Returns what to decode, in order, and how many prompts were left out or cut.

    Args:
        records: The prompts.
        tokenizer: Of the target.
        seed: Of the shuffle, the coins and the rows' own seeds.
        sampled_fraction: Chance in [0, 1] that a row is sampled.
        temperatures: One of these is drawn for a sampled row.
        max_prompt_tokens: Longer chats are left out; longer plain text is cut.
        text_prefix_tokens: How much of plain text is the prompt.
        shuffle: Mix the records first, so that any number of shards is a fair sample.
    """
    counts: Counter[str] = Counter()
    records = list(records)
    if shuffle:
        random.Random(f"{seed}:order").shuffle(records)
    rows = []
    for record in records:
        ids = encode_prompt(record, tokenizer)
        if record.text:
            ids = ids[: min(text_prefix_tokens, max_prompt_tokens)]
        if len(ids) > max_prompt_tokens:
            counts["too long, left out"] += 1
            continue
        if not ids:
            counts["no tokens, left out"] += 1
            continue
        coin = random.Random(f"{seed}:{len(rows)}:{record.id}")
        sampled = coin.random() < sampled_fraction
        temperature = coin.choice(list(temperatures)) if sampled else 0.0
        rows.append(Row(record.id, record.category, tuple(ids), temperature, coin.getrandbits(63)))
    return rows, counts
