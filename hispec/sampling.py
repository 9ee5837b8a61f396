"""What the user asks of the pick, checked; the picking itself is :mod:`hispec.picker`'s.

The names are transformers'. ``presence_penalty`` and ``frequency_penalty`` are those of OpenAI's
interface: they count the tokens generated so far, not the prompt's.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hispec.picker import Picker
    from hispec.processors import Processor

_MASK64 = (1 << 64) - 1

#: What shapes a distribution and so means nothing where the best token is taken: name → no effect.
_WARPERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        temperature: 0 is greedy.
        seed: fixes the noise; only used above temperature 0. None: one is drawn for each text, and
            reported with it.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that make up this probability together, in (0, 1].
        min_p: only tokens at least this fraction as likely as the likeliest, in [0, 1].
        typical_p: only the tokens of most typical surprise of this probability together, in (0, 1].
        repetition_penalty: divides the scores of tokens that occurred (prompt included), > 0.
        presence_penalty: subtracted from the score of each generated token, in [−2, 2].
        frequency_penalty: subtracted once for each time a token was generated, in [−2, 2].
        no_repeat_ngram_size: no sequence of this many tokens occurs twice; 0 is off.
        bad_words_ids: token sequences that never occur.
        suppress_tokens: ids that are never picked.
        begin_suppress_tokens: ids that are not picked first.
        forced_bos_token_id: the second token of a text whose prompt is one token.
        forced_eos_token_id: the last token of a text that reaches its limit.
        processors: transformers' ``LogitsProcessor`` or any pure function of (ids, scores) with
            shapes (1, S) and (1, V); they come after the processors above and before temperature.
    """

    temperature: float = 0.0
    seed: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    processors: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_tokens()
        if self.temperature == 0.0:
            for name, neutral in _WARPERS.items():
                if (value := getattr(self, name)) != neutral:
                    raise UsageError(
                        f"{name}={value} does nothing at temperature 0, where the likeliest token "
                        f"is taken. Give a temperature, or drop {name}."
                    )

    def _check_numbers(self) -> None:
        for name, low, high, open_low in (
            ("temperature", 0.0, math.inf, False),
            ("top_p", 0.0, 1.0, True),
            ("min_p", 0.0, 1.0, False),
            ("typical_p", 0.0, 1.0, True),
            ("repetition_penalty", 0.0, math.inf, True),
            ("presence_penalty", -2.0, 2.0, False),
            ("frequency_penalty", -2.0, 2.0, False),
        ):
            value = _number(name, getattr(self, name))
            if not low <= value <= high or value == math.inf or (open_low and value == low):
                bounds = (
                    f"{'more than 0' if open_low else '0 or more'}"
                    if high == math.inf
                    else f"in {'(' if open_low else '['}{low:g}, {high:g}]"
                )
                raise UsageError(f"{name} must be {bounds}, got {value}.")
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name} must be a whole number ≥ 0 (0: off), got {value!r}.")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise UsageError(f"seed must be a whole number, got {self.seed!r}.")

    def _check_tokens(self) -> None:
        for words in self.bad_words_ids:
            if isinstance(words, (str, int)) or not words:
                raise UsageError(
                    f"bad_words_ids must be lists of at least one token id each, got {words!r}."
                )
        banned = {*self.suppress_tokens, *(w[0] for w in self.bad_words_ids if len(w) == 1)}
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if (token := getattr(self, name)) is not None and token in banned:
                raise UsageError(
                    f"{name} {token} is also suppressed or a bad word, which leaves no token to "
                    f"pick. Drop one of them."
                )
        for rule in self.processors:
            if not callable(rule):
                raise UsageError(
                    f"a processor is called with (ids, scores); {type(rule).__name__} cannot be."
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature == 0.0

    def seeded(self) -> Sampling:
        """Returns the same with a seed: its own, or one drawn from the operating system."""
        if self.seed is not None or self.greedy:
            return self
        return replace(self, seed=secrets.randbits(32))

    def stream(self, index: int) -> Sampling:
        """Returns the settings of sample ``index``, with noise of its own; sample 0's are these."""
        if index == 0 or self.seed is None:
            return self
        return replace(self, seed=stream_seed(self.seed, index))

    def picker(
        self,
        prompt_length: int = 0,
        *,
        vocab_size: int = 0,
        eos: Collection[int] = (),
        min_new_tokens: int = 0,
        max_new_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Picker:
        """Returns the picker of one text.

        Args:
            prompt_length: tokens before the first one picked.
            vocab_size: V of the target's logits.
            eos: ids that end the text.
            min_new_tokens: no id of ``eos`` is picked before this many tokens.
            max_new_tokens: where ``forced_eos_token_id`` acts.
            device: where the logits will be.

        Raises:
            UsageError: a token id is not in the vocabulary.
        """
        from hispec.picker import Picker  # torch: what only checks settings does without
        from hispec.processors import build

        lengths = min_new_tokens, max_new_tokens
        rules = build(self, prompt_length, vocab_size, tuple(eos), *lengths, device)
        seed = None if self.greedy else self.seed or 0
        return Picker(seed, self.temperature or 1.0, rules, vocab_size)

    def pick(self, logits: Tensor, first_position: int, ids: Tensor | None = None) -> list[int]:
        """Returns the picks after consecutive positions, by temperature and seed alone."""
        from hispec.picker import Picker

        picker = Picker(None if self.greedy else self.seed or 0, self.temperature or 1.0)
        rows = range(first_position, first_position + logits.shape[0])
        return list(picker.picks(logits, rows, lambda _: [], ids))

    def changed(self) -> dict[str, Any]:
        """Returns the settings that differ from greedy decoding, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def stream_seed(seed: int, index: int) -> int:
    """Returns the seed of the ``index``-th stream of a seed; stream 0 is the seed itself.

    One step of SplitMix64 over both (Steele, Lea and Flood, OOPSLA 2014), so that the streams of
    neighbouring seeds do not meet.
    """
    if index == 0:
        return seed
    return _splitmix(_splitmix(seed & _MASK64) ^ (index * 0x9E3779B97F4A7C15 & _MASK64))


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name} must be a number, got {value!r}.")
    return float(value)
