"""Generating text: a prompt in, a stream of text and a result with its counts out.

``LM.stream`` is the one path through a loaded model, and ``LM.generate`` its fold.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hispec.arguments import check_lengths, sampling_of
from hispec.drafter import Drafter
from hispec.errors import UsageError
from hispec.hierarchy import Hierarchy, preset
from hispec.model.cache import Cache
from hispec.model.checkpoint import Checkpoint
from hispec.model.exits import ExitHead, Exits, SharedHead
from hispec.model.level import Exit, Level, Separate
from hispec.model.llama import Llama
from hispec.planner.plan import open_plan, saved_plan
from hispec.processors import check_pure
from hispec.prompt import Prompt, encode
from hispec.result import Result
from hispec.sampling import Sampling
from hispec.shelf import Shelf
from hispec.streaming import Criterion, Ends, Stream, Streamer


class LM:
    """A loaded Llama with its exits, ready to generate one text at a time.

    Attributes:
        checkpoint: where it came from.
        model: the weights and the passes over them.
        exits: trained exits, or None: then every exit uses the model's own norm and head.
        below: separate models that every hierarchy given by name has below its levels.
        tokenizer: transformers' tokenizer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Llama,
        exits: Exits | None = None,
        corpus: Path | None = None,
        below: Sequence[str] = (),
        *,
        force_plan: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.exits = exits
        self.below = tuple(below)
        self.tokenizer = checkpoint.tokenizer
        self.eos = frozenset(checkpoint.eos_token_ids)
        self._cache: Cache | None = None
        self._known: list[int] = []  # the tokens whose keys and values the cache holds
        self._stream: Stream | None = None  # the generation that is writing to the cache
        self._heads: dict[int, ExitHead] = {}
        self._separate: dict[str, Separate] = {}
        self._shelf = Shelf(self, corpus)
        self._force_plan = force_plan

    def hierarchy(self, name: str | Hierarchy = "auto") -> Hierarchy:
        """Returns a hierarchy that fits this model, the separate models it names opened.

        Args:
            name: a preset or the path of a JSON file, which get the models of ``below``; or a
                hierarchy, which says itself what is in it. ``auto`` is the plan that
                ``hispec plan`` has saved for this model, exits and machine, if it has.

        Raises:
            UsageError: no such preset or file, an exit the model does not have, a plan that was
                made for something else, or a separate model of another vocabulary.
            CheckpointError: a separate model cannot be found, read or understood.
        """
        if isinstance(name, Hierarchy):
            found = name
        elif name.endswith(".json"):
            found = open_plan(Path(name), self, force=self._force_plan).over(self.below)
        elif name == "auto" and self._saved:
            found = self._saved.over(self.below)
        else:
            best = dict(self.exits.best) if self.exits else {}
            found = preset(name, self.model.config.num_layers, best).over(self.below)
        found.check(self.model.config.num_layers)
        for level in found.models:
            self.separate(level.model)
        return found

    def separate(self, model: str) -> Separate:
        """Returns a separate model, opened when it is first named; see :meth:`Separate.open`."""
        if model not in self._separate:
            self._separate[model] = Separate.open(model, self.checkpoint, self.model)
        return self._separate[model]

    def levels(self, hierarchy: Hierarchy, cache: Cache, prompt: int) -> list[Level]:
        """Returns what runs a hierarchy's levels over one text, and the target last.

        Args:
            hierarchy: one that fits this model.
            cache: with a boundary at each of its exits, and at L.
            prompt: tokens of the text's prompt.
        """
        separate = [self.separate(level.model) for level in hierarchy.models]
        for one in separate:
            one.prompt = prompt
        exits = [Exit(self.model, cache, b, self.head(b)) for b in cache.boundaries]
        return [*separate, *exits]

    @cached_property
    def _saved(self) -> Hierarchy | None:
        """The plan made for this model on this machine, looked for once."""
        return saved_plan(self, force=self._force_plan)

    def head(self, boundary: int) -> ExitHead:
        """Returns the head at an exit, or the target's at L."""
        if boundary not in self._heads:
            if self.exits and boundary in self.exits.exit_layers:
                self._heads[boundary] = self.exits.head(boundary, self.model, self.checkpoint)
            else:
                self._heads[boundary] = SharedHead(self.model, boundary)
        return self._heads[boundary]

    def drafter(
        self,
        hierarchy: Hierarchy,
        *,
        learn: bool = True,
        length: int | None = None,
        read: Mapping[str, int] | None = None,
    ) -> Drafter | None:
        """Returns what drafts for a hierarchy besides its exits' picks, None if nothing does.

        Args:
            hierarchy: names them and their budgets.
            learn: go on from what earlier texts taught them; otherwise they start afresh, and
                nothing of this text is kept.
            length: tokens of the prompt: the longer it is the dearer are rows, and an exit's first
                pass, which reads it.
            read: of these, by name, those that an exit has read already.
        """
        return self._shelf.drafter(hierarchy, learn=learn, length=length, read=read)

    def reprice(self, exits: Sequence[int], models: Sequence[str] = ()) -> None:
        """Times passes anew, those of some exits and separate models too: drafting goes by them."""
        self._shelf.reprice(exits, models)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Returns a prompt's token ids; see :func:`hispec.prompt.encode`."""
        return encode(prompt, self.tokenizer, self.model.config.vocab_size, raw=raw)

    def stream(
        self,
        prompt: Prompt,
        *,
        hierarchy: str | Hierarchy = "auto",
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stopping_criteria: Sequence[Criterion] = (),
        streamer: Streamer | None = None,
        sampling: Sampling | None = None,
        logprobs: bool = False,
        output_scores: bool = False,
        output_logits: bool = False,
        raw: bool = False,
        continued: bool = False,
        learn: bool = True,
        **settings: Any,
    ) -> Stream:
        """Returns the generation as an iterable of text pieces; nothing runs before the first.

        Args:
            prompt: see :meth:`encode`.
            hierarchy: see :meth:`hierarchy`.
            max_new_tokens: ≥ 1; fewer where the model's context ends before.
            min_new_tokens: before these the text does not end by itself; stop strings and criteria
                still end it.
            stop: strings that end the text; it is cut before them.
            stopping_criteria: transformers' criteria; each is asked once after every token.
            streamer: one of transformers' streamers: told the prompt, every token, and the end.
            sampling: greedy by default.
            logprobs: keep each emitted token's log-probability under the scores it was picked from.
            output_scores: keep those scores, (V,) a token.
            output_logits: keep the model's logits before processors and warpers.
            raw: no chat template.
            continued: keep what the cache knows of the prompt's beginning, as the next turn of a
                chat does. Otherwise a call's outcome does not depend on earlier calls.
            learn: let the databases go on from earlier texts and learn from this one; otherwise
                they start afresh and keep nothing, which makes timings comparable.
            **settings: the fields of :class:`Sampling` instead of ``sampling``, and ``do_sample``.

        Raises:
            UsageError: an argument is unknown, out of range or contradicts another, or the prompt
                does not fit into the context.
        """
        sampling = sampling_of(settings, sampling, inspect.signature(LM.stream).parameters)
        stops = (stop,) if isinstance(stop, str) and stop else tuple(stop)
        check_lengths(min_new_tokens, max_new_tokens, stops)
        ids = self.encode(prompt, raw=raw)
        context = self.model.config.max_positions
        if len(ids) >= context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the model's context holds {context}. "
                f"Shorten it to at most {context - 1}."
            )
        ends = Ends(
            min(max_new_tokens, context - len(ids)), stops, self.eos, tuple(stopping_criteria)
        )
        vocab_size = self.model.config.vocab_size
        check_pure(sampling.processors, ids, vocab_size, self.model.device)
        picker = sampling.seeded().picker(
            len(ids),
            vocab_size=vocab_size,
            eos=self.eos,
            min_new_tokens=min_new_tokens,
            max_new_tokens=ends.limit,
            device=self.model.device,
        )
        wants = {"logprobs": logprobs, "scores": output_scores, "logits": output_logits}
        return Stream(
            self,
            ids,
            self.hierarchy(hierarchy),
            ends,
            picker,
            streamer=streamer,
            wants=[name for name, wanted in wants.items() if wanted],
            continued=continued,
            learn=learn,
        )

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """Returns the finished generation; the options are those of :meth:`stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def samples(self, prompt: Prompt, n: int, **options: Any) -> list[Result]:
        """Returns ``n`` texts after one prompt, which is run once; each has noise of its own.

        The first is the text of :meth:`generate`; the others' seeds follow from its seed
        (:func:`hispec.sampling.stream_seed`) and give the same texts alone.

        Raises:
            UsageError: as :meth:`stream`; or several are wanted of the one likeliest text.
        """
        names = inspect.signature(LM.stream).parameters
        settings = {name: options.pop(name) for name in list(options) if name not in names}
        sampling = sampling_of(settings, options.pop("sampling", None), names).seeded()
        if n < 1 or (n > 1 and sampling.greedy):
            why = "they would all be the same" if n > 1 else "at least 1 is needed"
            raise UsageError(f"{n} samples at temperature {sampling.temperature}: {why}.")
        results = []
        for index in range(n):
            stream = self.stream(prompt, sampling=sampling.stream(index), **options)
            stream.again = index > 0  # the prompt is known to its last token
            for _ in stream:
                pass
            results.append(stream.result)
        return results

    def _prepare(
        self, ids: Sequence[int], hierarchy: Hierarchy, *, continued: bool, again: bool
    ) -> Cache:
        """Returns the cache, knowing at most a prefix of ``ids``.

        Its last token is only known where the same prompt is prefilled ``again``: elsewhere that
        would be the state of a pass of decoding.
        """
        boundaries = [*hierarchy.exit_layers, self.model.config.num_layers]
        if self._cache is None:
            self._cache = self.model.new_cache(boundaries)
        cache = self._cache
        shared = 0
        if (continued or again) and cache.boundaries == boundaries:
            for known, wanted in zip(self._known, ids if again else ids[:-1], strict=False):
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
        for separate in self._separate.values():
            separate.cache.truncate(length)
        del self._known[length:]


def generate(lm: LM, prompt: Prompt, **options: Any) -> Result:
    """Returns the finished generation; see :meth:`LM.stream` for the options."""
    return lm.generate(prompt, **options)


def stream(lm: LM, prompt: Prompt, **options: Any) -> Stream:
    """Returns the generation as text pieces; see :meth:`LM.stream` for the options."""
    return lm.stream(prompt, **options)
