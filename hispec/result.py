"""What a generation gives back: the text, and in counts how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from hispec.drafter import SourceCounts
from hispec.engine import LevelCounts
from hispec.hierarchy import Hierarchy


@dataclass
class Result:
    """A finished (or interrupted) generation: the text and how it came about.

    Attributes:
        finish_reason: ``eos``, ``stop`` (a string or a criterion), ``length``, or ``interrupted``.
        stop_reason: the string, the id or the name of the criterion that ended the text.
        seed: of the noise; None where there was none.
        num_prompt_tokens: of these, the last is where generation starts.
        num_cached_tokens: of the prompt's, those known from before.
        prefill_s: from the first step of the iteration, not from the call, to the first token. A
            model's first text opens databases meanwhile, and times passes that no one has timed.
        decode_s: from when a second token is asked for to the end of the last round, with what the
            consumer does between pieces meanwhile.
        passes: full passes after prefill.
        layer_visits: (token, layer) pairs run after prefill.
        committed: tokens the full passes committed; more than were emitted where a stop cut a
            round.
        logprobs: of every emitted token under the scores it was picked from, if asked for.
        scores: (V,) of every emitted token after processors and warpers, if asked for.
        logits: (V,) before them, likewise.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    stop_reason: str | int | None = None
    seed: int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes: int = 0
    layer_visits: int = 0
    committed: int = 0
    levels: list[LevelCounts] = field(default_factory=list)
    sources: list[SourceCounts] = field(default_factory=list)
    hierarchy: Hierarchy = field(default_factory=Hierarchy)
    dtype: str = ""
    device: str = ""
    numerics: str = ""
    logprobs: list[float] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list, repr=False)
    logits: list[Tensor] = field(default_factory=list, repr=False)

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

    def metrics(self) -> dict[str, Any]:
        """Returns the statistics under vLLM's names, times in seconds; a block a level and source.

        The target's block counts what all of them together handed it.
        """
        later = self.num_tokens - 1
        blocks = [
            _block(x.name, x.passes, x.drafted, x.accepted, x.accepted_at) for x in self.levels[:-1]
        ]
        blocks += [_block(x.name, None, x.proposed, x.accepted, None) for x in self.sources]
        return {
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_generation_tokens": self.num_tokens,
            "first_token_latency": self.prefill_s,
            "prefill_time": self.prefill_s,
            "decode_time": self.decode_s,
            "inference_time": self.prefill_s + self.decode_s,
            "mean_time_per_output_token": self.decode_s / later if later > 0 else 0.0,
            "num_drafts": self.passes,
            "num_accepted_tokens": self.committed - self.passes,
            "mean_acceptance_length": self.block_efficiency,
            "spec_decoding": blocks,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the document of ``hispec generate --json``."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "seed": self.seed,
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
            "sources": [asdict(source) for source in self.sources],
            "hierarchy": self.hierarchy.to_json(),
            "dtype": self.dtype,
            "device": self.device,
            "numerics": self.numerics,
            "metrics": self.metrics(),
        } | ({"logprobs": self.logprobs} if self.logprobs else {})


def _block(
    name: str, drafts: int | None, drafted: int, accepted: int, places: list[int] | None
) -> dict[str, Any]:
    block: dict[str, Any] = {"name": name, "num_draft_tokens": drafted}
    block["num_accepted_tokens"] = accepted
    if drafts is not None:
        block |= {"num_drafts": drafts, "num_accepted_tokens_per_pos": places}
    return block
