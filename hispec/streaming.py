"""One generation under way: tokens become text, and end where the text ends.

What ends a text (eos, a stop string, a criterion, the number of tokens) is looked at token by
token, so that it does not depend on how many a round committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hispec.drafter import Drafter
from hispec.engine import Decoder
from hispec.errors import HispecError
from hispec.hierarchy import Hierarchy
from hispec.model.device import dtype_name, enough_memory
from hispec.model.nodes import Nodes
from hispec.picker import Picker, Trace
from hispec.result import Result
from hispec.text import Detokenizer, StopScanner

if TYPE_CHECKING:
    from hispec.generation import LM

#: transformers' ``StoppingCriteria``: called with all ids (1, S) and the scores of every step, or
#: None; true ends the text.
Criterion = Callable[..., Any]
#: What helps where a GPU's memory runs out in the middle of a text.
ADVICE = "give a shorter --context or fewer exits"


class Streamer(Protocol):
    """transformers' streamers: told the prompt, then every token, then the end."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt, (1, S), and then one token at a time, (1,)."""
        ...

    def end(self) -> None:
        """Nothing comes any more."""
        ...


@dataclass(frozen=True)
class Ends:
    """What ends a text.

    Attributes:
        limit: tokens, ≥ 1.
        stops: strings before which the text is cut.
        eos: ids after which it ends.
        criteria: asked after every token, in order, once.
    """

    limit: int
    stops: Sequence[str] = ()
    eos: Collection[int] = ()
    criteria: Sequence[Criterion] = ()


class Stream:
    """One generation under way: iterate for text, read :attr:`result` at any time.

    A stream is walked once; a second ``iter`` goes on where the first stopped. The model has one
    cache, so starting a generation ends the one before: walking that on raises ``HispecError``.

    Args:
        lm: the model.
        prompt_ids: the prompt.
        hierarchy: one that fits the model.
        ends: what ends the text.
        picker: how every level picks.
        streamer: told everything that is emitted.
        wants: what to keep of every token: ``scores``, ``logits``, ``logprobs``.
        continued: keep what the cache knows of the prompt's beginning.
        learn: see :meth:`LM.stream`.

    Attributes:
        result: what there is so far; complete once the iteration has ended.
        again: the text before had the same prompt, whose prefill is kept.
    """

    def __init__(
        self,
        lm: LM,
        prompt_ids: list[int],
        hierarchy: Hierarchy,
        ends: Ends,
        picker: Picker,
        *,
        streamer: Streamer | None = None,
        wants: Collection[str] = (),
        continued: bool = False,
        learn: bool = True,
    ) -> None:
        self._lm = lm
        self._ids = prompt_ids
        self._ends = ends
        self._scanner = StopScanner(ends.stops)
        self._text: Tensor | None = None  # prompt and tokens so far, for criteria
        self._words = Detokenizer(lm.tokenizer) if lm.tokenizer else None
        self._picker = picker
        self._streamer = streamer
        self._wants = wants
        self._continued = continued
        self._learn = learn
        self._drafter: Drafter | None = None
        self.again = False
        picker.traces = {} if wants else None
        self.result = Result(
            num_prompt_tokens=len(prompt_ids),
            hierarchy=hierarchy,
            seed=picker.seed,
            dtype=dtype_name(lm.model.dtype),
            device=lm.model.device.type,
            numerics="exact" if lm.model.exact else "fast",
        )
        self._pairs = self._run()

    def __iter__(self) -> Iterator[str]:
        return (piece for _, piece in self._pairs if piece)

    def tokens(self) -> Iterator[int]:
        """Yields the tokens instead of the text they make."""
        return (token for token, _ in self._pairs)

    def _run(self) -> Iterator[tuple[int, str]]:
        """Yields each token and the text it completes; the last one comes with all that is left."""
        result, streamer = self.result, self._streamer
        if streamer:
            streamer.put(torch.tensor([self._ids]))
        try:
            for token in self._tokens():
                result.token_ids.append(token)
                self._keep(token)
                piece = self._scanner.add(self._words.add(token)) if self._words else ""
                if streamer:
                    streamer.put(torch.tensor([token]))
                ended = self._ended(token)
                if ended and self._words and not self._scanner.hit:
                    piece += self._scanner.add(self._words.finish()) + self._scanner.finish()
                result.text += piece
                if ended:
                    result.finish_reason, result.stop_reason = ended
                    if streamer:
                        streamer.end()
                yield token, piece
                if ended:
                    return
        finally:
            self._settle()

    def _ended(self, token: int) -> tuple[str, str | int | None] | None:
        """Returns why the text ends with ``token`` and what ended it, None if it goes on."""
        met = self._criterion(token) if self._ends.criteria else None
        if self._scanner.hit:
            return "stop", self._scanner.stop
        if token in self._ends.eos:
            return "eos", token
        if self.result.num_tokens == self._ends.limit:
            return "length", None
        return ("stop", met) if met else None

    def _criterion(self, token: int) -> str | None:
        """Returns the name of the first criterion that ends the text; asks every one of them."""
        length = len(self._ids) + self.result.num_tokens
        if self._text is None:
            device = self._lm.model.device
            self._text = torch.tensor([self._ids + [0] * self._ends.limit], device=device)
        self._text[0, length - 1] = token
        ids = self._text[:, :length]  # (1, S)
        scores = tuple(row[None] for row in self.result.scores) or None
        met = [x for x in self._ends.criteria if bool(torch.as_tensor(x(ids, scores)).all())]
        return getattr(met[0], "__name__", type(met[0]).__name__) if met else None

    def _keep(self, token: int) -> None:
        """Keeps of a token's pick what was asked for."""
        if self._picker.traces is None:
            return
        position = len(self._ids) + self.result.num_tokens - 1
        trace: Trace = self._picker.traces.pop(position)
        if "scores" in self._wants:
            self.result.scores.append(trace.scores)
        if "logits" in self._wants:
            self.result.logits.append(trace.logits)
        if "logprobs" in self._wants:
            self.result.logprobs.append(float(trace.scores.log_softmax(-1)[token]))

    def _settle(self) -> None:
        """Leaves a prefix of what was emitted in the cache, and not the last token.

        Where a round went further depends on the hierarchy and must not show, whatever ended it.
        """
        lm = self._lm
        if lm._stream is self:
            lm._stream = None
            if self._drafter:
                self._drafter.end()
            lm._truncate(len(self._ids) + max(self.result.num_tokens - 1, 0))

    def _tokens(self) -> Iterator[int]:
        """Yields tokens without end; keeps the counts."""
        result, lm, picker = self.result, self._lm, self._picker
        model = lm.model
        if lm._stream is not None:  # left unfinished, and perhaps not yet collected
            lm._stream._settle()
        lm._stream = self
        started = time.perf_counter()
        with torch.inference_mode(), enough_memory("reading the prompt", None, ADVICE):
            cache = lm._prepare(
                self._ids, result.hierarchy, continued=self._continued, again=self.again
            )
            result.num_cached_tokens = cache.length
            tokens = lm._known
            tokens[:] = self._ids
            model.prefill(cache, tokens)
            levels = lm.levels(result.hierarchy, cache, len(tokens))
            last = len(tokens) - 1
            logits, _ = levels[-1].run(tokens, last, last + 1, Nodes(last))  # (1, V)
            assert isinstance(logits, torch.Tensor), "no ids were asked for"
            first = picker.picks(logits, [last + 1], lambda _: tokens)[0]
            tokens.append(first)
        with enough_memory("timing passes", None, ADVICE):
            names = (level.name for level in result.hierarchy.levels)
            read = {name: level.read for name, level in zip(names, levels, strict=False)}
            drafter = self._drafter = lm.drafter(
                result.hierarchy, learn=self._learn, length=len(tokens), read=read
            )
        if drafter:
            drafter.begin(tokens)
            result.sources = list(drafter.counts.values())
        stops = self._ends.eos
        decoder = Decoder(levels, tokens, result.hierarchy, picker, stops, drafter)
        result.levels = [level.counts for level in decoder.levels]
        result.prefill_s = time.perf_counter() - started
        yield first
        started = time.perf_counter()
        while True:
            if lm._stream is not self:
                raise HispecError(
                    "another generation was started with this model, which ended this stream. "
                    "Walk one stream to its end before the next, or load the model twice."
                )
            with torch.inference_mode(), enough_memory("decoding", None, ADVICE):
                committed = decoder.round(self._ends.limit - result.num_tokens)
            result.decode_s = time.perf_counter() - started
            target = decoder.levels[-1].counts
            result.passes = target.passes
            result.layer_visits = sum(level.layer_visits for level in result.levels)
            result.committed += len(committed)
            yield from committed
