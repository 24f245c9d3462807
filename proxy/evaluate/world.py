"""A cache to look up in: the exact tier and the near tier as they serve, on SQLite in memory or on a single entry."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from proxy.cache.dialects.call import KEY_VERSION
from proxy.cache.dialects.chat import CHAT
from proxy.cache.near.matcher import Matcher
from proxy.cache.near.tier import Nearest, NearTier
from proxy.evaluate.rows import Question
from storage.base import Candidate, Entry, Put, Sketch, StorageError
from storage.sqlite import open_sqlite
from storage.waiting import Waiting
from storage.write_behind import BATCH, WriteBehind

# There is no clock: it is always now, and nothing expires.
_NOW_MS = 0
_LATER_MS = 1
_NAMESPACE = b""
_NO_BOUND = 1 << 62
_NEVER_S = 3600.0

EXACT = "exact"
"""The tier that equal requests are found by; the others are the near tier's steps."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a look-up came to: the key of the entry that answers, and the tier that found it; both None for a miss.

    `nearest` is what the near tier said where it was asked, `near_us` the microseconds that it took.
    """

    key: bytes | None
    tier: str | None
    nearest: Nearest | None = None
    near_us: float | None = None


class Shelf(Protocol):
    """Where entries are kept."""

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """The entry of this key."""
        ...

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """See `storage.base.Sketches.candidates`."""
        ...

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """See `storage.base.Vetoes.vetoed`."""
        ...

    def put(self, entry: Entry, sketch: Sketch | None = None) -> bool:
        """Store the entry; False where it cannot be."""
        ...

    async def flush(self) -> bool:
        """Write what waits."""
        ...


class World:
    """Entries, and the look-ups that a server would do among them."""

    def __init__(self, shelf: Shelf, matcher: Matcher, threshold: float) -> None:
        """`threshold` is the least similarity of what the guard is shown."""
        self._shelf = shelf
        self._near = NearTier(shelf, matcher)
        self._threshold = threshold
        self._waiting = 0

    async def add(self, question: Question) -> None:
        """Store an answer to the question."""
        words = question.words
        sketch = None if words is None else await self._near.sketch(words, question.space)
        self._shelf.put(_entry(question), sketch)
        self._waiting += 1
        if self._waiting >= BATCH:
            await self.settle()

    async def settle(self) -> None:
        """Write what waits to be written."""
        await self._shelf.flush()
        self._waiting = 0

    async def look_up(self, question: Question) -> Found:
        """Ask the exact tier, then the near tier."""
        if await self._shelf.get(question.digest, _NOW_MS) is not None:
            return Found(question.digest, EXACT)
        if question.words is None:
            return Found(None, None)
        begin = perf_counter()
        nearest = await self._near.find(
            question.space, _NAMESPACE, question.words, threshold=self._threshold, now_ms=_NOW_MS
        )
        near_us = (perf_counter() - begin) * 1e6
        if nearest.found is None or nearest.step is None:
            return Found(None, None, nearest, near_us)
        return Found(nearest.found.candidate.key, nearest.step.value, nearest, near_us)


@asynccontextmanager
async def open_world(matcher: Matcher, threshold: float) -> AsyncIterator[World]:
    """A world on SQLite in memory."""
    async with open_sqlite(None) as store:
        yield World(WriteBehind(store, _fail, flush_s=_NEVER_S, max_pending_bytes=_NO_BOUND), matcher, threshold)


async def small_world(question: Question, matcher: Matcher, threshold: float) -> World:
    """A world with a single entry. It needs no database, which would cost more than all that is looked up in it."""
    world = World(_Memory(), matcher, threshold)
    await world.add(question)
    return world


class _Memory:
    """Entries that wait for ever; found by the same keys as in a database."""

    def __init__(self) -> None:
        self._entries = Waiting()

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        change = self._entries.get(key)
        return change.entry if isinstance(change, Put) and change.entry.expires_ms > now_ms else None

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        found = self._entries.candidates(space, keys, now_ms, per_key)
        return sorted(found, key=lambda candidate: -candidate.shared)[:limit]

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:  # noqa: ARG002 - nobody called anything wrong here
        return False

    def put(self, entry: Entry, sketch: Sketch | None = None) -> bool:
        self._entries.add(Put(entry, sketch))
        return True

    async def flush(self) -> bool:
        return True


def _fail(_operation: str, error: StorageError) -> None:
    # A server goes on without its store; figures would be wrong.
    raise error


def _entry(question: Question) -> Entry:
    return Entry(
        key=question.digest,
        key_version=KEY_VERSION,
        namespace=_NAMESPACE,
        space=question.space,
        upstream="",
        fingerprint=b"",
        endpoint=CHAT.endpoint,
        model="",
        words=question.words,
        stored_ms=_NOW_MS,
        expires_ms=_LATER_MS,
        cost_ms=0,
        prompt_tokens=None,
        completion_tokens=None,
        usage_known=True,
        answer=b"{}",
        near=True,
    )
