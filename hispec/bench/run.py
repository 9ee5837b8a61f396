"""The run: every method answers every prompt, side by side, several times.

    for prompt:  for repeat:  ar, the others in turn, ar

Plain decoding comes first and last, so that a machine that slows down shows. The others start at
another place each time, so that none always follows the same. A method that raises has a row that
says so, and the run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hispec.bench.folder import Row, RunFolder
from hispec.bench.methods import Method, Outcome, Question, Workbench, numerics
from hispec.bench.progress import Progress
from hispec.bench.prompts import Prompt, PromptSet, encode
from hispec.bench.provenance import memory_in_use
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import MAX_WIDTH

#: New tokens of a warm-up answer: enough for every draft length to occur.
_WARM_UP_TOKENS = 16
#: Two logits closer than this many steps of the dtype are a tie that rounding decides.
_TIE_STEPS = 4.0


@dataclass(frozen=True)
class Plan:
    """What a run asks.

    Attributes:
        prompts: the questions.
        max_new_tokens: of every answer.
        repeats: how often each method answers each prompt.
        raw: no chat template.
    """

    prompts: PromptSet
    max_new_tokens: int = 128
    repeats: int = 3
    raw: bool = False

    def __post_init__(self) -> None:
        for name, value in (("max-new-tokens", self.max_new_tokens), ("repeats", self.repeats)):
            if value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}.")

    def settings(self, lm: LM, methods: Sequence[Method]) -> dict[str, Any]:
        """Returns what must be equal for a run to be continued."""
        prompts = repr(self.prompts.prompts).encode()
        exits = lm.exits.record.get("hierarchies") if lm.exits else None
        return {
            "model": lm.checkpoint.name,
            "weights": lm.checkpoint.fingerprint,
            "exits": str(lm.exits.path) if lm.exits else None,
            "hierarchies": exits,
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "device": lm.model.device.type,
            "threads": torch.get_num_threads(),
            "prompts": self.prompts.name,
            "number_of_prompts": len(self.prompts.prompts),
            "text_of_prompts": hashlib.sha256(prompts).hexdigest()[:16],
            "max_new_tokens": self.max_new_tokens,
            "repeats": self.repeats,
            "raw": self.raw,
            "methods": {method.name: method.settings for method in methods},
        }


class Run:
    """A run under way.

    Args:
        plan: what to ask.
        folder: where rows go; blocks it has are not run again.
        bench: the model and the prefill that our methods share.
        methods: ``ar`` first.
    """

    def __init__(
        self, plan: Plan, folder: RunFolder, bench: Workbench, methods: Sequence[Method]
    ) -> None:
        assert methods[0].name == "ar", "everything is compared with plain decoding"
        self.plan = plan
        self.folder = folder
        self.bench = bench
        self.methods = list(methods)
        self._reference: dict[str, list[int]] = {
            row["item"]: row["token_ids"]
            for row in folder.rows
            if row["method"] == "ar" and "token_ids" in row
        }

    def __call__(self) -> None:
        """Runs every block that is not done yet."""
        repeats = self.plan.repeats
        items = [
            f"{prompt.id}/{turn + 1}" if prompt.num_turns > 1 else prompt.id
            for prompt in self.plan.prompts.prompts
            for turn in range(prompt.num_turns)
        ]
        done = sum(self.folder.has_block(item, r) for item in items for r in range(repeats))
        if done < len(items) * repeats:
            self.warm_up()
        with Progress(len(items) * repeats, done) as progress:
            for number, prompt in enumerate(self.plan.prompts.prompts):
                self._converse(prompt, number, progress)

    def warm_up(self) -> None:
        """After the call every method has run once, short and long, and every width was seen."""
        lengths: dict[int, list[int]] = {}
        for prompt in self.plan.prompts.prompts:
            ids = encode(self.bench.lm, prompt, raw=self.plan.raw)
            if len(ids) < self.bench.lm.model.config.max_positions:
                lengths[len(ids)] = ids
        if not lengths:
            return
        model = self.bench.lm.model
        cache = model.new_cache([model.config.num_layers])
        for exact in (True, False):
            with torch.inference_mode(), numerics(model, exact=exact):
                for width in range(1, MAX_WIDTH + 1):
                    rows = model.embed([0] * width)
                    model.logits(model.run_layers(rows, 0, 1, 0, cache.kv))
        for length in sorted({min(lengths), max(lengths)}):
            limit = min(_WARM_UP_TOKENS, self.plan.max_new_tokens)
            question = self._question(lengths[length], limit)
            for method in self.methods:
                self._answer(method, question)

    def _converse(self, prompt: Prompt, number: int, progress: Progress) -> None:
        """Runs all turns of a prompt; a turn continues on plain decoding's answers."""
        lm, answers = self.bench.lm, list[str]()
        context = lm.model.config.max_positions
        for turn in range(prompt.num_turns):
            item = f"{prompt.id}/{turn + 1}" if prompt.num_turns > 1 else prompt.id
            ids = encode(lm, prompt, turn, answers, raw=self.plan.raw)
            if len(ids) >= context:
                reason = f"{len(ids)} tokens, and the context holds {context}"
                self.folder.skip({"item": item, "category": prompt.category, "reason": reason})
                return
            for repeat in range(self.plan.repeats):
                progress.doing(f"{prompt.category} {item}")
                if not self.folder.has_block(item, repeat):
                    self.folder.append(self._block(prompt, item, turn, ids, repeat, number))
                    progress.advance()
            if item not in self._reference:
                return  # plain decoding failed: there is nothing to continue on
            answers.append(text_of(lm.tokenizer, self._reference[item]).strip())

    def _block(
        self, prompt: Prompt, item: str, turn: int, ids: list[int], repeat: int, number: int
    ) -> list[Row]:
        """Returns the rows of one prompt and repeat: all methods, plain decoding twice."""
        ar, *others = self.methods
        shift = (number + repeat) % max(len(others), 1)
        order = [ar, *others[shift:], *others[:shift], ar]
        question = self._question(ids, self.plan.max_new_tokens)
        shared = {
            "item": item,
            "prompt": prompt.id,
            "turn": turn,
            "category": prompt.category,
            "repeat": repeat,
            "of": len(order),
            "prompt_tokens": len(ids),
        }
        rows: list[Row] = []
        outcomes: list[tuple[Row, Method, Outcome]] = []
        for place, method in enumerate(order):
            outcome, error = self._answer(method, question)
            row: Row = {**shared, "place": place, "method": method.name, "error": error}
            row["memory_bytes"] = memory_in_use(self.bench.lm.model.device)
            rows.append(row)
            if outcome:
                outcomes.append((row, method, outcome))
                if method is ar:
                    self._reference.setdefault(item, outcome.token_ids)
        for row, method, outcome in outcomes:
            row.update(self._counts(outcome, keep=repeat == 0 and row["place"] < len(order) - 1))
            row["mismatch"] = self._mismatch(method, question, item, outcome)
            if "token_ids" in row and prompt.references and turn == prompt.num_turns - 1:
                row["references"] = list(prompt.references)
        return rows

    def _question(self, ids: list[int], limit: int) -> Question:
        context = self.bench.lm.model.config.max_positions
        return Question(ids, min(limit, context - len(ids)))

    def _answer(self, method: Method, question: Question) -> tuple[Outcome | None, str | None]:
        """Returns the outcome, or what went wrong."""
        device = self.bench.lm.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            return method(question), None
        except Exception as error:  # a comparison outlives any one of the compared
            lines = str(error).strip().split("\n")
            return None, f"{type(error).__name__}: {lines[0]}"

    def _counts(self, outcome: Outcome, *, keep: bool) -> Row:
        """A row's counts; ids, text and origins only where ``keep``: repeats have the same."""
        counts = asdict(outcome)
        ids, origins = counts.pop("token_ids"), counts.pop("origins")
        counts["num_tokens"] = len(ids)
        if keep:
            tokenizer = self.bench.lm.tokenizer
            counts["token_ids"] = ids
            counts["text"] = text_of(tokenizer, ids)
            if origins:
                counts["origins"] = origins
                counts["pieces"] = pieces(tokenizer, ids)
        return counts

    def _mismatch(
        self, method: Method, question: Question, item: str, outcome: Outcome
    ) -> Row | None:
        """Where an answer leaves plain decoding's, and how close the two tokens were there."""
        wanted, found = self._reference.get(item), outcome.token_ids
        if not method.counts_ids or wanted is None or found == wanted:
            return None
        pairs = enumerate(zip(wanted, found, strict=False))
        index = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(found)))
        row: Row = {"index": index, "position": len(question.ids) + index}
        if index < min(len(wanted), len(found)):
            logits = self.bench.logits_after(question, wanted[:index]).float()
            top = logits.topk(2).values
            step = torch.finfo(self.bench.lm.model.dtype).eps * top[0].abs().item()
            row["expected"], row["found"] = wanted[index], found[index]
            row["top2_gap"] = (top[0] - top[1]).item()
            row["gap"] = (logits[wanted[index]] - logits[found[index]]).item()
            row["tie"] = row["gap"] <= _TIE_STEPS * step
        return row


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of token ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds; their concatenation is the text of all."""
    shown, held, texts = 0, 0, []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        # A part of a character appears with the token that completes it; four bytes are the most.
        if text.endswith("\ufffd") and end < len(ids) and held < 3:
            held += 1
            texts.append("")
            continue
        texts.append(text[shown:])
        shown, held = len(text), 0
    return texts
