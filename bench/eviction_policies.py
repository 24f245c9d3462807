"""Policies that say what goes first when a store is above its bound: FIFO, LRU, LFU and those that know values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

OVERHEAD = 3000
"""Bytes that a row takes on disk beside the answer: key, request, sketch, indices."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `key`: what an entry must have to answer it; `at`, `cost`: seconds; `size`: bytes of the answer.

    `next_at` is when the same key is asked for next, infinite for never: for the policy that knows the future.
    """

    key: str
    topic: str
    at: float
    cost: float
    size: int
    next_at: float = math.inf


@dataclass(slots=True, eq=False)
class Entry:
    """A stored answer; lowest `score` goes first. `expires`: seconds, as `Call.at`; `uses`: hits and the store."""

    key: str
    topic: str
    cost: float
    size: int
    expires: float
    score: float = 0.0
    uses: int = 1


class Policy(Protocol):
    """Gives entries their scores."""

    def stored(self, entry: Entry, call: Call) -> float:
        """The score of an entry that is new."""
        ...

    def hit(self, entry: Entry, call: Call) -> float:
        """The score of an entry that just answered."""
        ...

    def gone(self, entry: Entry) -> None:
        """That entry had to go."""
        ...


class _Plain:
    """Needs to know nothing of what goes."""

    def gone(self, entry: Entry) -> None:
        pass


class Fifo(_Plain):
    """The oldest goes."""

    def stored(self, _entry: Entry, call: Call) -> float:
        return call.at

    def hit(self, entry: Entry, _call: Call) -> float:
        return entry.score


class Lru(_Plain):
    """The longest unused goes."""

    def stored(self, _entry: Entry, call: Call) -> float:
        return call.at

    def hit(self, _entry: Entry, call: Call) -> float:
        return call.at


class Lfu(_Plain):
    """The least used goes, of equals the longest unused."""

    _TIE = 1e-12

    def stored(self, _entry: Entry, call: Call) -> float:
        return 1 + self._TIE * call.at

    def hit(self, entry: Entry, call: Call) -> float:
        return entry.uses + self._TIE * call.at


class GreedyDual:
    """GreedyDual-Size-Frequency: the score of what went last, plus uses x cost / size (Cherkasova 1998).

    Ages by what had to go, not by the clock. With neither cost nor size it is LFU with dynamic aging.
    """

    def __init__(
        self, *, first: float = 1.0, by_cost: bool = True, by_size: bool = True, overhead: int = OVERHEAD
    ) -> None:
        """`first`: what being stored counts, where a hit counts 1; `overhead`: bytes added to each size."""
        self._first = first
        self._by_cost, self._by_size, self._overhead = by_cost, by_size, overhead
        self._floor = 0.0

    def stored(self, entry: Entry, _call: Call) -> float:
        return self._floor + self._first * self._value(entry)

    def hit(self, entry: Entry, _call: Call) -> float:
        return self._floor + (self._first + entry.uses - 1) * self._value(entry)

    def gone(self, entry: Entry) -> None:
        self._floor = max(self._floor, entry.score)

    def _value(self, entry: Entry) -> float:
        return (entry.cost if self._by_cost else 1.0) / (entry.size + self._overhead if self._by_size else 1.0)


@dataclass(slots=True)
class Decay(_Plain):
    """Uses that count half as much after each half-life, times cost / size; kept as a logarithm to base 2.

    Forward decay (Cormode et al. 2009): uses count 2^(t / half_life) each, so that scores need no change as time goes.
    """

    half_life: float
    """Seconds."""
    by_cost: bool = True
    by_size: bool = True

    def stored(self, entry: Entry, call: Call) -> float:
        return self._use(entry, call)

    def hit(self, entry: Entry, call: Call) -> float:
        return logaddexp2(entry.score, self._use(entry, call))

    def _use(self, entry: Entry, call: Call) -> float:
        value = (entry.cost if self.by_cost else 1.0) / (entry.size + OVERHEAD if self.by_size else 1.0)
        return math.log2(value) + call.at / self.half_life


class Clairvoyant(_Plain):
    """What is asked for latest, or never again, goes (Belady 1966): with equal sizes nothing has more hits."""

    def stored(self, entry: Entry, call: Call) -> float:
        return -call.next_at if call.next_at < entry.expires else -math.inf

    hit = stored


def logaddexp2(a: float, b: float) -> float:
    """log2(2^a + 2^b), for numbers of which the powers would overflow."""
    return max(a, b) + math.log1p(2.0 ** -abs(a - b)) / math.log(2)
