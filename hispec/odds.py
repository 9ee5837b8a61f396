"""How likely a drafted token is, from all who propose it, counted while decoding.

A source grades each token it proposes (by the length of the match behind it, its rank, its count
…). For every (source, grade) the odds count how often such a token was the next one, given that the
text before it was right, starting from a prior worth a few observations:

    chance = (prior · W + stood) / (W + seen)

That is what a source's word is worth whoever else speaks. Others matter: they agree, and most of
all they contradict, as at most one of two tokens is right. So the words of all who speak about a
place are weighed as evidence is, in logits l, with weights that learn from every token:

    logit = bias + best · max l + Σ (slope · l + claims)     over those who propose the token
                                + Σ denies                   over those who propose others only

The weights to start from were fitted to SmolLM2-135M's answers to held-out prompts. Sources that
were not there are weighed as ``history`` is, exits as ``exit``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hispec.planner.online import Gains

#: What a prior counts for, in observations.
PRIOR_WEIGHT = 16.0
#: What a prior counts for beside many texts.
KNOWN = 256.0
#: How much of what a text has moved the weights stays.
CARRIED = 0.02
#: How far the weights move towards what a token shows.
RATE = 0.01

# Places in the list of weights.
_BIAS, _BEST, _SLOPE, _CLAIMS, _DENIES = range(5)
_OWN = 3  # weights of each source


class Weights(NamedTuple):
    """What a source's word weighs: its logit, that it proposes a token, that it proposes others."""

    slope: float
    claims: float
    denies: float


class Mixture(NamedTuple):
    """The weights to start from.

    Attributes:
        bias: of every token.
        best: of the highest logit among those who propose it.
        sources: each one's own, ``exit`` for every exit.
        rate: how fast all of them learn; 0 keeps them.
    """

    bias: float
    best: float
    sources: Mapping[str, Weights]
    rate: float = RATE

    def of(self, source: str) -> Weights:
        """Returns the weights of a source."""
        name = source.split()[0]
        return self.sources.get(name) or self.sources.get("history") or Weights(0.0, 0.0, 0.0)


LEARNT = Mixture(
    -0.84,
    0.53,
    {
        "context": Weights(0.25, 0.65, -0.71),
        "history": Weights(0.31, 0.85, -0.40),
        "recycle": Weights(-0.05, 0.08, -0.64),
        "exit": Weights(0.31, 0.85, -0.40),
    },
)
#: Takes the best word for the answer, whatever the others say.
LIKELIEST = Mixture(0.0, 1.0, {}, 0.0)


def logit(chance: float) -> float:
    """Returns log odds, of a chance kept off 0 and 1."""
    chance = min(max(chance, 0.005), 0.995)
    return math.log(chance / (1.0 - chance))


class Offer:
    """A place in the text to come: the token that may stand there, and who says so.

    Attributes:
        token: its id.
        words: (source, grade) of all who propose it, sources by number.
        origin: number of the source with the best word; −1 where nobody proposes it.
        chance: that it is right where what it follows is; see :meth:`Odds.weigh`.
        children: what may follow, by token.
    """

    __slots__ = ("best", "chance", "children", "mask", "origin", "token", "voices", "words")

    def __init__(self, token: int = -1) -> None:
        self.token = token
        self.words: list[tuple[int, int]] = []
        self.origin = -1
        self.chance = 0.0
        self.children: dict[int, Offer] = {}
        self.best = -math.inf  # the highest logit of the words
        self.mask = 0  # a bit for each source that proposes it
        self.voices = 0  # a bit for each source that proposes a child

    def child(self, token: int) -> Offer:
        """Returns the child ``token``, there or new."""
        found = self.children.get(token)
        if found is None:
            found = self.children[token] = Offer(token)
        return found

    def claim(self, token: int, source: int, grade: int, word: float) -> Offer:
        """Returns the child ``token``, which a source proposes; its first word on it counts.

        Args:
            token: an id.
            source: the source's number.
            grade: what kind of guess it is.
            word: the logit of that grade.
        """
        child = self.children.get(token)
        if child is None:
            child = self.children[token] = Offer(token)
        bit = 1 << source
        if not child.mask & bit:
            child.mask |= bit
            child.words.append((source, grade))
            if word > child.best:
                child.best, child.origin = word, source
            self.voices |= bit
        return child


class Odds:
    """Running acceptance chances by source and grade, and the weights that mix them.

    Args:
        mixture: the weights to start from.

    Attributes:
        names: of the sources, by number.
        numbers: and back.
        chances: by source's number, the present chance of each grade.
        logits: the same as log odds.
        gains: what exits brought.
    """

    def __init__(self, mixture: Mixture = LEARNT) -> None:
        self.names: list[str] = []
        self.numbers: dict[str, int] = {}
        self.chances: list[list[float]] = []
        self.logits: list[list[float]] = []
        self.gains = Gains()
        self._stood: list[list[float]] = []
        self._seen: list[list[float]] = []
        self._usual: list[list[float]] = []  # chances over all texts before this one
        self._known: list[list[float]] = []  # and what they count for
        self._mixture = mixture
        self._rate = mixture.rate
        # The weights: bias, best, and slope, claims and denies of every source.
        self._all = [mixture.bias, mixture.best]
        self._usually = list(self._all)
        self._sums: dict[tuple[int, int], float] = {}  # who claims, who speaks → constant part

    def start(self, source: str, priors: Sequence[float]) -> int:
        """Starts a source's counts, unless they have been; returns its number."""
        number = self.numbers.get(source)
        if number is None:
            number = self.numbers[source] = len(self.names)
            self.names.append(source)
            self.chances.append(list(priors))
            self.logits.append([logit(chance) for chance in priors])
            self._usual.append(list(priors))
            self._known.append([KNOWN] * len(priors))
            self._stood.append([chance * PRIOR_WEIGHT for chance in priors])
            self._seen.append([PRIOR_WEIGHT] * len(priors))
            self._all += self._mixture.of(source)
            self._usually += self._mixture.of(source)
        return number

    def chance(self, source: str, grade: int) -> float:
        """Returns how likely a source's guess of a grade is by itself."""
        return self.chances[self.numbers[source]][grade]

    def counted(self, source: str, priors: Sequence[float]) -> list[tuple[float, float]]:
        """Returns how often each grade was seen and stood, in all texts; priors left out."""
        number = self.numbers[source]
        rows = zip(
            *(self._known[number], self._usual[number], self._seen[number], self._stood[number]),
            priors,
            strict=True,
        )
        return [
            (
                known - KNOWN + seen - PRIOR_WEIGHT,
                known * usual - KNOWN * prior + stood - PRIOR_WEIGHT * usual,
            )
            for known, usual, seen, stood, prior in rows
        ]

    def begin(self) -> None:
        """A text begins: what the last one taught counts as one text of many."""
        for i, weight in enumerate(self._all):
            self._usually[i] += CARRIED * (weight - self._usually[i])
        self._all = list(self._usually)
        self._sums.clear()
        for source, chances in enumerate(self.chances):
            known, usual = self._known[source], self._usual[source]
            stoods, seens = self._stood[source], self._seen[source]
            for grade, seen in enumerate(seens):
                if seen > PRIOR_WEIGHT:
                    new = seen - PRIOR_WEIGHT
                    stood = stoods[grade] - usual[grade] * PRIOR_WEIGHT
                    known[grade] += new
                    usual[grade] += (stood - new * usual[grade]) / known[grade]
                    stoods[grade] = usual[grade] * PRIOR_WEIGHT
                    seens[grade] = PRIOR_WEIGHT
                    chances[grade] = usual[grade]
                    self.logits[source][grade] = logit(usual[grade])

    def weigh(self, place: Offer) -> None:
        """Sets the chances of all that is proposed after ``place``."""
        weights, logits, voices = self._all, self.logits, place.voices
        best = weights[_BEST]
        for offer in place.children.values():
            mask = offer.mask
            if not mask:
                continue
            total = self._sums.get((mask, voices))
            if total is None:
                total = self._sums[mask, voices] = self._constant(mask, voices)
            total += best * offer.best
            for source, grade in offer.words:
                total += weights[_OWN * source + _SLOPE] * logits[source][grade]
            offer.chance = 1.0 / (1.0 + math.exp(-total))

    def _constant(self, mask: int, voices: int) -> float:
        weights = self._all
        total = weights[_BIAS]
        for source in range(len(self.names)):
            if mask >> source & 1:
                total += weights[_OWN * source + _CLAIMS]
            elif voices >> source & 1:
                total += weights[_OWN * source + _DENIES]
        return total

    def learn(self, place: Offer, token: int) -> None:
        """Counts what was proposed after a place that was right: ``token`` stood there."""
        rate, logits, weights = self._rate, self.logits, self._all
        if rate:
            self.weigh(place)
            self._sums.clear()
            for offer in place.children.values():
                mask = offer.mask
                if not mask:
                    continue
                step = rate * ((offer.token == token) - offer.chance)
                weights[_BIAS] += step
                weights[_BEST] += step * offer.best
                for source, grade in offer.words:
                    weights[_OWN * source + _SLOPE] += step * logits[source][grade]
                    weights[_OWN * source + _CLAIMS] += step
                others = place.voices & ~mask
                while others:
                    low = others & -others
                    weights[_OWN * (low.bit_length() - 1) + _DENIES] += step
                    others ^= low
        for offer in place.children.values():
            stood = offer.token == token
            for source, grade in offer.words:
                self._count(source, grade, stood)

    def _count(self, source: int, grade: int, stood: bool) -> None:
        stoods, seens = self._stood[source], self._seen[source]
        stoods[grade] += stood
        seens[grade] += 1.0
        chance = self.chances[source][grade] = stoods[grade] / seens[grade]
        self.logits[source][grade] = logit(chance)
