"""The engine at work on texts that are known: what any hierarchy would have done, and its time.

Drafting decides how many tokens a pass yields, never which. So where the target's answer is known,
the round can be run without the target: it picks the answer's next token, and exits pick what
:mod:`hispec.planner.shadow` has found them to. What runs is the engine itself with the databases
and the drafter of that hierarchy; only its passes are looked up, and so is what they would have
taken. Off the answer's path, and further behind a root than shadows reach, nothing is known: there
exits find nothing likely, and what they are made to pick never stands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from hispec.engine import Decoder, Ranked, _Level
from hispec.hierarchy import MAX_WIDTH, Hierarchy
from hispec.model.cache import Cache
from hispec.model.level import Exit
from hispec.planner.acceptance import Acceptance, Key
from hispec.planner.cost_table import LOWEST_STEP, CostTable, at
from hispec.planner.shadow import Shadow
from hispec.sampling import Sampling

if TYPE_CHECKING:
    from hispec.generation import LM


@dataclass
class Replayed:
    """What a hierarchy would have done, in counts and expected seconds.

    Attributes:
        tokens: committed.
        passes: of every level, by name.
        seconds: expected, everything included.
        rows: of the target's passes, summed.
        proposed: nodes of every source.
        accepted: of these, the ones committed.
        parts: seconds by level, and ``databases``.
    """

    tokens: int = 0
    passes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rows: int = 0
    proposed: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def latency_s(self) -> float:
        """Expected seconds a token."""
        return self.seconds / self.tokens

    @property
    def tokens_per_pass(self) -> float:
        """Tokens a full pass commits."""
        return self.tokens / self.passes["target"]


class _Echo(Decoder):
    """Decodes a known answer; passes are looked up and their time is added up."""

    def __init__(
        self,
        shadow: Shadow,
        costs: CostTable,
        acceptance: Acceptance,
        done: Replayed,
        *args: Any,
    ) -> None:
        super().__init__(*args)
        self._shadow, self._costs, self._acceptance = shadow, costs, acceptance
        self._done = done
        self._vocab_size = self.levels[-1].runner.model.config.vocab_size
        self._met: set[str] = set()  # exits that have met this round's root
        self._read: set[str] = set()  # who has read the prompt

    def commit(self) -> list[int]:
        """See ``Decoder.commit``."""
        self._met.clear()
        return super().commit()

    def run(self, level: _Level) -> tuple[Sequence[int], Ranked | None]:
        """See ``Decoder.run``."""
        root, tree = len(self.tokens) - 1, self.tree
        first, end = level.tip, len(tree)
        level.counts.ran(end - first, 0, 0.0)
        self._spend(level, root + end, end - first)
        depths = tree.nodes.depths[first:end]
        known = [tree.path(node) == self._text(root, node) for node in range(first, end)]
        last = len(self._shadow.tokens) - 1
        text = [self._shadow.tokens[min(root + depth + 1, last)] for depth in depths]
        if level is self.levels[-1]:
            self.width = end
            self._done.rows += end
            self._show(root, known)
            return text, None  # where a node is wrong nobody reads what follows
        found = self._shadow.ranked[level.counts.name, root]
        ids: list[list[int]] = []
        odds: list[list[float]] = []
        for node, on, depth, token in zip(range(first, end), known, depths, text, strict=True):
            seen = on and depth < len(found.ids)
            ids.append(found.ids[depth] if seen else [self._somewhere(level, node, token)])
            odds.append(found.odds[depth] if seen else [0.0])
        asked = level.adaptive and self.drafter is not None
        return [row[0] for row in ids], (ids, odds) if asked else None

    def _somewhere(self, level: _Level, node: int, token: int) -> int:
        """What an exit picks after a node where nothing is known; ``token`` would be right."""
        place, below = self.levels.index(level), self.tree.nodes.parents
        children = [child for child in range(node + 1, len(below)) if below[child] == node]
        if place and children:
            lower = self.levels[place - 1].counts.name
            rate = self._acceptance.total(Key(lower, level.counts.name)).rate
            if random.Random(f"{len(self.tokens)} {node} {place}").random() < rate:
                return self.tree.tokens[children[0]]
        return (token + 1 + place) % self._vocab_size

    def _text(self, root: int, node: int) -> list[int]:
        return self._shadow.tokens[root + 1 : root + 1 + self.tree.nodes.depths[node]]

    def _show(self, root: int, known: Sequence[bool]) -> None:
        """Lets the databases learn from the target's likeliest ids along the answer."""
        if not (self.drafter and self.drafter.wants_top):
            return
        tree, shadow = self.tree, self._shadow
        nodes = [node for node, on in enumerate(known) if on]
        places = [root + tree.nodes.depths[node] for node in nodes]
        tops = shadow.top[[place - shadow.start for place in places]]
        before = [shadow.tokens[place - 1] for place in places]
        self.drafter.observe([tree.tokens[node] for node in nodes], tops, before)

    def _spend(self, level: _Level, upto: int, rows: int) -> None:
        """Adds a pass's time, and raises the cache's watermarks as it would have."""
        costs, name, cache, below = self._costs, level.counts.name, level.runner.cache, 0
        # Who adapts thinks it over at every step; who does not has little to do.
        short = level is self.levels[0] and level is not self.levels[-1] and not self.drafter
        besides = LOWEST_STEP if short and name not in costs.models_s else 1.0
        seconds, own = besides * costs.step_s, 0
        if name not in self._read:
            self._read.add(name)
            seconds += self._shadow.start * costs.prompt_s.get(name, 0.0)
        if name in costs.models_s:  # what it was not asked about it runs now
            missing = upto - cache.length
            seconds += missing // MAX_WIDTH * at(costs.models_s[name], MAX_WIDTH)
            seconds += at(costs.models_s[name], missing % MAX_WIDTH)
        else:
            seconds += at(costs.heads_s[name], rows)
        levels = cache.boundaries[: cache.boundaries.index(level.runner.boundary) + 1]
        # As the model does it: boundaries that lack the same slots are passed on one way.
        for start, group in groupby(levels, key=cache.computed.__getitem__):
            top = list(group)[-1]
            if start < upto and name not in costs.models_s:
                run = costs.layers_s if top == levels[-1] else costs.lifted_s
                seconds += run(below, top, upto - start)
                own = top - below
            below = top
        cache.computed.update((x, upto) for x in levels if cache.computed[x] < upto)
        if name not in self._met:
            self._met.add(name)
            seconds += costs.round_s.get(name, 0.0)
        else:
            seconds -= costs.kept_s.get(name, 0.0) * own
        self._done.seconds += seconds
        self._done.parts[name] = self._done.parts.get(name, 0.0) + seconds


def replay(
    lm: LM,
    hierarchy: Hierarchy,
    shadows: Sequence[Shadow],
    costs: CostTable,
    acceptance: Acceptance,
) -> Replayed:
    """Returns what a hierarchy would have done with some texts, each with fresh databases.

    Args:
        lm: whose databases draft.
        hierarchy: its levels are among the shadows'.
        shadows: the texts.
        costs: knows the hierarchy's levels.
        acceptance: how often exits agree with each other.
    """
    done = Replayed()
    for shadow in shadows:
        _replay(lm, hierarchy, shadow, costs, acceptance, done)
    return done


def _apart(start: int, capacity: int) -> Any:
    """What stands in for a separate model that has read a prompt: its cache's watermark."""
    cache = Cache([1], 1, 1, 1, capacity, torch.float32, torch.device("cpu"))
    cache.computed[1] = start
    return SimpleNamespace(
        context=capacity, cache=cache, boundary=1, keep=cache.keep, asynchronous=False
    )


def _replay(
    lm: LM,
    hierarchy: Hierarchy,
    shadow: Shadow,
    costs: CostTable,
    acceptance: Acceptance,
    done: Replayed,
) -> None:
    layers = lm.model.config.num_layers
    boundaries = [*hierarchy.exit_layers, layers]
    capacity = len(shadow.tokens) + 64
    cache = Cache(boundaries, 1, 1, 1, capacity, torch.float32, torch.device("cpu"))
    cache.computed.update(dict.fromkeys(boundaries, shadow.start))
    tokens = shadow.tokens[: shadow.start + 1]
    drafter = lm.drafter(hierarchy, learn=False, length=len(tokens))
    if drafter:
        drafter.begin(tokens)
    model: Any = SimpleNamespace(  # all that is asked of it where no layer runs
        config=lm.model.config,
        narrow=SimpleNamespace(asynchronous=False),
        keep=lambda cache, root, kept: cache.keep(root, kept),
    )
    head: Any = SimpleNamespace(truncate=lambda length: None)
    levels: list[Any] = [_apart(shadow.start, capacity) for _ in hierarchy.models]
    levels += [Exit(model, cache, boundary, head) for boundary in boundaries]
    picker = Sampling().picker()
    decoder = _Echo(
        shadow,
        costs,
        acceptance,
        done,
        levels,
        tokens,
        hierarchy,
        picker,
        lm.eos,
        drafter,
    )
    while len(tokens) < len(shadow.tokens):
        decoder.round(len(shadow.tokens) - len(tokens))
        if hierarchy.sources and hierarchy.nodes:
            done.seconds += costs.ask_s
            done.parts["databases"] = done.parts.get("databases", 0.0) + costs.ask_s
    for level in decoder.levels:
        name = level.counts.name
        done.passes[name] = done.passes.get(name, 0) + level.counts.passes
    done.tokens += len(tokens) - shadow.start - 1
    for source in drafter.counts.values() if drafter else ():
        for table, value in ((done.proposed, source.proposed), (done.accepted, source.accepted)):
            table[source.name] = table.get(source.name, 0) + value
