"""Do rows that run in company have the bits of rows that run alone?

A text is run token by token, as plain decoding runs it, and once more as speculation would: in
passes of random widths, cut at the exits, by turns as a chain and as a tree whose wrong branches
fall away behind it. Compared are all logits of every row, and what a head finds best by itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from hispec.generation import LM
from hispec.model.nodes import MAX_WIDTH, Nodes
from hispec.model.passes import Asked

#: Tokens of a text that are prefilled before its rows are compared.
WARM = 300
#: How many of a row's best ids are compared, and the noise that ranks them by turns.
BEST, SEEDS = 3, (None, 7)


@dataclass
class Bits:
    """What was compared, and what was found to differ.

    Attributes:
        positions: of the texts, behind what was prefilled.
        longest: context.
        passes: each from one exit to the next, or past exits that nothing is asked of.
        trees: runs of the text, each a few passes, that were trees.
        rows: compared, those of wrong branches included.
        rows_that_differ: by at least a bit of their logits.
        bits_that_differ: of these logits.
        picks_that_differ: rows whose best ids, or their odds, are not the same bits.
    """

    positions: int = 0
    longest: int = 0
    passes: int = 0
    trees: int = 0
    rows: int = 0
    rows_that_differ: int = 0
    bits_that_differ: int = 0
    picks_that_differ: int = 0

    @property
    def same(self) -> bool:
        """Whether no bit differs."""
        return not (self.rows_that_differ or self.picks_that_differ)


def compare_bits(lm: LM, texts: Sequence[list[int]], rows: int, seed: int = 0) -> Bits:
    """Compares at least so many rows, unless the texts end before.

    Args:
        lm: the model, and the exits of ``hispec`` at which passes are cut.
        texts: ids, longer than ``WARM`` to be of use.
        rows: the texts' own; a wrong branch of each tree is compared besides.
        seed: of widths, cuts and branches.
    """
    found, draw, turns = Bits(), random.Random(seed), cycle((False, True))
    boundaries = [*lm.hierarchy("hispec").exit_layers, lm.model.config.num_layers]
    with torch.inference_mode():
        for text in texts:
            two = _Two(lm, boundaries, text, draw, found)
            while two.at < len(text) and found.positions < rows:
                two.run(trees=next(turns))
    return found


class _Two:
    """One text, known to two caches.

    Attributes:
        at: slots that both know.
    """

    def __init__(
        self, lm: LM, boundaries: list[int], text: list[int], draw: random.Random, found: Bits
    ) -> None:
        self.model, self.text, self.draw, self.found = lm.model, text, draw, found
        self.alone = lm.model.new_cache(boundaries[-1:])
        self.company = lm.model.new_cache(boundaries)
        self.at = min(WARM, len(text))
        for cache in (self.alone, self.company):
            lm.model.prefill(cache, text[: self.at])

    def run(self, *, trees: bool) -> None:
        """Runs the text some way on, and compares."""
        model, text, root = self.model, self.text, self.at
        nodes, tokens, right = self._grow(branches=trees)
        *exits, top = self.company.boundaries
        # Each exit may come in passes of its own, or not at all.
        for boundary in [*(x for x in exits if self.draw.random() < 0.7), top]:
            while self.company.computed[boundary] < root + len(nodes):
                known = self.company.computed[boundary]
                upto = self.draw.randint(known + 1, root + len(nodes))
                model.advance(self.company, text[:root] + tokens, upto, boundary, nodes=nodes)
                self.found.passes += 1
        states = self.company.states[top][root : root + len(nodes)]
        places = nodes.positions(root, root + len(nodes))
        logits, best = model.logits(states), self._best(states, places)
        wrong = [nodes.path(node) for node in range(len(nodes)) if node not in right]
        # A wrong branch first: what is run last is what stays.
        for path in (*self.draw.sample(wrong, min(len(wrong), 1)), right):
            self.alone.truncate(root)
            line = text[:root] + [tokens[node] for node in path]
            for place, node in enumerate(path, root):
                model.advance(self.alone, line, place + 1, top)
                state = self.alone.states[top][place : place + 1]
                bits = differing_bits(model.logits(state)[0], logits[node])
                self.found.rows_that_differ += bits > 0
                self.found.bits_that_differ += bits
                mine = self._best(state, [place])
                same = all(
                    torch.equal(a[0], b[node])
                    for ours, theirs in zip(mine, best, strict=True)
                    for a, b in zip(ours, theirs, strict=True)
                )
                self.found.picks_that_differ += not same
                self.found.rows += 1
        model.keep(self.company, root, right)
        self.at = root + len(right)
        self.found.positions += len(right)
        self.found.longest = max(self.found.longest, self.at)
        self.found.trees += not nodes.chain()

    def _grow(self, *, branches: bool) -> tuple[Nodes, list[int], list[int]]:
        """Returns nodes, their tokens, and those of them that the text holds, the root first."""
        text, root, draw = self.text, self.at, self.draw
        nodes, tokens, right = Nodes(root), [text[root]], [0]
        for _ in range(draw.randint(1, MAX_WIDTH) - 1):
            end = root + len(right)
            if not branches or draw.random() < 0.3:
                if end == len(text):
                    break
                parent, token = right[-1], text[end]
                right.append(len(nodes))
            else:
                parent = draw.randrange(len(nodes))
                token = draw.randrange(self.model.config.vocab_size)
            nodes.append(parent)
            tokens.append(token)
        return nodes, tokens, right

    def _best(self, states: Tensor, places: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Returns what the head finds best by itself behind each row, plainly and in noise."""
        model, found = self.model, []
        for seed in SEEDS:
            asked = Asked(BEST, 0.7, seed, [place + 1 for place in places])
            best = model.narrow.best(model.head, states, model.norm, asked, None)
            if best is not None:
                found.append((best[0].clone(), best[1].clone()))  # the next one writes there
        return found


def differing_bits(a: Tensor, b: Tensor) -> int:
    """How many bits two rows differ in; 0 means equal, and equal zeros of both signs are not."""
    size = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    differing = (a.view(size) ^ b.view(size)).long()
    words: list[int] = differing[differing != 0].tolist()
    return sum(bin(x & (1 << 8 * a.dtype.itemsize) - 1).count("1") for x in words)


def long_texts(pieces: Sequence[list[int]], length: int, positions: int) -> list[list[int]]:
    """Cuts the pieces, one behind the other, into texts of ``length`` tokens, enough for the rows.

    Where there are too few pieces they are taken again, in another order.
    """
    wanted = -(-positions // (length - WARM))
    texts: list[list[int]] = []
    text: list[int] = []
    draw = random.Random(1)
    while len(texts) < wanted:
        for piece in draw.sample(pieces, len(pieces)):
            text += piece
            if len(text) >= length:
                texts.append(text[:length])
                text = []
    return texts[:wanted]
