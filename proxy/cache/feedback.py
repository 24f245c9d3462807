"""A client or a person says that an answer was wrong: its entry goes, and the pair never matches again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.cache.holdings import Holdings, NotFound
from proxy.cache.near.prompt import plain_form
from proxy.cache.near.tier import NearTier, alone, pairs
from proxy.cache.served import Served
from storage.base import Entry


class Vetoing(Protocol):
    """What this needs of storage."""

    async def veto(self, pairs: list[bytes], now_ms: int) -> None:
        """Remember for good that these pairs do not match."""
        ...


@dataclass(frozen=True, slots=True)
class Removed:
    """The entry that went, and how many pairs will not match again."""

    entry: Entry
    pairs: int


class Feedback:
    """Takes wrong answers out."""

    def __init__(self, store: Vetoing, holdings: Holdings, served: Served, now_ms: Callable[[], int]) -> None:
        """Act on these."""
        self._store = store
        self._holdings = holdings
        self._served = served
        self._now_ms = now_ms

    async def wrong(self, shown_id: str, namespace: bytes | None, near: NearTier | None) -> Removed | NotFound:
        """Remove the entry of this id; with a `namespace`, only if it belongs there.

        Raises:
            StorageError: that the pair is wrong could not be written down, so nothing was removed.
        """
        found = await self._holdings.find(shown_id, namespace, in_memory=True)
        return found if isinstance(found, NotFound) else await self._remove(found, near)

    async def _remove(self, entry: Entry, near: NearTier | None) -> Removed:
        vetoed = await self._pairs(entry, near)
        if vetoed:
            await self._store.veto(vetoed, self._now_ms())
        await self._holdings.remove([entry.key])
        return Removed(entry, len(vetoed))

    async def _pairs(self, entry: Entry, near: NearTier | None) -> list[bytes]:
        if entry.words is None or not entry.near:
            return []
        asked = self._served.of(entry.key) if near is not None else []
        if near is None or not asked:
            # For which words it was served is not known any more: then it is near to nothing.
            return [alone(entry.namespace, plain_form(entry.words))]
        stored = await near.prepare(entry.words)
        return [pair for words in asked for pair in pairs(entry.namespace, await near.prepare(words), stored)]
