"""The laws as functions: what must hold for any model, hierarchy and sampling.

The tests in ``laws/`` call them with many models; the mutants call them with a bug put back in and
want them to fail.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from unittest import mock

import torch

from helpers.lms import cells_by_position, chain, over, plain, recording, recording_separate
from hispec.generation import LM
from hispec.hierarchy import Hierarchy
from hispec.model.cache import Cache, KVCache
from hispec.model.exits import ExitHead, SharedHead
from hispec.model.level import Separate
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked, Found, Lift
from hispec.result import Result
from hispec.sampling import Sampling


def random_prompt(seed: int, length: int, vocab_size: int = 256) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(length)]


def random_hierarchy(
    draw: random.Random, num_layers: int, exits: Sequence[int] = (), model: str = ""
) -> Hierarchy:
    """One to three exits, from ``exits`` if given, with windows that fit a pass.

    If a separate model is given, it stands below at most two of them, or none.
    """
    candidates = list(exits) or list(range(1, num_layers))
    count = min(draw.choice((1, 1, 2, 2, 3)), len(candidates))
    layers = sorted(draw.sample(candidates, count))
    largest = (MAX_WIDTH - 1) // count
    windows = [draw.choice([w for w in (1, 1, 2, 2, 3, 4, 5, 7, 10, 31) if w <= largest])]
    windows += [draw.choice([w for w in (1, 2, 4, 6, 10) if w <= largest]) for _ in layers[1:]]
    if model:  # in the lowest exit's place
        return over(chain(*zip(layers[1:], windows[1:], strict=True)), model, windows[0])
    return chain(*zip(layers, windows, strict=True))


# ------------------------------------------------------------------ same tokens


def same_tokens(
    lm: LM,
    prompt: Sequence[int],
    hierarchy: Hierarchy,
    sampling: Sampling,
    count: int,
    wanted: Sequence[int] | None = None,
) -> Result:
    """A hierarchy yields the ids of plain decoding, bit for bit."""
    wanted = plain(lm, prompt, count, sampling) if wanted is None else wanted
    result = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=count, sampling=sampling)
    assert result.token_ids == list(wanted), f"{hierarchy} with {sampling} differs from plain"
    assert result.finish_reason == "length"
    return result


# ------------------------------------------------------------------ counts


def expected_visits(result: Result, num_layers: int) -> list[int]:
    """What a level's drafted, accepted and pass counts say about its layer visits, for chains.

    A pass of level k runs its own layers, from the exit below to its own, over the node it already
    stood behind and all drafts: ``passes[k] + drafted[k-1]`` rows in all. The newest of these nodes
    is the pick of the level below (or the round's root) and has seen no layer, so each pass lifts
    one row through everything below. Except where the level below had one pick more than its window
    and dropped it: then the newest node is a draft it has checked. What level j puts into the tree
    is either handed up or dropped so: ``drops[j] = accepted[j-1] + passes[j] - drafted[j]``.

    Levels above lift nothing through a separate model: it has none of their layers. Of what it runs
    itself the counts do not tell; its entry means nothing.
    """
    bounds = [*(level.exit_layer for level in result.hierarchy.levels), num_layers]
    levels = result.levels
    expected = []
    for k, level in enumerate(levels):
        below = levels[k - 1] if k > 0 else None
        own = bounds[k] - (bounds[k - 1] if k > 0 else 0)
        visits = own * (level.passes + (below.drafted if below else 0))
        if below:
            accepted = levels[k - 2].accepted if k > 1 else 0
            drops = accepted + below.passes - below.drafted
            assert drops >= 0
            visits += bounds[k - 1] * (level.passes - drops)
        expected.append(visits)
    return expected


def no_layer_twice(
    lm: LM, prompt: Sequence[int], hierarchy: Hierarchy, sampling: Sampling, count: int
) -> Result:
    """No layer runs twice for a token, and the visits are what the counts imply."""
    models = [level.model for level in hierarchy.models]
    with ExitStack() as stack:
        recorder = stack.enter_context(recording(lm))  # which asserts the first half
        separate = [stack.enter_context(recording_separate(lm, model)) for model in models]
        result = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=count, sampling=sampling)
    num_layers, below = lm.model.config.num_layers, len(models)
    visits = [level.layer_visits for level in result.levels]
    assert result.layer_visits == sum(visits)
    assert sum(visits[below:]) == recorder.visits - len(prompt) * num_layers
    assert visits[below:] == expected_visits(result, num_layers)[below:]
    for model, counts, own in zip(models, result.levels, separate, strict=False):
        prefill = len(prompt) * lm.separate(model).boundary if counts.passes else 0
        assert counts.layer_visits == own.visits - prefill
    return result


def counts_add_up(result: Result) -> None:
    """Every count agrees with every other and with the tokens."""
    target = result.levels[-1]
    assert result.passes == target.passes
    drafts_kept = result.levels[-2].accepted if len(result.levels) > 1 else 0
    assert result.committed == drafts_kept + target.passes
    assert result.num_tokens <= 1 + result.committed  # prefill picks the first
    if result.finish_reason == "length":
        assert result.num_tokens == 1 + result.committed
    assert result.layer_visits == sum(level.layer_visits for level in result.levels)
    assert target.drafted == target.accepted == 0
    for level in result.levels:
        assert 0 <= level.accepted <= level.drafted
        assert sum(level.drafted_at) == level.drafted
        assert sum(level.passes_of) == level.passes
        assert not any(level.passes_of[:1]), "a pass runs something"
        assert sum(level.accepted_at) == level.accepted
        assert all(a <= d for a, d in zip(level.accepted_at, level.drafted_at, strict=True))
        # A place is only drafted or accepted if the ones before it were.
        assert level.drafted_at == sorted(level.drafted_at, reverse=True)
        assert level.accepted_at == sorted(level.accepted_at, reverse=True)
    if len(result.levels) > 1:
        lowest = result.levels[0]
        assert lowest.drafted == lowest.passes  # the lowest level drafts one token a pass


# ------------------------------------------------------------------ rollback and splitting


def rollback(lm: LM, boundaries: Sequence[int], seed: int, steps: int = 12) -> None:
    """After any program of appends and truncations a cache equals one that never knew the rest."""
    draw, model = random.Random(seed), lm.model
    vocab = model.config.vocab_size
    with torch.inference_mode():
        cache, tokens = model.new_cache(boundaries), []
        for step in range(steps):
            if step and draw.random() < 0.6:
                keep = draw.choice((0, len(tokens) - 1, draw.randrange(len(tokens) + 1)))
                cache.truncate(keep)
                del tokens[keep:]
                assert all(known <= keep for known in cache.computed.values())
            tokens += [draw.randrange(vocab) for _ in range(draw.choice((1, 2, 5, 9, 40, 150)))]
            upto = len(tokens)
            for boundary in boundaries:  # ever fewer positions, the deeper the level
                climb(model, cache, tokens, upto, boundary, draw)
                if draw.random() < 0.3:
                    upto = draw.randint(cache.computed[boundary] * 9 // 10, upto)
        climb(model, cache, tokens, len(tokens), boundaries[-1], draw)
        fresh = model.new_cache(boundaries)
        climb(model, fresh, tokens, len(tokens), boundaries[-1])
    equal_caches(lm, cache, fresh)
    assert cache.length == len(tokens)


def climb(
    model,
    cache: Cache,
    tokens: list[int],
    upto: int,
    boundary: int,
    draw: random.Random | None = None,
) -> None:
    """Raises a watermark in passes that stay inside the width class, of random widths if drawn."""
    while cache.computed[boundary] < upto:
        widest = draw.randint(model.narrow.min_width, MAX_WIDTH) if draw else MAX_WIDTH
        model.advance(cache, tokens, min(upto, cache.computed[boundary] + widest), boundary)


def equal_caches(lm: LM, cache: Cache, other: Cache) -> None:
    """Both know the same positions, with the same bits in every key, value and state."""
    assert cache.computed == other.computed
    for boundary, known in cache.computed.items():
        assert torch.equal(cache.states[boundary][:known], other.states[boundary][:known])
    mine, theirs = (keys_and_values(lm, one.kv, cache.length) for one in (cache, other))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def keys_and_values(lm: LM, kv: KVCache, length: int) -> list[torch.Tensor]:
    """Every layer's keys and values of the first positions, (H_kv, length, D_h) each."""
    return [layer[:, :length] for layer in cells_by_position(lm, kv)]


def heads_forget(
    lm: LM, prompt: Sequence[int], hierarchy: Hierarchy, sampling: Sampling, count: int
) -> int:
    """A head's logits do not depend on what it was asked before; returns the calls compared.

    Rejected drafts have passed through a head with keys and values of its own. Whenever the engine
    asks it, a new head that sees the cache for the first time must answer the same. Up to rounding:
    heads only draft, so nothing keeps them inside a width class.
    """
    compared = 0

    def checked(head: ExitHead):
        original = head.logits

        def logits(cache: Cache, first: int, nodes: Nodes) -> torch.Tensor:
            nonlocal compared
            found = original(cache, first, nodes)
            fresh = lm.exits.head(head.exit_layer, lm.model, lm.checkpoint)
            wanted = fresh.logits(cache, first, nodes)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
            compared += 1
            return found

        def best(
            cache: Cache, first: int, nodes: Nodes, asked: Asked, lifts: Sequence[Lift] = ()
        ) -> Found:
            lm.model.run(lifts)
            return logits(cache, first, nodes)  # in logits, whatever was asked

        return mock.patch.multiple(head, logits=logits, best=best)

    heads = [lm.head(exit_layer) for exit_layer in hierarchy.exit_layers]
    patches = [checked(head) for head in heads if not isinstance(head, SharedHead)]
    for patch in patches:
        patch.start()
    try:
        lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=count, sampling=sampling)
    finally:
        for patch in patches:
            patch.stop()
    return compared


def separate_forgets(
    lm: LM, prompt: Sequence[int], hierarchy: Hierarchy, sampling: Sampling, count: int
) -> int:
    """A separate model's logits depend on nothing but the path to a node; returns those compared.

    Whatever it was asked before, was rejected or passed without it: whenever the engine asks it, a
    fresh one, which runs each path by itself, must answer with the same bits.
    """
    compared = 0

    def checked(separate: Separate):
        run, fresh = separate.run, Separate(separate.model)

        def watched(
            tokens: Sequence[int], first: int, end: int, nodes: Nodes, asked: Asked | None = None
        ) -> tuple[Found, int]:
            nonlocal compared  # in logits, whatever was asked
            found, visits = run(tokens, first, end, nodes)
            fresh.prompt = len(prompt)
            for slot in range(first, end):
                path = [nodes.root + node for node in nodes.path(slot - nodes.root)]
                text = [*tokens[: nodes.root], *(tokens[at] for at in path)]
                line = Nodes.line(nodes.root, len(path))
                wanted, _ = fresh.run(text, len(text) - 1, len(text), line)
                fresh.cache.truncate(nodes.root)
                assert torch.equal(found[slot - first], wanted[0])
                compared += 1
            return found, visits

        return mock.patch.object(separate, "run", watched)

    with ExitStack() as stack:
        for level in hierarchy.models:
            stack.enter_context(checked(lm.separate(level.model)))
        lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=count, sampling=sampling)
    return compared
