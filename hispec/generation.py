"""Generating text: a prompt in, a stream of text and a result with its counts out.

``load`` opens a model, ``LM.stream`` is the one path through it and ``LM.generate`` its fold. What
ends a text (eos, a stop string, the number of tokens) is looked at token by token, so that it does
not depend on how many a round committed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from hispec.engine import Decoder, LevelCounts
from hispec.errors import CheckpointError, HispecError, UsageError
from hispec.hierarchy import Hierarchy, preset
from hispec.model.cache import Cache
from hispec.model.checkpoint import Checkpoint, open_checkpoint
from hispec.model.device import choose, dtype_name
from hispec.model.exits import ExitHead, Exits, SharedHead, shipped_exits
from hispec.model.llama import Llama
from hispec.model.numerics import cached_min_width
from hispec.sampling import Sampling
from hispec.text import Detokenizer, StopScanner

#: A text, chat messages (``{"role": …, "content": …}``), or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclass
class Result:
    """A finished (or interrupted) generation: the text and how it came about.

    Attributes:
        finish_reason: ``eos``, ``stop`` (a stop string), ``length``, or ``interrupted``.
        num_prompt_tokens: of these, the last is where generation starts.
        prefill_s: from the call to the first token.
        decode_s: from the first token to the last.
        passes: full passes after prefill.
        layer_visits: (token, layer) pairs run after prefill.
        committed: tokens the full passes committed; more than were emitted where a stop cut a
            round.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    num_prompt_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0
    layer_visits: int = 0
    committed: int = 0
    levels: list[LevelCounts] = field(default_factory=list)
    hierarchy: Hierarchy = field(default_factory=Hierarchy)
    dtype: str = ""
    device: str = ""
    numerics: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens emitted, the one that prefill picked included."""
        return len(self.token_ids)

    @property
    def tok_per_s(self) -> float:
        """Tokens per second of decoding; the first token is prefill's and does not count."""
        return (self.num_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def block_efficiency(self) -> float:
        """Tokens per full pass, bonus included; 1 for plain decoding."""
        return self.committed / self.passes if self.passes else 0.0

    @property
    def layer_visits_per_token(self) -> float:
        """Layer visits after prefill per token committed; L for plain decoding."""
        return self.layer_visits / self.committed if self.committed else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the document of ``hispec generate --json``."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_tokens": self.num_tokens,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tok_per_s": self.tok_per_s,
            "passes": self.passes,
            "block_efficiency": self.block_efficiency,
            "layer_visits": self.layer_visits,
            "layer_visits_per_token": self.layer_visits_per_token,
            "levels": [asdict(level) for level in self.levels],
            "sources": [],
            "hierarchy": self.hierarchy.to_json(),
            "dtype": self.dtype,
            "device": self.device,
            "numerics": self.numerics,
        }


class LM:
    """A loaded Llama with its exits, ready to generate one text at a time.

    Attributes:
        checkpoint: where it came from.
        model: the weights and the passes over them.
        exits: trained exits, or None: then every exit uses the model's own norm and head.
        tokenizer: transformers' tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, model: Llama, exits: Exits | None = None) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.exits = exits
        self.tokenizer = checkpoint.tokenizer
        self.eos = frozenset(checkpoint.eos_token_ids)
        self._cache: Cache | None = None
        self._known: list[int] = []  # the tokens whose keys and values the cache holds
        self._stream: Stream | None = None  # the generation that is writing to the cache
        self._heads: dict[int, ExitHead] = {}

    def hierarchy(self, name: str | Hierarchy = "auto") -> Hierarchy:
        """Returns a hierarchy that fits this model.

        Args:
            name: a preset, the path of a JSON file, or a hierarchy.

        Raises:
            UsageError: no such preset or file, or an exit the model does not have.
        """
        if isinstance(name, Hierarchy):
            found = name
        elif name.endswith(".json"):
            found = Hierarchy.load(Path(name))
        else:
            best = dict(self.exits.best) if self.exits else {}
            found = preset(name, self.model.config.num_layers, best)
        found.check(self.model.config.num_layers)
        return found

    def head(self, boundary: int) -> ExitHead:
        """Returns the head at an exit, or the target's at L."""
        if boundary not in self._heads:
            if self.exits and boundary in self.exits.exit_layers:
                self._heads[boundary] = self.exits.head(boundary, self.model, self.checkpoint)
            else:
                self._heads[boundary] = SharedHead(self.model, boundary)
        return self._heads[boundary]

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Returns a prompt's token ids.

        Args:
            prompt: a text is one user message unless ``raw``; ids pass through.
            raw: no chat template; special tokens are added as the tokenizer does for plain text.

        Raises:
            UsageError: the prompt is empty, or has ids the model does not.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("the prompt is empty. Give at least one character.")
            if raw or not self.tokenizer.chat_template:
                ids = list(self.tokenizer(prompt)["input_ids"])
            else:
                return self.encode([{"role": "user", "content": prompt}])
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self._encode_chat(cast("Sequence[Mapping[str, str]]", prompt))
        else:
            ids = [int(token) for token in cast("Sequence[int]", prompt)]
            size = self.model.config.vocab_size
            wrong = next((token for token in ids if not 0 <= token < size), None)
            if wrong is not None:
                raise UsageError(f"token id {wrong} is not in [0, {size - 1}], the vocabulary.")
        if not ids:
            raise UsageError("the prompt has no tokens. Give at least one.")
        return ids

    def _encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise CheckpointError(
                f"the chat template of {self.checkpoint.name} refuses this conversation: {error}. "
                f"Change it, or give the whole text with raw."
            ) from error
        # The template writes the special tokens itself.
        return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def stream(
        self,
        prompt: Prompt,
        *,
        hierarchy: str | Hierarchy = "auto",
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        raw: bool = False,
        continued: bool = False,
    ) -> Stream:
        """Returns the generation as an iterable of text pieces; nothing runs before the first.

        Args:
            prompt: see :meth:`encode`.
            hierarchy: see :meth:`hierarchy`.
            max_new_tokens: ≥ 1; fewer where the model's context ends before.
            stop: strings that end the text; it is cut before them.
            sampling: greedy by default.
            raw: no chat template.
            continued: keep what the cache knows of the prompt's beginning, as the next turn of a
                chat does. Otherwise a call's outcome does not depend on earlier calls.

        Raises:
            UsageError: an argument is out of range, or the prompt does not fit into the context.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        ids = self.encode(prompt, raw=raw)
        context = self.model.config.max_positions
        if len(ids) >= context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the model's context holds {context}. "
                f"Shorten it to at most {context - 1}."
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        limit = min(max_new_tokens, context - len(ids))
        return Stream(
            self, ids, self.hierarchy(hierarchy), limit, stops, sampling or Sampling(), continued
        )

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Returns the finished generation; the options are those of :meth:`stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def _prepare(self, ids: Sequence[int], hierarchy: Hierarchy, continued: bool) -> Cache:
        """Returns the cache, knowing at most a prefix of ``ids`` (and not its last token)."""
        boundaries = [*hierarchy.exit_layers, self.model.config.num_layers]
        if self._cache is None:
            self._cache = self.model.new_cache(boundaries)
        cache = self._cache
        shared = 0
        if continued and cache.boundaries == boundaries:
            for known, wanted in zip(self._known, ids[:-1], strict=False):
                if known != wanted:
                    break
                shared += 1
        else:
            cache.reset(boundaries)
        self._truncate(shared)
        return cache

    def _truncate(self, length: int) -> None:
        if self._cache is not None:
            self._cache.truncate(length)
        for head in self._heads.values():
            head.truncate(length)
        del self._known[length:]


class Stream:
    """One generation under way: iterate for text, read :attr:`result` at any time.

    A stream is walked once; a second ``iter`` goes on where the first stopped. The model has one
    cache, so starting a generation ends the one before: walking that on raises ``HispecError``.

    Attributes:
        result: what there is so far; complete once the iteration has ended.
    """

    def __init__(
        self,
        lm: LM,
        prompt_ids: list[int],
        hierarchy: Hierarchy,
        limit: int,
        stops: Sequence[str],
        sampling: Sampling,
        continued: bool,
    ) -> None:
        self._lm = lm
        self._ids = prompt_ids
        self._limit = limit
        self._scanner = StopScanner(stops)
        self._words = Detokenizer(lm.tokenizer)
        self._sampling = sampling
        self._continued = continued
        self.result = Result(
            num_prompt_tokens=len(prompt_ids),
            hierarchy=hierarchy,
            dtype=dtype_name(lm.model.dtype),
            device=lm.model.device.type,
            numerics="exact" if lm.model.exact else "fast",
        )
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self) -> Iterator[str]:
        result, lm = self.result, self._lm
        try:
            for token in self._tokens():
                result.token_ids.append(token)
                piece = self._scanner.add(self._words.add(token))
                if self._scanner.hit:
                    result.finish_reason = "stop"
                elif token in lm.eos:
                    result.finish_reason = "eos"
                elif result.num_tokens == self._limit:
                    result.finish_reason = "length"
                if result.finish_reason != "interrupted":
                    if not self._scanner.hit:
                        piece += self._scanner.add(self._words.finish())
                        piece += self._scanner.finish()
                    result.text += piece
                    if piece:
                        yield piece
                    return
                if piece:
                    result.text += piece
                    yield piece
        finally:
            self._settle()

    def _settle(self) -> None:
        """Leaves a prefix of what was emitted in the cache, and not the last token.

        Where a round went further depends on the hierarchy and must not show, whatever ended it.
        """
        lm = self._lm
        if lm._stream is self:
            lm._stream = None
            lm._truncate(len(self._ids) + max(self.result.num_tokens - 1, 0))

    def _tokens(self) -> Iterator[int]:
        """Yields tokens without end; keeps the counts."""
        result, lm = self.result, self._lm
        model = lm.model
        if lm._stream is not None:  # left unfinished, and perhaps not yet collected
            lm._stream._settle()
        lm._stream = self
        started = time.perf_counter()
        with torch.inference_mode():
            cache = lm._prepare(self._ids, result.hierarchy, self._continued)
            tokens = lm._known
            tokens[:] = self._ids
            model.prefill(cache, tokens)
            heads = [lm.head(boundary) for boundary in cache.boundaries]
            last = len(tokens) - 1
            first = self._sampling.pick(heads[-1].logits(cache, last, last), last + 1)[0]
            tokens.append(first)
        decoder = Decoder(model, cache, tokens, result.hierarchy, heads, self._sampling, lm.eos)
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
            with torch.inference_mode():
                committed = decoder.round(self._limit - result.num_tokens)
            result.decode_s = time.perf_counter() - started
            target = decoder.levels[-1].counts
            result.passes = target.passes
            result.layer_visits = sum(level.layer_visits for level in result.levels)
            result.committed += len(committed)
            yield from committed


def load(
    model: str | Path,
    *,
    exits: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    numerics: str = "exact",
    force_exits: bool = False,
) -> LM:
    """Returns a model ready to generate.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``smollm2-135m``.
        exits: a folder of trained exits; those shipped for these weights are found by themselves.
        dtype: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        numerics: ``exact``: every hierarchy yields the very tokens of plain decoding. ``fast``: up
            to rounding ties.
        force_exits: use exits trained on other weights; the output stays right, the speed may not.

    Raises:
        UsageError: an argument names something that does not exist or does not fit.
        CheckpointError: the model cannot be found, read or understood.
    """
    if numerics not in ("exact", "fast"):
        raise UsageError(f"unknown numerics {numerics!r}. Use exact or fast.")
    choice = choose(device, dtype)
    checkpoint = open_checkpoint(str(model))
    if exits is None:
        trained = shipped_exits(checkpoint)
    else:
        trained = Exits.open(Path(exits))
        trained.check_base(checkpoint, force=force_exits)
    exact = numerics == "exact"
    with torch.inference_mode():
        llama = Llama.load(checkpoint, choice.dtype, choice.device, exact=exact)
        if exact:
            llama.narrow.min_width = cached_min_width(llama)
    return LM(checkpoint, llama, trained)


def generate(lm: LM, prompt: Prompt, **options: Any) -> Result:
    """Returns the finished generation; see :meth:`LM.stream` for the options."""
    return lm.generate(prompt, **options)


def stream(lm: LM, prompt: Prompt, **options: Any) -> Stream:
    """Returns the generation as text pieces; see :meth:`LM.stream` for the options."""
    return lm.stream(prompt, **options)
