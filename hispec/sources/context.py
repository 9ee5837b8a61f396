"""The context database: what followed the last time the text looked like this.

The text, prompt and output alike, is kept as a suffix automaton (Blumer et al. 1985): the smallest
automaton whose paths are the substrings of the text, grown token by token in amortised constant
time. It answers exactly what prompt lookup asks, without a limit on the length: the longest suffix
of the text that has occurred before. A state stands for substrings that end at the same places, its
transitions are the tokens that ever followed them, and its link is the longest suffix that ends at
more places. So the answer to "what else followed here" is the state's other transitions, then those
of its links.

Every state remembers where it ended last and keeps its transitions in order of recency: a new token
refreshes the states along the links. That walk is capped, as a text of one repeated token would
make it as long as the text; what is missed are the shortest matches of such texts.

A continuation is read off the text from the match on. Where it runs into the end of the text it
goes on with what was drafted behind the text, then with itself: ``a b a b a`` continues ``b a b``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.sources.source import GRADES, Candidate, cut

REFRESHED = 64  # links walked per committed token; prose needs about 5
STARTS = 6  # differing continuations looked at
SIBLINGS = 4  # of these, after one suffix

# Grades: how long a match is, times how it came about.
_LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16)  # lower bounds of the classes
_CLASS = [0] + [sum(n >= low for low in _LENGTHS) - 1 for n in range(1, _LENGTHS[-1] + 1)]
_ONLY, _NEWEST, _OLDER, _SHORTER, _FOLLOWS, _FOLLOWS_OTHER = range(6)
# How often each kind stood on held-out answers of SmolLM2-135M (scripts/replay_sources.py).
_PRIORS = {
    _ONLY: (0.42, 0.65, 0.69, 0.71, 0.73, 0.82, 0.89, 0.97),
    _NEWEST: (0.21, 0.30, 0.30, 0.33, 0.33, 0.35, 0.40, 0.50),
    _OLDER: (0.11, 0.20, 0.22, 0.22, 0.22, 0.22, 0.25, 0.25),
    _SHORTER: (0.06, 0.12, 0.15, 0.19, 0.22, 0.22, 0.22, 0.22),
    _FOLLOWS: (0.40, 0.56, 0.68, 0.71, 0.74, 0.83, 0.89, 0.97),
    _FOLLOWS_OTHER: (0.40, 0.54, 0.65, 0.75, 0.80, 0.85, 0.88, 0.92),
}


def _grade(kind: int, length: int) -> int:
    return kind * len(_LENGTHS) + _CLASS[min(length, _LENGTHS[-1])]


class Context:
    """Drafts from the text itself.

    Attributes:
        name: ``context``.
        priors: see :class:`hispec.sources.source.Source`.
    """

    name = "context"

    def __init__(self) -> None:
        self.priors = [0.1] * GRADES
        for kind, chances in _PRIORS.items():
            at = kind * len(_LENGTHS)
            self.priors[at : at + len(chances)] = chances
        self._clear()

    def _clear(self) -> None:
        self._text: list[int] = []
        # State 0 is the empty string; lists by state.
        self._next: list[dict[int, int]] = [{}]  # token -> state, the most recent one last
        self._link = [-1]
        self._length = [0]  # of the longest substring
        self._end = [0]  # where the substrings ended last, in tokens from the start
        self._tip = 0  # the whole text

    def begin(self, tokens: Sequence[int]) -> None:
        """See :class:`Source`. Where the text before goes on (a chat), only the rest is added."""
        known = len(self._text)
        if known > len(tokens) or list(tokens[:known]) != self._text:
            self._clear()
        self.commit(tokens[len(self._text) :])

    def commit(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the text, each in amortised constant time."""
        for token in tokens:
            self._append(int(token))

    def _append(self, token: int) -> None:
        following, link, length, end = self._next, self._link, self._length, self._end
        self._text.append(token)
        now = len(self._text)
        new = len(following)
        following.append({})
        length.append(now)
        end.append(now)
        link.append(0)
        # Suffixes of the text before that were never followed by this token.
        state, self._tip = self._tip, new
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state < 0:
            return
        known = following[state][token]
        if length[state] + 1 < length[known]:
            # `known` also stands for longer substrings, which do not end here: split it.
            clone = len(following)
            following.append(following[known].copy())
            length.append(length[state] + 1)
            end.append(now)
            link.append(link[known])
            link[known] = clone
            above = state
            while above >= 0 and following[above].get(token) == known:
                following[above][token] = clone
                above = link[above]
            known = clone
        link[new] = known
        for _ in range(REFRESHED):
            transitions = following[state]
            known = transitions.pop(token)
            transitions[token] = known
            end[known] = now
            state = link[state]
            if state < 0:
                return

    def match(self, path: Sequence[int] = ()) -> tuple[int, int]:
        """Returns the longest suffix of text and path that occurred before, as (state, length).

        Where there is no path, "before" means that it ended before the text does; a suffix that
        reaches into the path may end with the text.
        """
        following, link = self._next, self._link
        state = max(link[self._tip], 0)
        length = self._length[state]
        for token in path:
            while state and token not in following[state]:
                state = link[state]
                length = self._length[state]
            if token in following[state]:
                state = following[state][token]
                length += 1
        return state, length

    def propose(self, path: Sequence[int], budget: int) -> list[Candidate]:
        """See :class:`Source`: the latest continuation of the longest match first."""
        if budget <= 0:
            return []
        now = len(self._text)
        state, longest = self.match(path)
        length = longest
        seen: set[int] = set()
        candidates: list[Candidate] = []
        while state > 0 and len(candidates) < STARTS:
            starts = []
            if path and self._end[state] == now:
                starts.append(now)
            transitions = self._next[state]
            for token in reversed(transitions):
                if len(starts) == SIBLINGS:
                    break
                starts.append(self._end[transitions[token]] - 1)
            lone = len(starts) == 1
            for rank, start in enumerate(starts):
                token = path[0] if start == now else self._text[start]
                if token in seen:
                    continue
                seen.add(token)
                if length == longest:
                    kind = (_ONLY if lone else _NEWEST) if rank == 0 else _OLDER
                else:
                    kind = _SHORTER
                candidates.append(self._continuation(start, path, kind, length, budget))
            state = self._link[state]
            length = self._length[state]
        return cut(candidates, self.priors, budget)

    def _continuation(
        self, start: int, path: Sequence[int], kind: int, length: int, count: int
    ) -> Candidate:
        """``count`` tokens from ``start`` on, wrapping at the end of what there is."""
        tokens = self._text[start : start + count]
        if len(tokens) < count:
            tokens.extend(path)
            at = 0
            while len(tokens) < count:
                tokens.append(tokens[at])
                at += 1
            del tokens[count:]
        follows = _FOLLOWS if kind in (_ONLY, _NEWEST) else _FOLLOWS_OTHER
        grades = [_grade(kind, length)]
        grades.extend(_grade(follows, length + i) for i in range(1, count))
        return Candidate(tokens, grades)

    def observe(
        self, tokens: Sequence[int], top: np.ndarray, before: Sequence[int] | None = None
    ) -> None:
        """Logits tell the context nothing."""

    def end(self) -> None:
        """The text stays, as the next one may go on from it."""

    def reset(self) -> None:
        """Forgets the text."""
        self._clear()
