"""Methods: small objects with one call, from a question to token ids and what they cost.

A method of ours is a hierarchy run by the engine. All of them share one prefill a question: it
keeps the states of every exit any of them uses, and each starts from there. What an exit head or a
separate model must catch up on in the prompt is done, and timed as decoding, by the method that
needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hispec.bench.recorder import Recorder
from hispec.drafter import Drafter
from hispec.generation import LM
from hispec.hierarchy import AR, MAX_WIDTH, Hierarchy
from hispec.model.cache import Cache
from hispec.model.llama import Llama
from hispec.model.nodes import Nodes
from hispec.model.torch_passes import TorchPasses
from hispec.sampling import Sampling

#: Seconds from an arbitrary start; waits for the device first.
Clock = Callable[[], float]


@dataclass(eq=False)
class Question:
    """One prompt, about to be answered by every method. A new object means a new prefill.

    Attributes:
        ids: the prompt's token ids.
        limit: new tokens wanted, at least 1; all methods stop there or after an eos.
    """

    ids: Sequence[int]
    limit: int


@dataclass
class Outcome:
    """What a method made of a question, in raw counts.

    Attributes:
        token_ids: emitted tokens, eos included.
        first: how many of them were out when prefill ended, at least 1.
        prefill_s: to the first token, opening databases included.
        decode_s: from there to the last.
        passes: full passes after prefill.
        committed: tokens those passes committed; more than were emitted where an eos cut the last.
        layer_visits: (token, layer) pairs run after prefill.
        bytes_read: weights read after prefill.
        levels: see :class:`hispec.engine.LevelCounts`, as dictionaries.
        origins: for each token the level or source that proposed it; empty where it is not known.
        sources: see :class:`hispec.drafter.SourceCounts`, as dictionaries.
    """

    token_ids: list[int] = field(default_factory=list)
    first: int = 1
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0
    committed: int = 0
    layer_visits: int = 0
    bytes_read: int = 0
    levels: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)


class Method(Protocol):
    """A way of decoding.

    Attributes:
        name: its row in the tables.
        note: what a reader of its row should know; may be empty.
        counts_ids: whether its ids can be compared with plain decoding's.
        settings: what identifies it in a run's record.
    """

    name: str
    note: str
    counts_ids: bool
    settings: dict[str, Any]

    def __call__(self, question: Question) -> Outcome:
        """Returns the answer, timed."""
        ...


def device_clock(device: torch.device) -> Clock:
    """Returns a clock that lets the device finish before it is read."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


@contextmanager
def numerics(model: Llama, *, exact: bool) -> Iterator[None]:
    """Inside, the model runs exact or fast numerics; compiled passes know only one."""
    before, model.exact = model.exact, exact
    passes = [p for p in (model.narrow, model.wide) if isinstance(p, TorchPasses)]
    for p in passes:
        p.exact = exact
    try:
        yield
    finally:
        model.exact = before
        for p in passes:
            p.exact = before


class Workbench:
    """A loaded model and the prefill its methods share.

    Args:
        lm: loaded with exact numerics.
        boundaries: every exit that any method uses.
        clock: times prefill and methods.
    """

    def __init__(self, lm: LM, boundaries: Sequence[int], clock: Clock | None = None) -> None:
        self.lm = lm
        self.clock = clock or device_clock(lm.model.device)
        self.boundaries = sorted({*boundaries, lm.model.config.num_layers})
        self._cache = lm.model.new_cache(self.boundaries)
        self._question: Question | None = None
        self.first = 0
        self.prefill_s = 0.0

    def start(self, question: Question, hierarchy: Hierarchy) -> Cache:
        """Returns the cache as prefill left it, for this hierarchy; its heads know nothing.

        ``first``, the token that prefill picks, and ``prefill_s`` are the question's afterwards.
        """
        lm, cache = self.lm, self._cache
        if question is not self._question:
            self._question = None  # an interrupted prefill must not pass for a finished one
            started = self.clock()
            with numerics(lm.model, exact=True):
                cache.reset(self.boundaries)
                lm.model.prefill(cache, question.ids)
                last = len(question.ids) - 1
                head = lm.head(lm.model.config.num_layers)
                self.first = Sampling().pick(head.logits(cache, last, Nodes(last)), last + 1)[0]
            self.prefill_s = self.clock() - started
            self._question = question
        # Drafts are only ever written behind the prompt, so its states are all still there: those
        # of the boundaries that this hierarchy lacks wait in their buffers.
        boundaries = [*hierarchy.exit_layers, lm.model.config.num_layers]
        cache.reset(boundaries)
        cache.computed.update(dict.fromkeys(boundaries, len(question.ids)))
        for boundary in self.boundaries:
            lm.head(boundary).truncate(0)
        for level in hierarchy.models:
            lm.separate(level.model).cache.truncate(0)
        return cache

    def logits_after(self, question: Question, answer: Sequence[int]) -> Tensor:
        """Returns plain decoding's logits (V,) for the token after ``answer``."""
        with torch.inference_mode(), numerics(self.lm.model, exact=True):
            cache = self.start(question, AR)
            tokens, target = [*question.ids, *answer], cache.boundaries[-1]
            while cache.length < len(tokens):
                end = min(len(tokens), cache.length + MAX_WIDTH)
                self.lm.model.advance(cache, tokens, end, target)
            last = len(tokens) - 1
            return self.lm.head(target).logits(cache, last, Nodes(last))[0]


#: Returns what drafts after the prompt and the first token; None if nothing but exits does.
Drafting = Callable[[Sequence[int]], Any]


class Engine:
    """A hierarchy on our engine.

    Args:
        bench: shared with the other hierarchies.
        name: its row.
        hierarchy: its levels.
        exact: the numerics it decodes in.
        note: for the reader of the row.
        decoder: the engine, or what a baseline makes of it.
        drafting: what drafts below the levels; by default the hierarchy's databases.
        settings: what else identifies it.
    """

    counts_ids = True

    def __init__(
        self,
        bench: Workbench,
        name: str,
        hierarchy: Hierarchy,
        *,
        exact: bool = True,
        note: str = "",
        decoder: type[Recorder] = Recorder,
        drafting: Drafting | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.note = "; ".join(part for part in (note, "" if exact else "fast numerics") if part)
        self.settings = {"hierarchy": hierarchy.to_json(), "exact": exact, **(settings or {})}
        self.hierarchy = hierarchy
        self.exact = exact
        self._bench = bench
        self._decoder = decoder
        self._drafting = drafting or self._databases

    def __call__(self, question: Question) -> Outcome:
        """See :class:`Method`."""
        bench, lm = self._bench, self._bench.lm
        with torch.inference_mode():
            cache = bench.start(question, self.hierarchy)
            with numerics(lm.model, exact=self.exact):
                return self._decode(question, cache)

    def _databases(self, tokens: Sequence[int]) -> Drafter | None:
        """Afresh for every answer: nothing may be learnt from the prompts a method is judged by."""
        drafter = self._bench.lm.drafter(self.hierarchy, learn=False, length=len(tokens))
        if drafter:
            drafter.begin(tokens)
        return drafter

    def _decode(self, question: Question, cache: Cache) -> Outcome:
        bench, lm = self._bench, self._bench.lm
        levels = lm.levels(self.hierarchy, cache, len(question.ids))
        first = bench.first
        started = bench.clock()
        drafter = self._drafting([*question.ids, first])
        begun = bench.clock()
        decoder = self._decoder(
            levels,
            [*question.ids, first],
            self.hierarchy,
            Sampling().picker(),
            lm.eos,
            drafter,
        )
        ids, committed = [first], 0
        while ids[-1] not in lm.eos and len(ids) < question.limit:
            tokens = decoder.round(question.limit - len(ids))
            committed += len(tokens)
            for token in tokens:
                ids.append(token)
                if token in lm.eos:
                    break
        decode_s = bench.clock() - begun
        counts = [level.counts for level in decoder.levels]
        return Outcome(
            ids,
            1,
            bench.prefill_s + begun - started,
            decode_s,
            counts[-1].passes,
            committed,
            sum(level.layer_visits for level in counts),
            decoder.bytes_read,
            [asdict(level) for level in counts],
            ["prefill", *decoder.origins[: len(ids) - 1]],
            [asdict(source) for source in drafter.counts.values()] if drafter else [],
        )
