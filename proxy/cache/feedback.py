"""A client or a person says that an answer was wrong: its entry goes, and the pair never matches again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from proxy.cache.hot import HotTier
from proxy.cache.near.prompt import plain_form
from proxy.cache.near.tier import NearTier, alone, pairs
from proxy.cache.served import Served
from storage.base import MIN_PREFIX, Change, Delete, Entry
from storage.write_behind import WriteBehind

_MOST_FOUND = 8


class NotFound(StrEnum):
    """Why there was nothing to remove."""

    NO_ID = "an id is the first 8 to 64 digits of an entry's, as in X-Nearhit-Entry"
    UNKNOWN = "no entry has this id"
    AMBIGUOUS = "several entries have an id that begins so: give more of it"


class Vetoing(Protocol):
    """What this needs of storage."""

    async def find(self, key_prefix: bytes, limit: int) -> list[Entry]:
        """Entries whose key begins so."""
        ...

    async def veto(self, pairs: list[bytes], now_ms: int) -> None:
        """Remember for good that these pairs do not match."""
        ...

    async def write(self, changes: Sequence[Change]) -> None:
        """Apply all changes, or raise."""
        ...


@dataclass(frozen=True, slots=True)
class Removed:
    """The entry that went, and how many pairs will not match again."""

    entry: Entry
    pairs: int


class Feedback:
    """Takes wrong answers out."""

    def __init__(
        self, store: Vetoing, buffer: WriteBehind, hot: HotTier, served: Served, now_ms: Callable[[], int]
    ) -> None:
        """Act on these."""
        self._store = store
        self._buffer = buffer
        self._hot = hot
        self._served = served
        self._now_ms = now_ms

    async def wrong(self, shown_id: str, namespace: bytes | None, near: NearTier | None) -> Removed | NotFound:
        """Remove the entry of this id; with a `namespace`, only if it belongs there.

        Raises:
            StorageError: that the pair is wrong could not be written down, so nothing was removed.
        """
        if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * MIN_PREFIX},64}}", shown_id):
            return NotFound.NO_ID
        # Of an odd number of digits, the last is half a byte.
        prefix = bytes.fromhex(shown_id[: len(shown_id) // 2 * 2])
        # What was stored a moment ago may wait to be written.
        await self._buffer.flush()
        found = await self._store.find(prefix, _MOST_FOUND)
        found = [entry for entry in found if entry.key.hex().startswith(shown_id.lower())]
        mine = [entry for entry in found if namespace is None or entry.namespace == namespace]
        if len(mine) != 1:
            return NotFound.AMBIGUOUS if mine else NotFound.UNKNOWN
        return await self._remove(mine[0], near)

    async def _remove(self, entry: Entry, near: NearTier | None) -> Removed:
        vetoed = await self._pairs(entry, near)
        if vetoed:
            await self._store.veto(vetoed, self._now_ms())
        # Written at once: who is told that it is gone must not get it again.
        await self._store.write([Delete(entry.key)])
        self._buffer.delete(entry.key)
        self._hot.discard_entry(entry.key)
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
