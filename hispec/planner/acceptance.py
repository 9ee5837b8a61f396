"""How often a level's token is what the level above would have picked, counted.

Acceptance is no single number. It depends on where in the window a token stands (where those before
it stood, the text is an easy one) and on how it came to be: a token of exit 8 that exit 4 had
drafted is likelier to stand at the target than one that exit 8 put in its place. So counts are kept
by edge, origin and place:

    own          the level drafted it itself, nothing below having spoken
    accepted     the level below had drafted it
    corrected    the level below had drafted another
    bonus        the level below was right throughout and had no more

All are rates given that everything before in the window stood. By the law of total probability the
origins of a level's tokens, weighed by how often they occur, give its own rate again: what drafts
below a strict level decides what its tokens cost, and hardly whether they stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OWN, ACCEPTED, CORRECTED, BONUS = ORIGINS = ("own", "accepted", "corrected", "bonus")

#: What an average over all places counts for at one place, in observations.
POOLED_WEIGHT = 8.0
#: z of a 95 % interval.
Z = 1.96


class Count(NamedTuple):
    """Observations of one kind: how many there were, and how many stood."""

    seen: float = 0.0
    stood: float = 0.0

    @property
    def rate(self) -> float:
        """The share that stood; 0 where nothing was seen."""
        return self.stood / self.seen if self.seen else 0.0

    def interval(self) -> tuple[float, float]:
        """Returns Wilson's 95 % interval; all of [0, 1] where nothing was seen."""
        return wilson(self.stood, self.seen)


def wilson(stood: float, seen: float) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927)."""
    if seen <= 0:
        return 0.0, 1.0
    rate = stood / seen
    middle = rate + Z * Z / (2 * seen)
    half = Z * math.sqrt(rate * (1 - rate) / seen + Z * Z / (4 * seen * seen))
    scale = 1 + Z * Z / seen
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


class Key(NamedTuple):
    """What a rate is about.

    Attributes:
        lower: the level whose token is judged.
        upper: the level that judges.
        origin: one of ``ORIGINS``.
        via: the level below ``lower``, to which an origin other than ``own`` refers.
    """

    lower: str
    upper: str
    origin: str = OWN
    via: str = ""


@dataclass
class Acceptance:
    """Counts by key and place in the window, and the rates that follow.

    Attributes:
        counts: by key, one count a place.
    """

    counts: dict[Key, list[Count]] = field(default_factory=dict)

    def add(self, key: Key, place: int, seen: float, stood: float) -> None:
        """Counts observations at a place (0 is a window's first token)."""
        row = self.counts.setdefault(key, [])
        row += [Count()] * (place + 1 - len(row))
        row[place] = Count(row[place].seen + seen, row[place].stood + stood)

    def total(self, key: Key) -> Count:
        """Returns the counts of all places together."""
        row = self.counts.get(key, [])
        return Count(sum(x.seen for x in row), sum(x.stood for x in row))

    def rates(
        self, lower: str, upper: str, places: int, origin: str = OWN, via: str = ""
    ) -> list[float]:
        """Returns the rates at so many places, given that all before stood.

        A place is drawn towards the average of all places as few observations deserve; past the
        last observed one the average of the last is repeated. Where an origin was never seen, the
        level's own rates are taken.
        """
        key = Key(lower, upper, origin, via)
        row = self.counts.get(key, [])
        pooled = self.total(key)
        if not pooled.seen:
            return self.rates(lower, upper, places) if origin != OWN else [0.0] * places
        rates: list[float] = []
        for place in range(places):
            count = row[place] if place < len(row) else Count()
            prior = rates[-1] if rates and place >= len(row) else pooled.rate
            rates.append((count.stood + POOLED_WEIGHT * prior) / (count.seen + POOLED_WEIGHT))
        return rates

    def widest(self) -> float:
        """Returns the half width of the widest interval of a level's own rate, all places."""
        halves = []
        for key in self.counts:
            if key.origin == OWN:
                low, high = self.total(key).interval()
                halves.append((high - low) / 2)
        return max(halves, default=0.5)

    @staticmethod
    def constant(rates: Mapping[tuple[str, str], float]) -> Acceptance:
        """Returns acceptance that depends on nothing but the edge, known exactly (HSD's model).

        Args:
            rates: α by (lower, upper).
        """
        sure = 1e9
        table = Acceptance()
        for (lower, upper), rate in rates.items():
            table.add(Key(lower, upper), 0, sure, sure * rate)
        return table

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what :meth:`from_json` reads."""
        return [
            {**key._asdict(), "counts": [[x.seen, x.stood] for x in row]}
            for key, row in self.counts.items()
        ]

    @staticmethod
    def from_json(document: Iterable[Mapping[str, Any]]) -> Acceptance:
        """Returns the table of a parsed JSON document."""
        table = Acceptance()
        for entry in document:
            key = Key(entry["lower"], entry["upper"], entry["origin"], entry["via"])
            table.counts[key] = [Count(*pair) for pair in entry["counts"]]
        return table


def survival(rates: Sequence[float]) -> list[float]:
    """Returns the chances that the first 1, 2, … tokens of a window all stand."""
    found, alive = [], 1.0
    for rate in rates:
        alive *= rate
        found.append(alive)
    return found
