"""The pick: which token a level would emit after a position.

    pick(logits, position) = argmax( rules(ids, logits) + gumbel(seed, position, token) )

``rules`` are transformers' processors and warpers in its order (temperature is one); greedy has no
noise, plain sampling no rules but the temperature. The noise depends on nothing but seed, position
and token, so plain decoding, every exit and the target add the same, and a seed fixes the text
whatever the hierarchy. Ties go to the lowest id.

What the target picks is computed when it is read, one row at a time: a walk down a draft tree reads
only the nodes it reaches, and a row's floats take one path whatever its company. What exits pick
decides only how fast the text comes; they rank many rows at once and take cheap forms of what
would sort the vocabulary (see :meth:`Picker.ranked`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hispec.errors import HispecError
from hispec.model.device import upload
from hispec.model.passes import Asked
from hispec.processors import Draft, Processor
from hispec_kernels import log_sum_exp, noisy, top_k

#: All ids before the token that row i picks: prompt, committed and drafted.
Prefix = Callable[[int], list[int]]


class Trace(NamedTuple):
    """What a pick was made from, both (V,) fp32: the model's logits, and the scores after rules."""

    logits: Tensor
    scores: Tensor


class Picker:
    """Picks the tokens of one text; the same answer whoever asks and as often as asked.

    Args:
        seed: of the noise; None is greedy.
        temperature: divides the logits where it is the only rule.
        rules: processors and warpers, pure functions of (ids, scores), in order; the temperature is
            among them where there are others.
        vocab_size: V; only needed for rules on reduced vocabularies.

    Attributes:
        greedy: no noise and no rules: a row's largest logit is the pick.
        traces: position → what the last pick there was made from; None (the default) keeps none.
    """

    def __init__(
        self,
        seed: int | None = None,
        temperature: float = 1.0,
        rules: Sequence[Processor] = (),
        vocab_size: int = 0,
    ) -> None:
        self.seed = seed
        self.temperature = temperature
        self.rules = list(rules)
        self.vocab_size = vocab_size
        self.greedy = seed is None and not self.rules
        self.traces: dict[int, Trace] | None = None
        self._draft = Draft(self.rules)

    def picks(
        self,
        logits: Tensor,
        positions: Sequence[int],
        prefix: Prefix,
        ids: Tensor | None = None,
    ) -> Sequence[int]:
        """Returns the pick of every row; all but greedy ones are computed when they are read.

        Args:
            logits: (T, V) or, over a reduced vocabulary, (T, V_r).
            positions: T absolute positions: where the token that a row picks will stand.
            prefix: the ids before it.
            ids: (V_r,) full-vocabulary ids of the columns; None where the columns are the ids.
        """
        if self.greedy and self.traces is None:
            return _argmax(logits, ids)
        if logits.is_cuda and not self.rules and self.traces is None:
            return self._sampled(logits, positions, ids)
        return _Lazy(len(positions), lambda i: self._pick(logits[i], positions[i], prefix, i, ids))

    def _sampled(
        self, logits: Tensor, positions: Sequence[int], ids: Tensor | None
    ) -> Sequence[int]:
        """Returns the picks of all rows where noise is all there is, for one look from the host."""
        at = upload(np.array(positions, np.int64), logits.device)[:, None]
        assert self.seed is not None, "without noise and rules it is greedy"
        return _argmax(noisy(logits.float(), self.temperature, self.seed, at, ids), ids)

    def _pick(
        self, logits: Tensor, position: int, prefix: Prefix, i: int, ids: Tensor | None
    ) -> int:
        """Returns the pick of one row, logits (V,) or (V_r,)."""
        scores, columns = logits.float(), ids
        if self.rules:
            scores = self._ruled(self.rules, scores, prefix(i), ids)  # (V,)
            columns = None
        temperature = 1.0 if self.rules or self.seed is None else self.temperature
        if self.traces is not None and ids is None:
            self.traces[position] = Trace(logits.float().clone(), scores / temperature)
        if self.seed is not None:
            at = upload(np.array([position]), scores.device)
            scores = noisy(scores, temperature, self.seed, at, columns)
        value, best = (found[0, 0] for found in top_k(scores[None], 1))
        token = best if columns is None else columns[best]
        if self.rules:
            token = token.where(value > -torch.inf, -1)
        picked = int(token)  # sync: the host walks
        if picked < 0:
            raise HispecError(
                f"the processors leave no token to pick at position {position}: every score is "
                f"-inf or not a number. Loosen bad_words_ids, suppress_tokens or processors."
            )
        return picked

    def ranked(
        self,
        logits: Tensor,
        positions: Sequence[int],
        prefix: Prefix,
        ids: Tensor | None,
        k: int,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Returns each row's k best ids under the noise, and their probabilities without it.

        For levels that draft. Processors act as they do on the target; warpers, where the
        vocabulary is large, only on a row's best ids (sorting all of 49,152 takes 5 ms), and those
        that are no simple threshold not at all. Ids that they rule out stand behind the others.

        Args:
            logits: (T, V) or (T, V_r).
            positions: as in :meth:`picks`.
            prefix: as in :meth:`picks`.
            ids: as in :meth:`picks`.
            k: how many; fewer come back where the vocabulary is smaller.

        Returns:
            T lists of ids, best first, and T lists of their probabilities.
        """
        scores = logits.float()
        if self._draft.processors:
            rows = [
                self._ruled(self._draft.processors, row, prefix(i), ids)
                for i, row in enumerate(scores)
            ]
            scores, ids = torch.stack(rows), None  # (T, V)
        temperature = self._draft.temperature if self.rules else self.temperature
        whole = log_sum_exp(scores, temperature)  # (T, 1)
        size = scores.shape[-1]
        if self.seed is None:
            best, columns = top_k(scores, min(k, size))  # (T, k)
        elif not self._draft.filters:
            at = upload(np.array(positions, np.int64), scores.device)[:, None]  # (T, 1)
            sums = noisy(scores, temperature, self.seed, at, ids)  # (T, V)
            columns = top_k(sums, min(k, size))[1]
            best = scores.gather(-1, columns)
        else:
            best, columns = top_k(scores, min(Draft.width(size), size))  # (T, width)
            at = upload(np.array(positions, np.int64), scores.device)[:, None]  # (T, 1)
            kept = self._draft.filtered(best / temperature - whole)
            tokens = columns if ids is None else ids[columns]
            chosen = top_k(noisy(kept, 1.0, self.seed, at, tokens), min(k, kept.shape[-1]))[1]
            best, columns = best.gather(-1, chosen), columns.gather(-1, chosen)
        tokens = columns if ids is None else ids[columns]
        odds = (best / temperature - whole).exp()
        return tokens.tolist(), odds.tolist()  # sync: the tree grows on the host

    def asked(self, k: int, positions: Sequence[int], *, exact: bool = False) -> Asked | None:
        """Returns what to ask of a head whose logits need not be seen; None where they must be.

        Processors look at logits, and warpers at more of them than ``k``.

        Args:
            k: how many ids.
            positions: as in :meth:`picks`.
            exact: the ids are for the target: likeliest first, the pick the first of them.
        """
        if exact:
            alone = self.greedy and self.traces is None
            return Asked(k, 1.0, None, positions, odds=False) if alone else None
        if self._draft.processors or self._draft.filters:
            return None
        temperature = self._draft.temperature if self.rules else self.temperature
        return Asked(k, temperature, self.seed, positions)

    def drafted(
        self, logits: Tensor, positions: Sequence[int], prefix: Prefix, ids: Tensor | None = None
    ) -> Sequence[int]:
        """Returns the picks of a level that drafts: those of :meth:`ranked`, or greedy ones."""
        if self.greedy:
            return _argmax(logits, ids)
        return [best[0] for best in self.ranked(logits, positions, prefix, ids, 1)[0]]

    def _ruled(
        self, rules: Sequence[Processor], scores: Tensor, prefix: list[int], ids: Tensor | None
    ) -> Tensor:
        """Returns the scores (V,) after ``rules``, which see the whole vocabulary."""
        if ids is None:
            row = scores[None].clone()  # a rule may write to what it gets
        else:
            row = scores.new_full((1, self.vocab_size), -torch.inf)
            row[0, ids] = scores
        before = torch.tensor([prefix], device=scores.device)  # (1, S)
        for rule in rules:
            row = rule(before, row)
        return row[0]


def _argmax(logits: Tensor, ids: Tensor | None) -> list[int]:
    columns = top_k(logits, 1)[1][:, 0]  # (T,), the lowest of equal columns
    return (columns if ids is None else ids[columns]).tolist()  # sync: the host walks


class _Lazy(Sequence[int]):
    """Items computed when they are first read."""

    def __init__(self, length: int, compute: Callable[[int], int]) -> None:
        self._items: list[int | None] = [None] * length
        self._compute = compute

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # no slices: none are read
        item = self._items[index]
        if item is None:
            item = self._items[index] = self._compute(index % len(self._items))
        return item
