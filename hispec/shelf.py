"""The databases of one loaded model, opened when a hierarchy first names them.

There are two sets. The living one learns from text to text and keeps the user's history file. The
fresh one starts every text as it was delivered, so that what it does depends on nothing before:
benchmarks take it, and nothing they run is learnt from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from hispec.drafter import Drafter
from hispec.hierarchy import SOURCES, Hierarchy, Level
from hispec.odds import Odds
from hispec.planner.first_prices import (
    LevelCost,
    context_growth,
    keep_price_slope,
    level_cost,
    model_cost,
    pass_costs,
    price_slope,
)
from hispec.planner.prices import Growth, Prices
from hispec.sources import Source
from hispec.sources.context import Context
from hispec.sources.corpus import Corpus
from hispec.sources.fingerprint import DatabaseError, fingerprint
from hispec.sources.history import History
from hispec.sources.history_file import default_path
from hispec.sources.recycle import Recycle
from hispec.sources.store import Store

if TYPE_CHECKING:
    from hispec.generation import LM

#: Tokens of a prompt behind which rows are noticeably dearer than where they were timed.
LONG = 512


class Shelf:
    """Keeps a model's sources, their odds and what a pass costs, from text to text.

    Args:
        lm: the model.
        corpus: a store that ``hispec ngrams build`` wrote; without one there is no such source.

    Raises:
        DatabaseError: the store is none, is damaged, or belongs to another tokenizer.
    """

    def __init__(self, lm: LM, corpus: Path | None = None) -> None:
        self._lm = lm
        self._corpus = Store(corpus, self._tokenizer) if corpus else None
        self._sources: dict[tuple[str, bool], Source | None] = {}
        self._odds = Odds()
        self._prices: Prices | None = None  # of the living set
        self._whole: tuple[list[float], Growth] | None = None  # prices of the fresh one
        self._level_costs: dict[tuple[str, bool], LevelCost] = {}

    @cached_property
    def _tokenizer(self) -> str:
        """The tokenizer's fingerprint: a fifth of a second for 49,152 tokens."""
        return fingerprint(self._lm.tokenizer)

    def drafter(
        self,
        hierarchy: Hierarchy,
        *,
        learn: bool = True,
        length: int | None = None,
        read: Mapping[str, int] | None = None,
    ) -> Drafter | None:
        """Returns what drafts for a hierarchy; see :meth:`LM.drafter`."""
        budgets = dict(hierarchy.sources) if hierarchy.nodes else {}
        sources = [
            found
            for name in SOURCES
            if budgets.get(name, 0) > 0 and (found := self._source(name, learn)) is not None
        ]
        adaptive = [level for level in hierarchy.levels if hierarchy.adapts(level)]
        if not sources and not adaptive:
            return None
        prices = self._priced(adaptive, learn, length or 0) if hierarchy.adaptive else None
        if prices and length is not None:
            prices.begin(length, read)
        if not learn:
            for source in sources:
                source.reset()
        odds = self._odds if learn and hierarchy.adaptive else Odds()
        return Drafter(sources, hierarchy, prices, odds)

    def _priced(self, levels: Sequence[Level], learn: bool, length: int) -> Prices:
        """Returns what passes cost, and those of levels that adapt.

        A user's text waits for a glance at them, and for one at what its length costs where it is
        long. A text of which nothing is learnt is there to be measured: that waits for them all.
        """
        model, glance = self._lm.model, learn
        measured = {level.name: self._level_cost(level, glance=glance) for level in levels}
        costs = {name: cost.each for name, cost in measured.items()}
        reading = {name: cost.token for name, cost in measured.items()}
        if not learn:
            if self._whole is None:
                self._whole = pass_costs(model), context_growth(model)
            table, growth = self._whole
            return Prices(table, costs, growth=growth, reading=reading)
        if self._prices is None:
            keep = partial(keep_price_slope, model)
            self._prices = Prices(pass_costs(model, glance=True), {}, price_slope(model), keep)
        if self._prices.growth is None and length > LONG:
            self._prices.growth = context_growth(model, glance=True)
        self._prices.add(costs, reading)
        return self._prices

    def reprice(self, exits: Sequence[int], models: Sequence[str]) -> None:
        """Times passes anew, whatever is remembered; see :meth:`LM.reprice`."""
        self._prices = self._whole = None
        self._level_costs.clear()
        pass_costs(self._lm.model, anew=True)
        context_growth(self._lm.model, anew=True)
        for level in (*(Level(0, 1, model=x) for x in models), *(Level(e, 1) for e in exits)):
            self._level_cost(level, anew=True)

    def _level_cost(self, level: Level, *, glance: bool = False, anew: bool = False) -> LevelCost:
        lm, key = self._lm, (level.model or level.name, glance)
        if key not in self._level_costs:
            how = {"glance": glance, "anew": anew}
            if level.model:
                cost = model_cost(lm.model, lm.separate(level.model).model, **how)
            else:
                label = lm.exits.fingerprint if lm.exits else "own"
                cost = level_cost(
                    lm.model, lm.head(level.exit_layer), level.exit_layer, label, **how
                )
            self._level_costs[key] = cost
        return self._level_costs[key]

    def _source(self, name: str, learn: bool) -> Source | None:
        if (name, learn) not in self._sources:
            self._sources[name, learn] = self._open(name, learn)
        return self._sources[name, learn]

    def _open(self, name: str, learn: bool) -> Source | None:
        lm, vocab_size = self._lm, self._lm.model.config.vocab_size
        if name == "context":
            return Context()
        if name == "recycle":
            return Recycle(vocab_size)
        if name == "corpus":
            return Corpus(self._corpus, vocab_size) if self._corpus else None
        tokenizer = self._tokenizer
        base = shipped_history(tokenizer)
        if not learn:
            return History(None, tokenizer, vocab_size, base=base)
        path = default_path(lm.checkpoint.fingerprint)
        kept = History(path, tokenizer, vocab_size, base=base)
        try:
            kept.begin(())  # reads the file
        except DatabaseError as error:
            print(f"{error} Drafting goes on without it.", file=sys.stderr)
            return History(None, tokenizer, vocab_size, base=base)
        return kept


def shipped_history(tokenizer: str) -> Store | None:
    """Returns the answers counted beforehand that come with hispec for a tokenizer, or None."""
    for path in sorted((Path(__file__).parent / "databases").glob("*/history.bin")):
        store = Store(path)
        if store.facts.get("tokenizer") == tokenizer:
            return store
    return None
