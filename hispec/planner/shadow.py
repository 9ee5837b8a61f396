"""What every level would have picked along a text of the target's own: acceptance almost for free.

One prefill over prompt and answer leaves every exit's states at every position. From any root an
exit's head then tells what it would have drafted behind it, and what it found likely, as long as
the drafts before were right; where they were not, the target never judges what follows. A trained
head reads the final states of all before the root, so its picks are made root by root. A separate
model knows the tokens alone: one prefill of its own tells all it would have picked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hispec.drafter import RANKS, SHOWN
from hispec.hierarchy import MAX_WIDTH, Level
from hispec.model.cache import Cache
from hispec.model.exits import ExitHead
from hispec.model.llama import Llama
from hispec.model.nodes import Nodes
from hispec.planner.acceptance import ACCEPTED, BONUS, CORRECTED, OWN, Acceptance, Key
from hispec.planner.cost_table import TARGET
from hispec.sampling import Sampling
from hispec_kernels import top_k

if TYPE_CHECKING:
    from hispec.generation import LM

#: Tokens behind a root that are looked at in one go; of what lies beyond nothing is known.
PLACES = 12
#: Tokens a draft has when acceptance is counted: the next root is where such a round would end.
WALK = 4


@dataclass
class Ranked:
    """What an exit finds behind a root.

    Attributes:
        ids: its likeliest ids after the root and each place behind, best first.
        odds: how likely it finds them.
    """

    ids: list[list[int]]
    odds: list[list[float]]


class Shadow:
    """A text of the target's own and what its exits would have picked along it.

    Args:
        lm: the model.
        exits: layers, ascending.
        prompt: its ids.
        answer: the ids the target gave, at least two.
        models: separate ones, as ``--model`` takes them; they draft below the exits.

    Attributes:
        tokens: prompt and answer.
        start: the first root: the position of the answer's first token, which prefill picks.
        top: (answer, SHOWN) the target's likeliest ids after each token of the answer.
        names: of the levels below the target, from the lowest up.
        ranked: what each of them finds behind each root, by name and root.
    """

    def __init__(
        self,
        lm: LM,
        exits: Sequence[int],
        prompt: Sequence[int],
        answer: Sequence[int],
        models: Sequence[str] = (),
    ) -> None:
        self.tokens = [*prompt, *answer]
        self.start = len(prompt)
        levels = [Level(0, 1, model=model) for model in models] + [Level(e, 1) for e in exits]
        self.names = [level.name for level in levels]
        self.ranked: dict[tuple[str, int], Ranked] = {}
        layers = lm.model.config.num_layers
        with torch.inference_mode():
            cache = lm.model.new_cache([*exits, layers])
            lm.model.prefill(cache, self.tokens[:-1])
            rows = [
                top_k(logits, SHOWN)[1].cpu().numpy() for logits in self._logits(lm.model, cache)
            ]  # sync: the databases keep them on the host
            self.top = np.concatenate(rows)
            for exit_layer in exits:
                self._rank(lm.head(exit_layer), exit_layer, cache)
            for level in levels[: len(models)]:
                self._rank_model(level.name, lm.separate(level.model).model)

    def _logits(self, model: Llama, cache: Cache) -> Iterator[Tensor]:
        """Yields a model's logits after the answer's tokens but the last, some rows at a time."""
        states = cache.states[model.config.num_layers][self.start : len(self.tokens) - 1]
        for at in range(0, len(states), MAX_WIDTH):
            yield model.logits(states[at : at + MAX_WIDTH])

    def _rank_model(self, name: str, model: Llama) -> None:
        """Fills ``ranked`` for a separate model."""
        picker, last = Sampling().picker(), len(self.tokens) - 1
        cache = model.new_cache([model.config.num_layers])
        model.prefill(cache, self.tokens[:-1])
        ids: list[list[int]] = []
        odds: list[list[float]] = []
        for logits in self._logits(model, cache):
            positions = range(self.start + len(ids) + 1, self.start + len(ids) + 1 + len(logits))
            found = picker.ranked(logits, positions, lambda _: [], None, RANKS)
            ids += found[0]
            odds += found[1]
        for root in range(self.start, last):
            part = slice(root - self.start, min(root + PLACES, last) - self.start)
            self.ranked[name, root] = Ranked(ids[part], odds[part])

    def _rank(self, head: ExitHead, exit_layer: int, cache: Cache) -> None:
        """Fills ``ranked`` for one exit, ``PLACES`` deep where the text goes on."""
        picker, last = Sampling().picker(), len(self.tokens) - 1
        name = Level(exit_layer, 1).name
        head.truncate(0)
        for root in range(self.start, last):
            end = min(root + PLACES, last)
            nodes = Nodes.line(root, end - root)
            cache.computed[exit_layer] = end
            head.truncate(root)
            logits = head.logits(cache, root, nodes)
            positions = range(root + 1, end + 1)
            found = picker.ranked(logits, positions, lambda _: [], head.vocab_ids, RANKS)
            self.ranked[name, root] = Ranked(*found)
        head.truncate(0)

    def picks(self, name: str, root: int) -> list[int]:
        """Returns what a level picks after a root and after each place behind it."""
        return [ids[0] for ids in self.ranked[name, root].ids]

    def count(self, acceptance: Acceptance) -> int:
        """Adds this text to the counts of every edge between levels and target.

        Each edge to the target is counted at the roots that decoding with that level would have:
        easy stretches of a text take few rounds, and count as many times.

        Returns:
            How many roots were looked at, of the level with the most.
        """
        most = 0
        for place, name in enumerate(self.names):
            root, roots = self.start, 0
            while root < len(self.tokens) - 1:
                picks = {x: self.picks(x, root) for x in self.names[: place + 1]}
                roots += 1
                root += 1 + self._judge(acceptance, picks, name, root)
            most = max(most, roots)
        return most

    def _judge(
        self, acceptance: Acceptance, picks: dict[str, list[int]], name: str, root: int
    ) -> int:
        """Counts one round that a level hands to the target; returns the tokens that stood.

        Below it, windows may begin wherever its own path is still the text's.

        Args:
            acceptance: gains the counts.
            picks: of the levels up to this one, from the lowest.
            name: its own.
            root: of the round.
        """
        mine, text = picks[name], self.tokens[root + 1 :]
        right = [pick == token for pick, token in zip(mine, text, strict=False)]
        stood = 0
        while stood < len(right):
            _note(acceptance, (name, TARGET), stood, right[stood], picks, stood)
            if not right[stood]:
                break
            stood += 1
        for lower in list(picks)[:-1]:
            for start in range(min(stood + 1, WALK)):
                for place in range(start, len(right)):
                    agrees = picks[lower][place] == mine[place]
                    _note(acceptance, (lower, name), place - start, agrees, picks, place)
                    if not (agrees and right[place]):
                        break
        return min(stood, WALK)


def _note(
    acceptance: Acceptance,
    edge: tuple[str, str],
    place: int,
    stands: bool,
    picks: dict[str, list[int]],
    offset: int,
) -> None:
    """Counts a token of the lower level at a window's place, by each way it may have come to be."""
    lower, upper = edge
    acceptance.add(Key(lower, upper, OWN), place, 1, stands)
    names = list(picks)
    for via in names[: names.index(lower)]:
        agreed = [picks[via][at] == picks[lower][at] for at in (offset, max(offset - 1, 0))]
        origin = ACCEPTED if agreed[0] else CORRECTED
        acceptance.add(Key(lower, upper, origin, via), place, 1, stands)
        if place and agreed[1]:  # it followed one that stood: it may have been one more than asked
            acceptance.add(Key(lower, upper, BONUS, via), place, 1, stands)
