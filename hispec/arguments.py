"""Keyword arguments of a generation: which there are, which are refused, what they add up to."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hispec.errors import UsageError
from hispec.sampling import Sampling

#: transformers' modes that are not built: the argument → (values that ask for nothing, why not).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search keeps several texts; here one is decoded"),
    "num_beam_groups": ((None, 1), "beam search keeps several texts; here one is decoded"),
    "diversity_penalty": ((None, 0.0), "it belongs to beam search"),
    "length_penalty": ((None, 1.0), "it belongs to beam search"),
    "early_stopping": ((None, False), "it belongs to beam search"),
    "constraints": ((None,), "constrained beam search is not built"),
    "force_words_ids": ((None,), "constrained beam search is not built"),
    "penalty_alpha": ((None, 0.0), "contrastive search is not built"),
    "dola_layers": ((None,), "DoLa decoding is not built"),
    "guidance_scale": ((None, 1.0, 1), "classifier-free guidance runs the model twice a token"),
    "assistant_model": (
        (None,),
        "a separate model that drafts is a level of the hierarchy, such as "
        '{"levels": [{"model": "FOLDER", "window": 4}]}',
    ),
    "output_attentions": ((None, False), "attention weights are never materialised"),
    "output_hidden_states": ((None, False), "the states of layers between exits are not kept"),
    "encoder_repetition_penalty": ((None, 1.0), "a Llama has no encoder"),
    "encoder_no_repeat_ngram_size": ((None, 0), "a Llama has no encoder"),
    "inputs_embeds": ((None,), "drafting needs token ids"),
}

_OTHER_NAMES = {
    "stop_strings": "stop",
    "logits_processor": "processors",
    "max_tokens": "max_new_tokens",
    "num_return_sequences": "LM.samples(prompt, n)",
    "n": "LM.samples(prompt, n)",
    "random_seed": "seed",
}


def refuse_modes(options: Mapping[str, Any]) -> None:
    """Raises ``UsageError`` if an argument asks for a way of decoding that is not built."""
    for name, (neutral, why) in REFUSED.items():
        value = options.get(name)
        if name in options and not any(value is x or value == x for x in neutral):
            shown = type(value).__name__ if hasattr(value, "parameters") else repr(value)
            raise UsageError(f"{name}={shown} is not supported: {why}. Drop it.")


def sampling_of(
    options: Mapping[str, Any], sampling: Sampling | None = None, known: Collection[str] = ()
) -> Sampling:
    """Returns the sampling that keyword arguments add up to.

    Args:
        options: the fields of :class:`Sampling`, and ``do_sample``.
        sampling: a ready one; then no field may be given beside it.
        known: other arguments there are, for suggestions.

    Raises:
        UsageError: an unknown argument, one that is refused, or several that contradict each other.
    """
    refuse_modes(options)
    names = {field.name for field in fields(Sampling)}
    given = {name: value for name, value in options.items() if name not in REFUSED}
    do_sample = given.pop("do_sample", None)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, [*names, *known, "do_sample"], 1)
            meant = _OTHER_NAMES.get(name) or (near[0] if near else "")
            raise UsageError(
                f"unknown argument {name!r}." + (f" Did you mean {meant}?" if meant else "")
            )
    if sampling is not None:
        if given or do_sample is not None:
            name = next(iter(given), "do_sample")
            raise UsageError(f"{name} is given beside sampling. Put it into the Sampling.")
        return sampling
    temperature = given.get("temperature")
    if do_sample and temperature is None:
        given["temperature"] = 1.0
    if do_sample and temperature == 0:
        raise UsageError("do_sample=True contradicts temperature=0. Drop one of them.")
    if do_sample is False and temperature:
        raise UsageError(
            f"do_sample=False contradicts temperature={temperature}. Drop one of them."
        )
    return Sampling(**given)


def check_lengths(min_new_tokens: int, max_new_tokens: int, stops: Sequence[str]) -> None:
    """Raises ``UsageError`` if a text's limits mean nothing or contradict each other."""
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("min_new_tokens", min_new_tokens, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} must be at least {least}, got {value!r}.")
    if min_new_tokens > max_new_tokens:
        raise UsageError(
            f"min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens}. "
            f"Lower one or raise the other."
        )
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"a stop string is a text with something in it, got {stop!r}.")
