"""AdaDecode (Wei et al., 2025, arXiv 2506.03700) on our engine.

A token leaves the model early, at the first exit whose head is confident of the next one; that next
token starts at once. The layers it skipped are not dropped but deferred: the next token that goes
deeper takes all waiting ones along, in one pass over several rows. A token that no exit is sure of
goes through to the end, and with it all that wait; there every early token is compared with the
target's own pick, and the first that differs is replaced and what followed it rolled back.

    for e in exits:   run layers up to e for all that lack them; leave if p(pick) ≥ threshold
    otherwise         run the rest for all, verify, commit

Raising a boundary's watermark in our cache is exactly the deferred pass. The heads are the exits at
hand; where none are trained, the model's own head at a quarter, a half and three quarters of the
layers, where the paper has its exits (8, 16, 24 of 32).
"""

from __future__ import annotations

import time

from torch import Tensor

from hispec.bench.recorder import Recorder
from hispec.engine import _Level
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level
from hispec.model.nodes import MAX_WIDTH
from hispec.tree import follow

#: How sure an exit has to be.
THRESHOLD = 0.75


def exits(lm: LM) -> Hierarchy:
    """Returns the exits a token may leave at; their windows mean nothing here.

    Raises:
        UsageError: the model is too shallow to be left early, or has exit 0 alone: there no layer
            has run, so nothing is left early.
    """
    layers = lm.model.config.num_layers
    found = lm.exits.exit_layers if lm.exits else [layers // 4, layers // 2, 3 * layers // 4]
    chosen = sorted({exit_layer for exit_layer in found if 1 <= exit_layer < layers})
    if not chosen:
        has = "exit 0 alone" if lm.exits else f"{layers} layers only"
        raise UsageError(f"adadecode needs an exit of at least 1, and this model has {has}.")
    return Hierarchy(tuple(Level(exit_layer, 1) for exit_layer in chosen), "adadecode")


def note(hierarchy: Hierarchy) -> str:
    """Returns what a reader of its row should know."""
    where = ", ".join(map(str, hierarchy.exit_layers))
    return f"exits {where}, left at a confidence of {THRESHOLD}"


class AdaDecoder(Recorder):
    """Decodes with per-token early exits; greedy.

    Attributes:
        threshold: how sure an exit has to be.
    """

    threshold = THRESHOLD

    def round(self, limit: int) -> list[int]:
        """See ``Decoder.round``."""
        self.room = limit - 1
        while self.leave_early():
            pass
        picks, _ = self.run(self.levels[-1])  # the deferred layers of all that wait
        path, token = follow(self.tree, picks)
        self.judge(len(path))
        self.keep([0, *path])
        self.tree.append(token, len(path), "target")
        return self.commit()

    def leave_early(self) -> bool:
        """Lets the last token leave at the first exit that is sure; returns whether one was."""
        tree = self.tree
        tip = len(tree) - 1
        if tip >= self.room or tree.tokens[tip] in self.stops or len(tree) == MAX_WIDTH - 1:
            return False
        for level in self.levels[:-1]:
            token, chance = self.guess(level, tip)
            if chance >= self.threshold:
                tree.append(token, tip, level.counts.name, chance)
                return True
        return False

    def guess(self, level: _Level, tip: int) -> tuple[int, float]:
        """Returns an exit's pick after the last token and how sure it is of it."""
        started = time.perf_counter()
        self.note_reads(level)
        root, tree = len(self.tokens) - 1, self.tree
        known = self.tokens + tree.tokens[1:]
        runner = level.runner
        logits, visits = runner.run(known, root + tip, root + len(tree), tree.nodes)  # (1, V)
        assert isinstance(logits, Tensor), "no ids were asked for"
        ids, chances = self.picker.ranked(
            logits, [root + tip + 1], lambda _: known, runner.head.vocab_ids, 1
        )
        level.counts.ran(len(tree) - tip, visits, time.perf_counter() - started)
        return ids[0][0], chances[0][0]

    def judge(self, stood: int) -> None:
        """Counts what the target made of the early tokens, each for the exit it left at."""
        for level in self.levels[:-1]:
            places = [i for i, name in enumerate(self.tree.origins) if name == level.counts.name]
            level.counts.verdict(len(places), sum(place <= stood for place in places))
