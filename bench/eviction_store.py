"""A store with a bound, which is asked a log of calls."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter

from bench.eviction_policies import OVERHEAD, Call, Entry, Policy

_STALE = 4
"""Marks for each entry of a ranking above which those that say nothing any more are taken out."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that a store may hold; bytes count an answer and its OVERHEAD."""

    entries: float = math.inf
    bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class TopK:
    """Entries that go after all others: the `k` with the best scores in each topic.

    `hit_once`: only among those that have answered, and at most `most` of the bound, shared by the topics alike.
    """

    k: int
    hit_once: bool = True
    most: int = 2**62


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a store did for a log of calls, as shares from 0 to 1."""

    hits: float
    saved: float
    """Of the seconds that the upstream takes without a cache."""


@dataclass(slots=True, eq=False)
class _Ranking:
    """Entries by their scores, as marks in a heap.

    A score that rose, or an entry that left, leaves its mark until that comes to the top.
    """

    marks: list[tuple[float, int, Entry]] = field(default_factory=list)
    """Scores as they were; a unique number, so that entries are never compared; whose it is."""
    members: set[Entry] = field(default_factory=set)

    def add(self, entry: Entry, number: int) -> None:
        """Of equal scores, the lower number goes first."""
        self.members.add(entry)
        if len(self.marks) > _STALE * (len(self.members) + _STALE):
            numbers = {mark[2]: mark[1] for mark in self.marks if mark[2] in self.members}
            self.marks = [(one.score, number, one) for one, number in numbers.items()]
            heapify(self.marks)
        heappush(self.marks, (entry.score, number, entry))

    def lowest(self) -> Entry | None:
        while self.marks:
            score, number, entry = self.marks[0]
            if entry not in self.members:
                heappop(self.marks)
            elif score == entry.score:
                return entry
            else:
                heapreplace(self.marks, (entry.score, number, entry))
        return None


class _Order:
    """What goes first: the lowest that is not protected, else the lowest."""

    def __init__(self, top: TopK | None) -> None:
        self._top = top
        self._open = _Ranking()
        self._topics: dict[str, _Ranking] = {}
        self._full: dict[str, _Ranking] = {}
        self._k = 0
        self._number = 0

    def add(self, entry: Entry) -> None:
        """Take in an entry, or one whose score fell."""
        self._number += 1
        if self._top is None or (self._top.hit_once and entry.uses == 1):
            self._open.add(entry, self._number)
            return
        self._topics.setdefault(entry.topic, _Ranking()).add(entry, self._number)
        self._count(entry.topic)

    def hit(self, entry: Entry) -> None:
        """It answered for the first time."""
        if self._top is not None and self._top.hit_once:
            self._open.members.discard(entry)
            self.add(entry)

    def remove(self, entry: Entry) -> None:
        if entry in self._open.members:
            self._open.members.remove(entry)
        else:
            self._topics[entry.topic].members.remove(entry)
            self._count(entry.topic)

    def victim(self) -> Entry:
        # The lowest of a topic with more than K entries is surely not among its K best.
        first = _lowest(self._full.values()) if self._full else None
        last = self._open.lowest()
        if first is None or last is None:
            return first or last or _lowest(self._topics.values()) or _none()
        return min(first, last, key=_score)

    def _count(self, topic: str) -> None:
        """Note that the number of a topic's entries changed."""
        ranking = self._topics[topic]
        if not ranking.members:
            del self._topics[topic]
        if self._k != (k := self._fair()):
            self._k = k
            self._full = {name: each for name, each in self._topics.items() if len(each.members) > k}
        elif len(ranking.members) > k:
            self._full[topic] = ranking
        else:
            self._full.pop(topic, None)

    def _fair(self) -> int:
        if self._top is None or not self._top.hit_once:
            return 0 if self._top is None else self._top.k
        return min(self._top.k, self._top.most // max(1, len(self._topics)))


_score = attrgetter("score")


def _lowest(rankings: Iterable[_Ranking]) -> Entry | None:
    entries = [entry for ranking in rankings if (entry := ranking.lowest()) is not None]
    return min(entries, key=_score, default=None)


def _none() -> Entry:
    raise LookupError("a store of nothing is above its bound")


class Store:
    """Entries up to a bound, each for at most `ttl` seconds."""

    def __init__(self, policy: Policy, bound: Bound, ttl: float = math.inf, top: TopK | None = None) -> None:
        self._policy, self._bound, self._ttl = policy, bound, ttl
        self._entries: dict[str, Entry] = {}
        self._oldest: deque[Entry] = deque()
        self._order = _Order(top)
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def ask(self, call: Call) -> bool:
        """Whether it is a hit; if not, it is stored."""
        self._expire(call.at)
        entry = self._entries.get(call.key)
        if entry is None:
            self._store(call)
            return False
        entry.uses += 1
        before, entry.score = entry.score, self._policy.hit(entry, call)
        if entry.uses == 2:
            self._order.hit(entry)
        if entry.score < before:
            self._order.add(entry)
        return True

    def _expire(self, now: float) -> None:
        while self._oldest and self._oldest[0].expires <= now:
            entry = self._oldest.popleft()
            if self._entries.get(entry.key) is entry:
                self._drop(entry)

    def _store(self, call: Call) -> None:
        entry = Entry(call.key, call.topic, call.cost, call.size, call.at + self._ttl)
        entry.score = self._policy.stored(entry, call)
        self._entries[entry.key] = entry
        self._oldest.append(entry)
        self._order.add(entry)
        self._bytes += entry.size + OVERHEAD
        while len(self._entries) > self._bound.entries or self._bytes > self._bound.bytes:
            victim = self._order.victim()
            self._policy.gone(victim)
            self._drop(victim)

    def _drop(self, entry: Entry) -> None:
        self._order.remove(entry)
        del self._entries[entry.key]
        self._bytes -= entry.size + OVERHEAD


def replay(calls: Sequence[Call], store: Store) -> Outcome:
    """What the store does for the calls, in their order."""
    hits, saved = 0, 0.0
    for call in calls:
        if store.ask(call):
            hits += 1
            saved += call.cost
    return Outcome(hits / len(calls), saved / sum(call.cost for call in calls))


def footprint(calls: Iterable[Call]) -> Bound:
    """What a store takes that keeps everything."""
    sizes = {call.key: call.size + OVERHEAD for call in calls}
    return Bound(len(sizes), sum(sizes.values()))
