"""Split: how rows are cut into passes, and layers into ranges, changes no bit.

Nor do masked positions behind a row's own, nor where the row stands among its company.
"""

from __future__ import annotations

import random

import pytest
import torch
from helpers.laws import keys_and_values, random_prompt
from helpers.lms import recording
from torch import Tensor

from hispec.generation import LM
from hispec.model.llama import PREFILL_CHUNK
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec_kernels.attention import BUCKET, ROWS, decode_attention

KINDS = ("torch fp32", "torch bf16", "compiled fp32", "compiled bf16", "avx2 fp32", "avx2 bf16")
LENGTH = 300  # beyond two splits of the compiled attention


def states_and_cache(lm: LM, tokens: list[int], cuts: list[int], widths) -> tuple[Tensor, list]:
    """Logits of ``tokens`` and all that is stored, for passes of ``widths`` through ``cuts``."""
    model = lm.model
    kv = model.new_cache([model.config.num_layers]).kv
    rows, at = [], 0
    with torch.inference_mode():
        while at < len(tokens):
            width = min(next(widths), len(tokens) - at)
            x, below = model.embed(tokens[at : at + width]), 0
            for cut in [*cuts, model.config.num_layers]:
                x = model.run_layers(x, below, cut, at, kv)
                below = cut
            rows.append(x)
            at += width
        states = torch.cat(rows)
        logits = torch.cat([model.logits(x) for x in rows])
    return logits, [states, *keys_and_values(lm, kv, len(tokens))]


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_hold_the_same_on_one_way_as_on_several(zoo, kind: str) -> None:
    model = zoo("gqa", kind).model
    boundaries, tokens = (0, 2, 5, model.config.num_layers), random_prompt(5, 264)
    tree = Nodes(258)
    for parent in (0, 1, 1, 0, 2):
        tree.append(parent)
    caches = []
    with torch.inference_mode():
        for ways in ([6], [2, 6], [0, 5, 6], [0, 2, 5, 6]):
            cache = model.new_cache(boundaries)
            for boundary in ways:
                below = max([0, *(x for x in ways if x < boundary)])
                visits = model.advance(cache, tokens, PREFILL_CHUNK, boundary, wide=True)
                assert visits == PREFILL_CHUNK * (boundary - below)
            for upto, nodes in ((258, None), (264, tree)):
                for boundary in ways:
                    model.advance(cache, tokens, upto, boundary, nodes=nodes)
            assert set(cache.computed.values()) == {264}
            caches.append(cache)
    for cache in caches[1:]:
        assert torch.equal(cache.kv.storage, caches[0].kv.storage), kind
        for boundary in boundaries:
            found, wanted = (x.states[boundary][:264] for x in (cache, caches[0]))
            assert wanted.any() and torch.equal(found, wanted), (kind, boundary)


def constant(width: int):
    while True:
        yield width


def drawn(seed: int, least: int):
    draw = random.Random(seed)
    while True:
        yield draw.randint(least, MAX_WIDTH)


@pytest.mark.parametrize("name", ["gqa", "biases"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_rows_can_be_cut_anywhere(zoo, name: str, kind: str) -> None:
    lm = zoo(name, kind)
    tokens = random_prompt(11, LENGTH)
    least = lm.model.narrow.min_width  # a single row is padded to it
    wanted = states_and_cache(lm, tokens, [], constant(1))
    for seed, cuts in enumerate(([], [1], [2, 3], list(range(1, lm.model.config.num_layers)))):
        widths = constant(MAX_WIDTH) if seed == 0 else drawn(seed, least)
        found = states_and_cache(lm, tokens, cuts, widths)
        assert torch.equal(found[0], wanted[0])
        for mine, theirs in zip(found[1], wanted[1], strict=True):
            assert torch.equal(mine, theirs)


def test_the_rows_do_differ_from_one_another(zoo) -> None:
    # The comparisons above would also pass if every row were the same.
    logits, _ = states_and_cache(zoo("gqa"), random_prompt(11, 100), [], constant(32))
    assert logits.unique(dim=0).shape[0] == 100


def test_prefill_chunks_end_at_fixed_positions(zoo) -> None:
    # So prefill's rounding, too, depends on the position alone, wherever a continued chat starts.
    lm = zoo("gqa")
    for boundaries in ([6], [2, 4, 6]):
        for start in (0, 1, 255, 256, 300):
            with recording(lm) as recorder, torch.inference_mode():
                cache = lm.model.new_cache(boundaries)
                tokens = random_prompt(1, 600)
                lm.model.prefill(cache, tokens[:start])
                recorder.passes.clear()
                visits = lm.model.prefill(cache, tokens)
            chunks = [(at, at + rows) for first, _, at, rows in recorder.passes if first == 0]
            assert chunks[0][0] == start
            assert [end for _, end in chunks] == [e for e in (256, 512, 600) if e > start]
            assert visits == (600 - start) * 6


# ------------------------------------------------------------------ attention over masked positions


LONGEST = 2176


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def attention(request: pytest.FixtureRequest):
    """Queries for 64 rows, and keys and values of the longest cache with a bucket to spare."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    draw = torch.Generator().manual_seed(0)
    shape = (2, LONGEST + 3 * BUCKET, 64)
    queries = torch.randn((2, 64, 64), generator=draw).to(dtype)
    keys = torch.randn(shape, generator=draw).to(dtype)
    values = torch.randn(shape, generator=draw).to(dtype)
    return queries, keys, values


def attend(attention, rows: slice, lengths: Tensor, buckets: int) -> Tensor:
    """Rows that look at the first ``lengths`` positions of ``buckets`` buckets."""
    queries, keys, values = attention
    span = buckets * BUCKET
    behind = torch.arange(span)[None] >= lengths[:, None]
    mask = torch.zeros(behind.shape, dtype=queries.dtype).masked_fill_(behind, -torch.inf)
    return decode_attention(
        queries[:, rows].contiguous(), keys[:, :span], values[:, :span], mask, 0.125
    )


def test_appended_masked_buckets_change_no_bit(attention) -> None:
    for length in range(1, LONGEST + 1):
        lengths = torch.full((ROWS,), length)
        least = -(-length // BUCKET)
        wanted = attend(attention, slice(0, ROWS), lengths, least)
        more = least + (1 if length % 5 else 2)
        assert torch.equal(attend(attention, slice(0, ROWS), lengths, more), wanted), length


def test_a_rows_company_changes_no_bit(attention) -> None:
    for length in range(1, LONGEST + 1, 61):
        # 64 rows that look at growing lengths, as the tokens of a wide pass do.
        lengths = length + torch.arange(64)
        buckets = -(-(length + 64) // BUCKET)
        wanted = attend(attention, slice(0, 64), lengths, buckets)
        for rows in (8, 16, 24, 40, 56):
            for first in {0, 3, 64 - rows}:
                some = slice(first, first + rows)
                found = attend(attention, some, lengths[some], buckets)
                assert torch.equal(found, wanted[:, some]), (length, rows, first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_rounds_alike_alone_and_in_company(zoo, kind: str) -> None:
    # One block over every position to 2,176: single rows against passes of 32.
    model = zoo("long", kind).model
    draw = torch.Generator().manual_seed(3)
    x = torch.randn((LONGEST, model.config.hidden_size), generator=draw)
    alone, company = (model.new_cache([model.config.num_layers]).kv for _ in range(2))
    with torch.inference_mode():
        x = x.to(model.dtype).to(model.narrow.state_dtype)
        for start in range(0, LONGEST, MAX_WIDTH):
            wide = model.run_layers(x[start : start + MAX_WIDTH], 0, 1, start, company)
            for place in range(MAX_WIDTH):
                at = start + place
                found = model.run_layers(x[at : at + 1], 0, 1, at, alone)
                assert torch.equal(found[0], wide[place]), at
