"""Methods side by side on a GPU: whose tokens differ, how fast they are, and what the host takes.

A pass's first time compiles its kernels and its second captures its graph, and which passes a text
takes depends on its length and its drafts. So before anything is timed our methods answer every
question twice; ``captures`` counts the graphs that were captured under the clock all the same.

The host's part of decoding, two ways:

    host    1 − Σ time_s of the levels / decode_s    what runs between passes: databases, the tree
    idle    1 − Σ graphs' time / decode_s            what the device has no graph to run in

Passes are asynchronous, and a level's ``time_s`` ends when the host goes on: launching lies in it,
and so does waiting for the device. So ``host`` leaves out what a pass costs to launch, and counts
what is done while the device works. ``idle`` is told by events around the graphs, in a run of its
own. The few copies and lookups outside of them, and what a head catches up on in the prompt, count
as idle: it is the most that the host may take. Not so a graph's launch, some ten microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hispec.bench.gpu_library import PlainOn, fast_passes
from hispec.bench.gpu_timing import Spans
from hispec.bench.methods import Engine, Method, Outcome, Question, Workbench
from hispec.generation import LM
from hispec.model.gpu import GpuPasses

Row = dict[str, Any]
#: Questions over which the device's idle time is told.
WATCHED = 3
#: The share of the time that warming up may take.
WARMING = 0.6


class Warm(NamedTuple):
    """What is ready to be timed.

    Attributes:
        methods: all that can answer.
        questions: all, unless most of the time was spent before.
        failed: a row for each method that cannot.
    """

    methods: Sequence[Method]
    questions: Sequence[Question]
    failed: list[Row]


def plain_on_fast(bench: Workbench) -> list[Method]:
    """Returns plain decoding on passes that are not exact, where no other row has them already."""
    model = bench.lm.model
    if not isinstance(model.narrow, GpuPasses):
        return []
    return [PlainOn(bench, passes) for passes in fast_passes(model)]


def warm_up(
    methods: Sequence[Method],
    questions: Sequence[Question],
    device: torch.device,
    spent: Callable[[], float] = lambda: 0.0,
) -> Warm:
    """Lets everything be compiled and captured that answering these questions takes.

    Others' methods compile nothing for a length, so they answer the longest question alone. What
    cannot answer here, all but the first, is left out: libraries fail, each in its own way.
    """
    longest = max(questions, key=lambda question: len(question.ids))
    again = [x for x in methods if device.type == "cuda" and isinstance(x, Engine)]
    failed: dict[str, Row] = {}

    def ask(method: Method, question: Question) -> None:
        if method.name in failed:
            return
        try:
            method(Question(question.ids, question.limit))
        except Exception as error:
            if method is methods[0]:
                raise
            right = False if isinstance(method, Engine) else None
            why = (str(error).splitlines() or [type(error).__name__])[0]
            failed[method.name] = {"method": method.name, "right": right, "why": why}

    for method in methods:
        if method not in again:
            ask(method, longest)
    warm = 0 if again else len(questions)
    while warm < len(questions):
        for method in [*again, *again]:
            ask(method, questions[warm])
        warm += 1
        if spent() > WARMING:
            break
    able = [method for method in methods if method.name not in failed]
    return Warm(able, questions[:warm], list(failed.values()))


def compare(
    lm: LM,
    methods: Sequence[Method],
    questions: Sequence[Question],
    clear: Callable[[], None] = lambda: None,
    memory: Callable[[], int] | None = None,
    spent: Callable[[], float] = lambda: 0.0,
) -> Iterator[Row]:
    """Yields a row a method: every question answered by each in turn, after a warm-up.

    The row of one that cannot answer says why.

    Args:
        lm: the model.
        methods: plain decoding first.
        questions: what is asked.
        clear: forgets the peak of ``memory``.
        memory: the most bytes that were in use at once, the weights of all that is loaded included.
        spent: the share of the time there is; once it is over, no further question is asked.
    """
    model = lm.model
    methods, questions, failed = warm_up(methods, questions, model.device, spent)
    totals = {method.name: _Total(method, model.narrow) for method in methods}
    for number, question in enumerate(questions):
        wanted: list[int] | None = None
        for method in methods:
            clear()
            outcome = totals[method.name].answer(question, wanted)
            totals[method.name].used(memory() if memory else None)
            wanted = outcome.token_ids if wanted is None else wanted
        for method in methods if number < WATCHED else ():
            totals[method.name].watch(question, model.device)
        if spent() > 1:
            break
    plain = totals[methods[0].name].s_per_token
    for total in totals.values():
        yield total.row(plain)
    yield from failed


class _Total:
    """What a method has taken so far.

    Args:
        method: the method.
        narrow: the model's passes, on which it runs unless it has some of its own.
    """

    def __init__(self, method: Method, narrow: Any) -> None:
        self._method = method
        passes = getattr(method, "passes", narrow) if isinstance(method, Engine) else None
        self._passes = passes if isinstance(passes, GpuPasses) else None
        self._counts = dict.fromkeys(("prompts", "tokens", "passes", "differ", "captures"), 0)
        self._decode_s = self._ttft_s = self._levels_s = 0.0
        self._watched_s = self._busy_s = 0.0
        self._memory: int | None = None

    def answer(self, question: Question, wanted: Sequence[int] | None) -> Outcome:
        """Returns the answer, counted.

        Args:
            question: what is asked.
            wanted: plain decoding's answer, if it is known.
        """
        before = self._passes.captured if self._passes else 0
        outcome, counts = self._method(question), self._counts
        counts["captures"] += (self._passes.captured if self._passes else 0) - before
        counts["prompts"] += 1
        counts["tokens"] += len(outcome.token_ids) - outcome.first
        counts["passes"] += outcome.passes
        counts["differ"] += wanted is not None and outcome.token_ids != wanted
        self._decode_s += outcome.decode_s
        self._ttft_s += outcome.prefill_s
        self._levels_s += sum(level.get("time_s", 0.0) for level in outcome.levels)
        return outcome

    def watch(self, question: Question, device: torch.device) -> None:
        """Tells when the device is at work, unless another model's graphs run, too."""
        models = self._method.hierarchy.models if isinstance(self._method, Engine) else ()
        if self._passes and not models:
            spans = Spans(device)
            with self._passes.graphs.watched(spans.mark):
                outcome = self._method(question)
            self._watched_s += outcome.decode_s
            self._busy_s += spans.seconds()

    def used(self, memory: int | None) -> None:
        """Counts the memory that an answer took at most."""
        if memory is not None:
            self._memory = max(self._memory or 0, memory)

    @property
    def s_per_token(self) -> float:
        """Seconds a decoded token."""
        return self._decode_s / max(self._counts["tokens"], 1)

    def row(self, plain: float) -> Row:
        """Returns the method's row.

        Args:
            plain: seconds a token of plain decoding.
        """
        each, ours = self.s_per_token, isinstance(self._method, Engine)
        return {
            "method": self._method.name,
            **self._counts,
            "decode_s": self._decode_s,
            "ttft_s": self._ttft_s / self._counts["prompts"],
            "tok_per_s": 1 / each if each else None,
            "speedup": plain / each if each else None,
            "host": 1 - self._levels_s / self._decode_s if ours and self._decode_s else None,
            "idle": 1 - self._busy_s / self._watched_s if self._watched_s else None,
            "memory_gib": None if self._memory is None else self._memory / 2**30,
            "exact": ours and self._method.settings["exact"],
        }
