"""Rules on scores: transformers' own processors and warpers, in transformers' own order.

A rule is called with all ids before the token, (1, S), and its scores, (1, V), and returns the new
scores. It has to be a pure function: a draft may be thought over several times, or never.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hispec.errors import UsageError

if TYPE_CHECKING:
    from hispec.sampling import Sampling

Processor = Callable[[Tensor, Tensor], Tensor]

#: transformers' processors that keep something from call to call, or need more than one text.
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "ClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "SynthID's watermarking_config",
    "AlternatingCodebooksLogitsProcessor": "a processor of codebooks",
    "WhisperTimeStampLogitsProcessor": "a processor of Whisper",
    "WhisperNoSpeechDetection": "a processor of Whisper",
    "BarkEosPrioritizerLogitsProcessor": "a processor of Bark",
}


class GeneratedPenalty:
    """Lowers the scores of tokens that were generated, the prompt's not counted.

    Args:
        prompt_length: tokens of the prompt.
        presence: subtracted once from each token that occurs.
        frequency: subtracted for every time it occurs.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self.prompt_length = prompt_length
        self.presence = presence
        self.frequency = frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores (1, V), given all ids (1, S)."""
        generated, counts = ids[0, self.prompt_length :].unique(return_counts=True)
        lowered = scores.clone()
        lowered[0, generated] -= self.presence + self.frequency * counts.to(scores.dtype)
        return lowered


def build(
    sampling: Sampling,
    prompt_length: int,
    vocab_size: int,
    eos: Sequence[int] = (),
    min_new_tokens: int = 0,
    max_new_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Processor]:
    """Returns the rules of one text, in the order of transformers' ``generate``.

    Only a temperature is no rule: the picker divides by it.

    Args:
        sampling: what was asked.
        prompt_length: tokens of the prompt.
        vocab_size: V.
        eos: ids that end the text.
        min_new_tokens: these are not picked before so many tokens.
        max_new_tokens: the text's limit, where ``forced_eos_token_id`` acts.
        device: where the scores will be.

    Raises:
        UsageError: a token id is not in the vocabulary.
    """
    _check_ids(sampling, vocab_size)
    s = sampling
    rules: list[Processor] = []
    if s.repetition_penalty != 1.0:
        rules.append(_theirs("RepetitionPenalty", float(s.repetition_penalty)))
    if s.presence_penalty or s.frequency_penalty:  # ours; transformers has none
        rules.append(GeneratedPenalty(prompt_length, s.presence_penalty, s.frequency_penalty))
    if s.no_repeat_ngram_size:
        rules.append(_theirs("NoRepeatNGram", s.no_repeat_ngram_size))
    ends = torch.tensor(list(eos)) if eos else None
    if s.bad_words_ids:
        words = [list(word) for word in s.bad_words_ids]
        rules.append(_theirs("NoBadWords", words, ends))
    if min_new_tokens and ends is not None:
        there = ends.to(device)  # where it looks for them
        rules.append(_theirs("MinNewTokensLength", prompt_length, min_new_tokens, there))
    if s.forced_bos_token_id is not None:
        rules.append(_theirs("ForcedBOSToken", s.forced_bos_token_id))
    if s.forced_eos_token_id is not None and max_new_tokens is not None:
        length = prompt_length + max_new_tokens
        rules.append(_theirs("ForcedEOSToken", length, s.forced_eos_token_id))
    if s.suppress_tokens:
        rules.append(_theirs("SuppressTokens", list(s.suppress_tokens)))
    if s.begin_suppress_tokens:
        first = prompt_length + (prompt_length == 1 and s.forced_bos_token_id is not None)
        rules.append(_theirs("SuppressTokensAtBegin", list(s.begin_suppress_tokens), first))
    rules += s.processors
    if not s.greedy:
        warpers: list[Processor] = []
        if s.top_k:
            warpers.append(_theirs("TopK", s.top_k))
        if s.top_p < 1.0:
            warpers.append(_theirs("TopP", s.top_p))
        if s.min_p:
            warpers.append(_theirs("MinP", s.min_p))
        if s.typical_p < 1.0:
            warpers.append(_theirs("Typical", s.typical_p))
        if s.temperature != 1.0 and (rules or warpers):
            rules.append(_theirs("Temperature", float(s.temperature)))
        rules += warpers
    return rules


def _theirs(name: str, *arguments: Any) -> Processor:
    """Returns transformers' processor or warper of that name."""
    module = importlib.import_module("transformers.generation.logits_process")
    suffix = "LogitsWarper" if name in _WARPERS else "LogitsProcessor"
    return getattr(module, name + suffix)(*arguments)


_WARPERS = ("Temperature", "TopK", "TopP", "MinP", "Typical")


def _check_ids(sampling: Sampling, vocab_size: int) -> None:
    forced = (sampling.forced_bos_token_id, sampling.forced_eos_token_id)
    for name, tokens in (
        ("bad_words_ids", [token for word in sampling.bad_words_ids for token in word]),
        ("suppress_tokens", sampling.suppress_tokens),
        ("begin_suppress_tokens", sampling.begin_suppress_tokens),
        ("forced_bos_token_id", [token for token in forced[:1] if token is not None]),
        ("forced_eos_token_id", [token for token in forced[1:] if token is not None]),
    ):
        wrong = next(
            (x for x in tokens if isinstance(x, bool) or not isinstance(x, int)
             or not 0 <= x < vocab_size), None
        )  # fmt: skip
        if wrong is not None:
            raise UsageError(f"{name}: {wrong!r} is not in [0, {vocab_size - 1}], the vocabulary.")


# ------------------------------------------------------------------ purity


def check_pure(
    rules: Sequence[Processor],
    prompt: Sequence[int],
    vocab_size: int,
    device: torch.device | str = "cpu",
    calls: int = 64,
) -> None:
    """Raises ``UsageError`` for a processor whose answer depends on more than its arguments.

    transformers' own are known. Others are tried on a copy: two questions in turn, each of which
    has to get the same answer every time. One that changes its attributes is asked ``calls`` times,
    for it may count.

    Args:
        rules: the user's processors.
        prompt: what they are tried on.
        vocab_size: V.
        device: where ids and scores will be.
        calls: see above.
    """
    for rule in rules:
        kind = type(getattr(rule, "inner", rule))
        name = kind.__name__
        if name in _STATEFUL:
            raise _stateful(name, _STATEFUL[name])
        if not kind.__module__.startswith("transformers."):
            _try(rule, name, prompt, vocab_size, device, calls)


def _stateful(name: str, what: str) -> UsageError:
    return UsageError(
        f"{name} ({what}) keeps something from call to call. Drafts are thought over in any order "
        f"and dropped, so a processor must be a pure function of (ids, scores)."
    )


def _try(
    rule: Processor,
    name: str,
    prompt: Sequence[int],
    vocab_size: int,
    device: torch.device | str,
    calls: int,
) -> None:
    rule = copy.copy(rule)
    if hasattr(rule, "inner"):
        rule.inner = copy.copy(rule.inner)
    draw = torch.Generator().manual_seed(0)
    questions = [
        (
            torch.tensor([[*prompt, *more]], device=device),
            torch.randn((1, vocab_size), generator=draw).to(device),
        )
        for more in ([], [prompt[0], prompt[-1]])
    ]
    answers: list[Tensor] = []
    before = ""
    for call in range(calls):
        ids, scores = questions[call % 2]
        answer = rule(ids.clone(), scores.clone())
        if not isinstance(answer, Tensor) or answer.shape != scores.shape:
            found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise UsageError(f"{name} must return scores of shape (1, {vocab_size}), not {found}.")
        if call < 2:
            answers.append(answer)
        elif not torch.equal(answers[call % 2].nan_to_num(), answer.nan_to_num()):
            raise _stateful(name, "asked twice, it answered otherwise")
        now = repr(sorted(getattr(getattr(rule, "inner", rule), "__dict__", {}).items()))
        if call >= 3 and now == before:  # the first calls may set up what is kept
            return
        before = now


# ------------------------------------------------------------------ drafting


class Draft:
    """The same rules, as cheaply as drafting wants them.

    Attributes:
        processors: the rules that look at the ids; drafts obey them as they are.
        temperature: divides the scores.
        filters: whether a warper rules tokens out.
    """

    def __init__(self, rules: Sequence[Processor]) -> None:
        self.processors: list[Processor] = []
        self.temperature = 1.0
        self._top_k, self._top_p, self._min_p = 0, 1.0, 0.0
        for rule in rules:
            inner: Any = getattr(rule, "inner", rule)
            kind = type(inner).__name__
            if kind == "TemperatureLogitsWarper":
                self.temperature *= float(inner.temperature)
            elif kind == "TopKLogitsWarper":
                self._top_k = min(inner.top_k, self._top_k or inner.top_k)
            elif kind == "TopPLogitsWarper":
                self._top_p = min(float(inner.top_p), self._top_p)
            elif kind == "MinPLogitsWarper":
                self._min_p = max(float(inner.min_p), self._min_p)
            elif kind not in _COSTLY:
                self.processors.append(rule)
        self.filters = self._top_k > 0 or self._top_p < 1.0 or self._min_p > 0.0

    @staticmethod
    def width(vocab_size: int) -> int:
        """Returns how many of a row's best ids warpers look at."""
        return vocab_size if vocab_size <= 2048 else 256

    def filtered(self, odds: Tensor) -> Tensor:
        """Returns log-probabilities (T, n), best first; what the warpers rule out is far below."""
        if not self.filters:
            return odds
        p = odds.exp()
        out = p.cumsum(-1) - p >= self._top_p  # what stands before it is enough already
        out |= p < self._min_p * p[:, :1]
        if self._top_k:
            out[:, self._top_k :] = True
        out[:, 0] = False
        return odds - 1e4 * out


#: Warpers that sort the vocabulary or compute its entropy, and cost more than what a draft saves.
_COSTLY = {
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "TopHLogitsWarper",
    "LogitNormalization",
}
