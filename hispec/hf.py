"""Inside transformers: ``model.generate(**inputs, custom_generate=hispec.generate_with())``.

transformers prepares everything as ever (processors, criteria, the generation config) and hands it
to the callable, which decodes with the model's own weights and returns what ``generate`` would.
:func:`generate` is the same as one call; it also takes what a callable never sees (``stop_strings``
with its ``tokenizer``), and is what an exported ``custom_generate`` folder runs.

    do_sample=False    the ids of transformers' generate, rounding ties apart
    do_sample=True     a sample whose noise is fixed by ``seed``, in another order than torch's
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hispec.arguments import refuse_modes
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hf_models import loaded_lm
from hispec.hierarchy import Hierarchy, Level
from hispec.picker import Picker
from hispec.processors import check_pure
from hispec.result import Result
from hispec.sampling import stream_seed
from hispec.streaming import Criterion, Ends, Stream

__all__ = ["CustomGenerate", "GenerateOutput", "generate", "generate_with"]


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output and what hispec adds.

    Attributes:
        logprobs: (B, T) log-probabilities of the new tokens under ``scores``; 0 behind an end.
            Where ``output_scores`` was asked for.
        results: one :class:`hispec.result.Result` a row, with its counts.
    """

    logprobs: Tensor | None = None
    results: tuple[Result, ...] | None = None


class CustomGenerate:
    """A callable for ``model.generate(custom_generate=…)``; see :func:`generate_with`.

    Attributes:
        results: one :class:`hispec.result.Result` for each row of the last call.
    """

    def __init__(
        self,
        hierarchy: str | Hierarchy | None,
        exits: str | Path | None,
        numerics: str,
        seed: int | None,
        share: bool,
        reuse: bool,
    ) -> None:
        if numerics not in ("exact", "fast"):
            raise UsageError(f"unknown numerics {numerics!r}. Use exact or fast.")
        self.results: tuple[Result, ...] = ()
        self._hierarchy = hierarchy
        self._exits = exits
        self._exact = numerics == "exact"
        self._seed = seed
        self._share = share
        self._reuse = reuse

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Returns what transformers' decoding loop would, given what it would be given."""
        theirs = _locals_of_generate()
        streamer = theirs.get("streamer") if streamer is None else streamer
        assistant = theirs.get("assistant_model")
        options = {**generation_config.to_dict(), **model_kwargs, "assistant_model": assistant}
        refuse_modes(options)
        mask = _mask(input_ids, model_kwargs)
        if streamer is not None and len(input_ids) > 1:
            raise UsageError(f"a streamer shows one text; here are {len(input_ids)}. Drop it.")
        lm = loaded_lm(model, exits=self._exits, exact=self._exact, share=self._share)
        hierarchy = lm.hierarchy(_hierarchy(self._hierarchy, generation_config))
        seed = None
        if generation_config.do_sample:
            seed = int(torch.randint(1 << 31, ())) if self._seed is None else self._seed
        results = []
        for index, (ids, keep) in enumerate(zip(input_ids, mask, strict=True)):
            row = _Row(
                ids=ids[keep].tolist(),
                pads=ids[~keep].tolist(),
                index=index,
                of=len(input_ids),
                seed=None if seed is None else stream_seed(seed, index),
            )
            stream = _stream(
                lm, row, hierarchy, logits_processor, stopping_criteria, generation_config,
                reuse=self._reuse,
            )  # fmt: skip
            for token in stream.tokens():
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
            results.append(stream.result)
        if streamer is not None:
            streamer.end()
        self.results = tuple(results)
        return _output(input_ids, results, generation_config)


def generate_with(
    *,
    hierarchy: str | Hierarchy | None = None,
    exits: str | Path | None = None,
    numerics: str = "exact",
    seed: int | None = None,
    share: bool = False,
    reuse: bool = False,
) -> CustomGenerate:
    """Returns a callable for ``model.generate(custom_generate=…)``.

    Args:
        hierarchy: a preset, a JSON file or a hierarchy; by default what ``assistant_early_exit`` or
            ``prompt_lookup_num_tokens`` say, else ``auto``.
        exits: a folder of trained exits. By default those beside the model (``exits/``), or those
            that come with hispec for the checkpoint it was loaded from. They only draft, so they
            are not checked against the weights.
        numerics: ``exact`` or ``fast``.
        seed: of the noise where ``do_sample``; by default drawn from torch's generator, so that
            ``torch.manual_seed`` and ``set_seed`` fix the text. Row r has stream r of it.
        share: keep to the layout the module's weights have, and share them where nothing is fused;
            less memory, and slower where the processor has a better layout.
        reuse: keep what the cache knows of the prompt's beginning from the call before, as in a
            chat.

    Raises:
        UsageError: numerics is not a name.
    """
    return CustomGenerate(hierarchy, exits, numerics, seed, share, reuse)


def generate(model: Any, *arguments: Any, **options: Any) -> Any:
    """Returns what ``model.generate`` would, decoded by hispec.

    Args:
        model: a transformers Llama, perhaps wrapped by peft.
        *arguments: as in ``model.generate``.
        **options: as in ``model.generate``, and those of :func:`generate_with`.
    """
    ours = {name: options.pop(name) for name in _OURS if name in options}
    stops, tokenizer = options.pop("stop_strings", None), options.pop("tokenizer", None)
    if stops is not None:
        if tokenizer is None:
            raise UsageError("stop_strings needs tokenizer=, to know which tokens spell them.")
        from transformers import StoppingCriteriaList, StopStringCriteria

        criteria = list(options.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(tokenizer, stops))
        options["stopping_criteria"] = StoppingCriteriaList(criteria)
    options["custom_generate"] = generate_with(**ours)
    if hasattr(model, "get_base_model") and not isinstance(model, GenerationMixin):
        return model.generate(*arguments, **options)  # peft's, with its hooks
    return GenerationMixin.generate(model, *arguments, **options)


_OURS = ("hierarchy", "exits", "numerics", "seed", "share", "reuse")


# ------------------------------------------------------------------ one row


@dataclass(frozen=True)
class _Row:
    """One row of a batch: its prompt, the padding before it, its place, and its noise."""

    ids: list[int]
    pads: list[int]
    index: int
    of: int
    seed: int | None


class _InBatch:
    """A processor of a batch, asked about one row: it sees the batch's shape, padding included."""

    def __init__(self, inner: LogitsProcessor, row: _Row) -> None:
        self.inner = inner
        self._row = row

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores (1, V) of the row with ids (1, S), its padding not included."""
        row = self._row
        pads = torch.tensor([row.pads], dtype=torch.int64, device=ids.device)
        ids = torch.cat([pads, ids], -1).repeat(row.of, 1)  # (B, S)
        return self.inner(ids, scores.repeat(row.of, 1))[row.index : row.index + 1]


def _stream(
    lm: LM,
    row: _Row,
    hierarchy: Hierarchy,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    config: Any,
    *,
    reuse: bool,
) -> Stream:
    """Returns the stream of one row."""
    rules = [_InBatch(p, row) for p in processors] if row.of > 1 or row.pads else list(processors)
    vocab_size, context = lm.model.config.vocab_size, lm.model.config.max_positions
    check_pure(rules, row.ids, vocab_size, lm.model.device)
    temperature = 1.0
    if [type(rule).__name__ for rule in processors] == ["TemperatureLogitsWarper"]:
        temperature, rules = float(processors[0].temperature), []
    length, limit = len(row.ids), config.max_length - len(row.ids) - len(row.pads)
    if length >= context:
        raise UsageError(
            f"the prompt has {length} tokens and the model's context holds {context}. "
            f"Shorten it to at most {context - 1}."
        )
    if length + limit > context:
        warnings.warn(f"the text ends with the model's context of {context} tokens", stacklevel=5)
        limit = context - length
    wants = ["scores", "logprobs"] if config.output_scores else []
    wants += ["logits"] if config.output_logits else []
    eos = config.eos_token_id
    eos = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    if row.pads:
        criteria = [_padded(criterion, row.pads) for criterion in criteria]
    return Stream(
        lm,
        row.ids,
        hierarchy,
        Ends(limit, eos=frozenset(eos), criteria=tuple(criteria)),
        Picker(row.seed, temperature, rules, vocab_size),
        wants=wants if config.return_dict_in_generate else [],
        continued=reuse,
    )


def _padded(criterion: Any, pads: list[int]) -> Criterion:
    """Returns a criterion that is shown the padding before the ids, too."""

    def ended(ids: Tensor, scores: Any) -> Any:
        return criterion(torch.cat([torch.tensor([pads]).to(ids), ids], -1), scores)

    return ended


def _output(input_ids: Tensor, results: Sequence[Result], config: Any) -> Any:
    """Returns ids (B, S + T), or transformers' output with all that was asked for."""
    longest = max(result.num_tokens for result in results)
    pad = config.pad_token_id
    if pad is None:
        pad = 0
    new = [[*x.token_ids, *[pad] * (longest - x.num_tokens)] for x in results]
    ids = torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], -1)
    if not config.return_dict_in_generate:
        return ids

    def steps(rows: Sequence[list[Tensor]]) -> tuple[Tensor, ...]:
        blank = torch.zeros_like(rows[0][0])
        return tuple(
            torch.stack([row[t] if t < len(row) else blank for row in rows]) for t in range(longest)
        )

    logprobs = None
    if config.output_scores:
        rows = [[*x.logprobs, *[0.0] * (longest - x.num_tokens)] for x in results]
        logprobs = torch.tensor(rows, device=ids.device)
    filled: Any = GenerateOutput  # transformers types its tuples as having one entry
    return filled(
        sequences=ids,
        scores=steps([x.scores for x in results]) if config.output_scores else None,
        logits=steps([x.logits for x in results]) if config.output_logits else None,
        logprobs=logprobs,
        results=tuple(results),
    )


# ------------------------------------------------------------------ what generate() was told


def _hierarchy(given: str | Hierarchy | None, config: Any) -> str | Hierarchy:
    """Returns the hierarchy, by transformers' own arguments where none is given."""
    lookup = config.prompt_lookup_num_tokens
    early = getattr(config, "assistant_early_exit", None)
    asked = [
        f"{name}={value}"
        for name, value in (("prompt_lookup_num_tokens", lookup), ("assistant_early_exit", early))
        if value
    ]
    if given is not None:
        if asked:
            raise UsageError(f"{asked[0]} is given beside a hierarchy. Drop one of them.")
        return given
    if not asked:
        return "auto"
    window = min(int(config.num_assistant_tokens or 4), 16)
    levels = (Level(int(early), window),) if early else ()
    sources = (("context", int(lookup)),) if lookup else ()
    nodes = min(int(lookup), 31 - (window if early else 0)) if lookup else 0
    return Hierarchy(levels, " ".join(asked), sources, nodes)


def _mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Returns which tokens (B, S) are no padding; it must stand on the left.

    Raises:
        UsageError: something was passed that our own passes would not see.
    """
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UsageError(
            "past_key_values holds a text already, and hispec keeps a cache of its own. Pass the "
            "whole text, with generate_with(reuse=True) to keep what is known of it."
        )
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    keep = mask.bool()
    if keep.shape != input_ids.shape or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise UsageError("attention_mask must be 0 on padding at the left and 1 elsewhere.")
    if not keep[:, -1].all():
        raise UsageError("a row of input_ids is padding alone.")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        wanted = (keep.long().cumsum(-1) - 1).clamp(min=0)
        if not torch.equal((positions * keep).to(wanted), wanted * keep):
            raise UsageError("position_ids other than those of the attention mask are not built.")
    return keep


def _locals_of_generate() -> dict[str, Any]:
    """Returns the local variables of the ``model.generate`` that called us.

    transformers 5.17 to 5.23 put the prompt into a streamer but do not pass it on to a callable,
    nor an assistant model, which would be ignored in silence. They are only there.
    """
    code = getattr(GenerationMixin.generate, "__wrapped__", GenerationMixin.generate).__code__
    frame = sys._getframe(2)
    return frame.f_locals if frame.f_code is code else {}
