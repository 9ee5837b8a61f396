"""What every exit would have picked along a text of the target's own: acceptance almost for free.

One prefill over prompt and answer leaves every exit's states at every position. From any root an
exit's head then tells what it would have drafted behind it, and what it found likely, as long as
the drafts before were right; where they were not, the target never judges what follows. A trained
head reads the final states of all before the root, so its picks are made root by root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hispec.drafter import RANKS, SHOWN
from hispec.hierarchy import MAX_WIDTH
from hispec.model.cache import Cache
from hispec.model.exits import ExitHead
from hispec.model.nodes import Nodes
from hispec.planner.acceptance import ACCEPTED, BONUS, CORRECTED, OWN, Acceptance, Key
from hispec.planner.cost_table import TARGET
from hispec.sampling import Sampling
from hispec_kernels import top_k

if TYPE_CHECKING:
    from hispec.generation import LM

#: Tokens behind a root that are looked at in one go.
PLACES = 8
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

    Attributes:
        tokens: prompt and answer.
        start: the first root: the position of the answer's first token, which prefill picks.
        top: (answer, SHOWN) the target's likeliest ids after each token of the answer.
        ranked: what each exit finds behind each root, by exit and root.
    """

    def __init__(
        self, lm: LM, exits: Sequence[int], prompt: Sequence[int], answer: Sequence[int]
    ) -> None:
        self.tokens = [*prompt, *answer]
        self.start = len(prompt)
        self.exits = list(exits)
        self.ranked: dict[tuple[int, int], Ranked] = {}
        layers, last = lm.model.config.num_layers, len(self.tokens) - 1
        with torch.inference_mode():
            cache = lm.model.new_cache([*exits, layers])
            lm.model.prefill(cache, self.tokens[:-1])
            states = cache.states[layers][self.start : last]
            rows = [
                top_k(lm.model.logits(states[at : at + MAX_WIDTH]), SHOWN)[1].cpu().numpy()
                for at in range(0, len(states), MAX_WIDTH)
            ]  # sync: the databases keep them on the host
            self.top = np.concatenate(rows)
            for exit_layer in exits:
                self._rank(lm.head(exit_layer), exit_layer, cache)

    def _rank(self, head: ExitHead, exit_layer: int, cache: Cache) -> None:
        """Fills ``ranked`` for one exit, ``PLACES`` deep where the text goes on."""
        picker, last = Sampling().picker(), len(self.tokens) - 1
        head.truncate(0)
        for root in range(self.start, last):
            end = min(root + PLACES, last)
            nodes = Nodes.line(root, end - root)
            cache.computed[exit_layer] = end
            head.truncate(root)
            logits = head.logits(cache, root, nodes)
            positions = range(root + 1, end + 1)
            found = picker.ranked(logits, positions, lambda _: [], head.vocab_ids, RANKS)
            self.ranked[exit_layer, root] = Ranked(*found)
        head.truncate(0)

    def picks(self, exit_layer: int, root: int) -> list[int]:
        """Returns what an exit picks after a root and after each place behind it."""
        return [ids[0] for ids in self.ranked[exit_layer, root].ids]

    def count(self, acceptance: Acceptance) -> int:
        """Adds this text to the counts of every edge between exits and target.

        Each edge to the target is counted at the roots that decoding with that exit would have:
        easy stretches of a text take few rounds, and count as many times.

        Returns:
            How many roots were looked at, of the exit with the most.
        """
        most = 0
        for place, exit_layer in enumerate(self.exits):
            root, roots = self.start, 0
            while root < len(self.tokens) - 1:
                picks = {e: self.picks(e, root) for e in self.exits[: place + 1]}
                roots += 1
                root += 1 + self._judge(acceptance, picks, exit_layer, root)
            most = max(most, roots)
        return most

    def _judge(
        self, acceptance: Acceptance, picks: dict[int, list[int]], exit_layer: int, root: int
    ) -> int:
        """Counts one round that ``exit_layer`` hands to the target; returns the tokens that stood.

        Below it, windows may begin wherever its own path is still the text's.
        """
        mine, text = picks[exit_layer], self.tokens[root + 1 :]
        right = [pick == token for pick, token in zip(mine, text, strict=False)]
        below = [e for e in picks if e != exit_layer]
        name = f"exit {exit_layer}"
        stood = 0
        while stood < len(right):
            _note(acceptance, name, TARGET, stood, right[stood], picks, exit_layer, stood)
            if not right[stood]:
                break
            stood += 1
        for lower in below:
            for start in range(min(stood + 1, WALK)):
                for place in range(start, len(right)):
                    agrees = picks[lower][place] == mine[place]
                    _note(
                        acceptance,
                        f"exit {lower}",
                        name,
                        place - start,
                        agrees,
                        picks,
                        lower,
                        place,
                    )
                    if not (agrees and right[place]):
                        break
        return min(stood, WALK)


def _note(
    acceptance: Acceptance,
    lower: str,
    upper: str,
    place: int,
    stands: bool,
    picks: dict[int, list[int]],
    exit_layer: int,
    offset: int,
) -> None:
    """Counts a token of ``exit_layer`` at a window's place, by each way it may have come to be."""
    acceptance.add(Key(lower, upper, OWN), place, 1, stands)
    for via in (e for e in picks if e < exit_layer):
        agreed = [picks[via][at] == picks[exit_layer][at] for at in (offset, max(offset - 1, 0))]
        origin = ACCEPTED if agreed[0] else CORRECTED
        acceptance.add(Key(lower, upper, origin, f"exit {via}"), place, 1, stands)
        if place and agreed[1]:  # it followed one that stood: it may have been one more than asked
            acceptance.add(Key(lower, upper, BONUS, f"exit {via}"), place, 1, stands)
