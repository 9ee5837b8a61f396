"""What one would use otherwise: transformers' ``generate`` and llama.cpp, measured as they come.

Prefill ends with the first tokens that ``generate`` hands to its streamer. Assisted generation
hands out several at once, after a first draft; ``Outcome.first`` says how many, so that a decoded
token counts the same in every arm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hispec.bench.markdown import quantization
from hispec.bench.methods import Clock, Outcome, Question, device_clock
from hispec.bench.recorder import layer_bytes
from hispec.errors import HispecError
from hispec.generation import LM


class HFModel:
    """transformers' model of the same weights and dtype; loaded when first used.

    Args:
        lm: ours.
        clock: times the methods.
    """

    def __init__(self, lm: LM, clock: Clock | None = None) -> None:
        self.lm = lm
        self.clock = clock or device_clock(lm.model.device)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The ``LlamaForCausalLM``."""
        if self._model is None:
            from transformers import AutoModelForCausalLM, logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.lm.checkpoint.path, dtype=self.lm.model.dtype
            )
            self._model = model.to(self.lm.model.device).eval()
        return self._model


class _Arrivals:
    """A streamer that notes when tokens come; the first ``put`` is the prompt."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.prompt_seen = False
        self.sizes: list[int] = []
        self.first_at = 0.0

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if not self.sizes:
            self.first_at = self._clock()
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is buffered."""


class HF:
    """``generate`` of transformers with given options.

    Args:
        hf: the shared model.
        name: its row.
        options: for ``GenerationConfig``, such as ``prompt_lookup_num_tokens``.
        assistant: options that assisted generation reads from ``model.generation_config`` alone:
            ``generate(num_assistant_tokens=…)`` is ignored there, and 20 used instead.
        note: for the reader of the row.
        compiled: transformers compiles the pass, a token each. That is taken as read: what counts
            passes would be compiled into it, anew for every count.
    """

    counts_ids = True

    def __init__(
        self,
        hf: HFModel,
        name: str,
        options: dict[str, Any] | None = None,
        assistant: dict[str, Any] | None = None,
        note: str = "",
        *,
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.note = note
        self._hf = hf
        self._compiled = compiled
        self._options = options or {}
        self._assistant = assistant or {}
        self.settings = {"transformers": {**self._options, **self._assistant}}

    def __call__(self, question: Question) -> Outcome:
        """See :class:`hispec.bench.methods.Method`."""
        from transformers import GenerationConfig

        hf, lm = self._hf, self._hf.lm
        model, clock = hf.model, hf.clock
        ends: dict[str, Any] = {"pad_token_id": 0}
        if lm.eos:
            ends = {"eos_token_id": sorted(lm.eos), "pad_token_id": min(lm.eos)}
        config = GenerationConfig(
            do_sample=False, max_new_tokens=question.limit, **ends, **self._options
        )
        ids = torch.tensor([list(question.ids)], device=lm.model.device)
        arrivals = _Arrivals(clock)
        base = GenerationConfig(**ends, **self._assistant)
        uncounted: list[tuple[int, int]] = []
        counted = nullcontext(uncounted) if self._compiled else counted_forwards(model)
        with restored(model, base), counted as forwards, torch.inference_mode():
            started = clock()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=arrivals,
            )
            ended = clock()
        tokens = output[0, ids.shape[1] :].tolist()
        first = arrivals.sizes[0]
        if self._compiled:
            depth = lm.model.config.num_layers
            forwards = [(ids.shape[1], depth), *[(1, depth)] * (len(tokens) - first)]
        return self._outcome(
            tokens, first, arrivals.first_at - started, ended - arrivals.first_at, forwards
        )

    def _outcome(
        self,
        tokens: list[int],
        first: int,
        prefill_s: float,
        decode_s: float,
        forwards: list[tuple[int, int]],
    ) -> Outcome:
        """Counts from the forward passes, (width, layers) each: the first full one is prefill's."""
        config = self._hf.lm.model.config
        depth, itemsize = config.num_layers, self._hf.lm.model.dtype.itemsize
        full = [index for index, (_, layers) in enumerate(forwards) if layers == depth]
        decoding = forwards[full[0] + 1 :]
        widths = [width for width, layers in decoding if layers == depth]
        per_layer = layer_bytes(config, itemsize)
        per_head = config.vocab_size * config.hidden_size * itemsize
        drafted = sum(widths) - len(widths)
        # Every full pass emits one token of its own; the others it had been handed.
        accepted = max(len(tokens) - first - len(widths), 0)
        return Outcome(
            tokens,
            first,
            prefill_s,
            decode_s,
            passes=len(widths),
            committed=len(tokens) - first,
            layer_visits=sum(width * layers for width, layers in decoding),
            bytes_read=sum(layers * per_layer + per_head for _, layers in decoding),
            levels=[{"name": "draft", "drafted": drafted, "accepted": accepted}] if drafted else [],
        )


@contextmanager
def restored(model: Any, config: Any) -> Iterator[None]:
    """Inside, ``model.generation_config`` is ``config``; afterwards the model is as it was.

    An exception within ``assistant_early_exit`` leaves ``num_hidden_layers`` at the exit: every
    later call would silently run a truncated model.
    """
    before, layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
        model.config.num_hidden_layers = layers


@contextmanager
def counted_forwards(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Yields a list that grows by (new tokens, layers run) with every forward pass inside."""
    forwards: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        width = ids.shape[1] if ids is not None else kwargs["inputs_embeds"].shape[1]
        forwards.append((width, module.config.num_hidden_layers))

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield forwards
    finally:
        handle.remove()


class LlamaCpp:
    """llama-cpp-python on the GGUF file: its quantized weights, so only its speed compares.

    Args:
        gguf: the file.
        eos: ids that end an answer.
        context: tokens to make room for.
        lookup: draft by prompt lookup.
    """

    counts_ids = False

    def __init__(
        self, gguf: Path, eos: frozenset[int], context: int, *, lookup: bool = False
    ) -> None:
        self.name = "llama-cpp-lookup" if lookup else "llama-cpp"
        self.note = (
            f"llama-cpp-python on {quantization(gguf.name)}, not on the weights of the other rows: "
            f"speed only, ids not compared"
        )
        self.settings = {"gguf": str(gguf), "lookup": lookup}
        self._gguf, self._eos, self._context, self._lookup = gguf, eos, context, lookup
        self._model: Any = None

    def __call__(self, question: Question) -> Outcome:
        """See :class:`hispec.bench.methods.Method`."""
        if self._model is None:
            self._model = self._load()
        self._model.reset()
        tokens: list[int] = []
        started = time.perf_counter()
        first_at = ended = started
        for token in self._model.generate(list(question.ids), temp=0.0, reset=True):
            ended = time.perf_counter()
            if not tokens:
                first_at = ended
            tokens.append(int(token))
            if token in self._eos or len(tokens) == question.limit:
                break
        return Outcome(tokens, 1, first_at - started, ended - first_at)

    def _load(self) -> Any:
        try:
            import llama_cpp
        except ImportError:
            raise HispecError(
                f"{self.name} needs the package llama-cpp-python: pip install llama-cpp-python."
            ) from None
        draft = None
        if self._lookup:
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

            draft = LlamaPromptLookupDecoding(num_pred_tokens=10)
        threads = torch.get_num_threads()
        return llama_cpp.Llama(
            str(self._gguf),
            n_ctx=self._context,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=draft,
            logits_all=self._lookup,
            verbose=False,
        )
