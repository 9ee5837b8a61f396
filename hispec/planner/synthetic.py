"""Exits that are right as often as wanted: the cost model right or wrong, apart from the exits.

The text is known, as plain decoding ran first. Each exit's head runs as ever, so that it takes the
time it takes, and is then made to pick what a script says: the token of the exit above with a
chosen chance, or another. The uppermost exit agrees with the text likewise. A pick's chance may
depend on whether the exit below agreed, as with real exits. Draws are fresh for every root.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hispec.model.cache import Cache
from hispec.model.exits import ExitHead
from hispec.model.nodes import Nodes
from hispec.model.passes import Asked, Found, Lift
from hispec.planner.acceptance import ACCEPTED, BONUS, CORRECTED, OWN, Acceptance, Key
from hispec.planner.cost_table import TARGET

#: Exits' heads by layer, as the model keeps them.
Heads = dict[int, ExitHead]


@dataclass(frozen=True)
class Script:
    """What exits are to pick.

    Attributes:
        text: the ids by position, prompt and answer, and as many more as may be drafted.
        exits: layers, ascending.
        rates: for each exit, its chance to agree with the one above (with the text at last): where
            the exit below agreed with it, and where it did not. The lowest has the first alone.
        vocab_size: V.
        seed: of the draws.
    """

    text: Sequence[int]
    exits: Sequence[int]
    rates: Sequence[tuple[float, float]]
    vocab_size: int
    seed: int = 0

    def picks(self, root: int, position: int) -> Mapping[int, int]:
        """Returns every exit's token for a position, drafted below a root."""
        draw = random.Random(f"{self.seed} {root} {position}")
        agrees: list[bool] = []
        for where, elsewhere in self.rates:
            rate = where if not agrees or agrees[-1] else elsewhere
            agrees.append(draw.random() < rate)
        above, picks = self.text[position], {}
        for place in reversed(range(len(self.exits))):
            if not agrees[place]:  # one that no exit above has, and not the text's
                above = (self.text[position] + place + 1) % self.vocab_size
            picks[self.exits[place]] = above
        return picks

    def acceptance(self) -> Acceptance:
        """Returns the rates that the script implies, known exactly."""
        table, sure = Acceptance(), 1e9
        names = [*(f"exit {e}" for e in self.exits), TARGET]
        agree = 1.0
        for place, (where, elsewhere) in enumerate(self.rates):
            lower, upper = names[place : place + 2]
            rate = where if place == 0 else agree * where + (1 - agree) * elsewhere
            table.add(Key(lower, upper, OWN), 0, sure, sure * rate)
            if place:
                below = names[place - 1]
                for origin, chance in ((ACCEPTED, where), (CORRECTED, elsewhere), (BONUS, rate)):
                    table.add(Key(lower, upper, origin, below), 0, sure, sure * chance)
            agree = rate
        return table


class ScriptedHead:
    """A head that computes its logits and then picks what the script says."""

    def __init__(self, head: ExitHead, script: Script) -> None:
        self.model = head.model
        self.exit_layer = head.exit_layer
        self.vocab_ids: Tensor | None = head.vocab_ids
        self._head = head
        self._script = script

    def logits(self, cache: Cache, first: int, nodes: Nodes) -> Tensor:
        """See :class:`hispec.model.exits.ExitHead`."""
        logits = self._head.logits(cache, first, nodes)
        wanted = [
            self._script.picks(nodes.root, position + 1)[self.exit_layer]
            for position in nodes.positions(first, first + len(logits))
        ]
        columns = wanted
        if self._head.vocab_ids is not None:  # which may lack the token: a column is renamed
            ids = self._head.vocab_ids.clone()
            columns = list(range(len(wanted)))
            ids[columns] = torch.tensor(wanted, device=ids.device)
            self.vocab_ids = ids
        logits[range(len(wanted)), columns] = torch.finfo(logits.dtype).max
        return logits

    def best(
        self, cache: Cache, first: int, nodes: Nodes, asked: Asked, lifts: Sequence[Lift] = ()
    ) -> Found:
        """See :class:`hispec.model.exits.ExitHead`; the script is told in logits."""
        self.model.run(lifts)
        return self.logits(cache, first, nodes)

    def truncate(self, length: int) -> None:
        """See :class:`hispec.model.exits.ExitHead`."""
        self._head.truncate(length)


@contextmanager
def scripted(heads: Heads, script: Script) -> Iterator[None]:
    """Inside, the exits pick what the script says.

    Args:
        heads: the model's, by layer; they hold every exit of the script.
        script: what to pick.
    """
    before = {exit_layer: heads[exit_layer] for exit_layer in script.exits}
    heads.update({exit_layer: ScriptedHead(head, script) for exit_layer, head in before.items()})
    try:
        yield
    finally:
        heads.update(before)
