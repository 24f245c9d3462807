"""What is stored, for people: listed, found by its id, removed by hand. What is removed is forgotten everywhere."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from proxy.cache.hot import HotTier
from proxy.cache.selection import Listing
from storage.base import Change, Delete, Entry, StorageBusy, StorageError
from storage.listing import MIN_PREFIX, Listed, Page, Which
from storage.write_behind import WriteBehind

_MOST_FOUND = 8
_LOOK_S = 2.0
_STEP = 500
_PAUSE_S = 0.01
_EXAMPLES = 5


class NotFound(StrEnum):
    """Why an id leads to no entry."""

    NO_ID = "an id is the first 8 to 64 digits of an entry's, as in X-Nearhit-Entry"
    UNKNOWN = "no entry has this id"
    AMBIGUOUS = "several entries have an id that begins so: give more of it"


class Unfinished(Exception):
    """The store failed in the middle of a purge, after `removed` entries had gone."""

    def __init__(self, removed: int) -> None:
        """Tell how far it came."""
        super().__init__(f"the store failed after {removed} entries were removed")
        self.removed = removed


class Holding(Protocol):
    """What this needs of storage."""

    async def find(self, key_prefix: bytes, limit: int) -> list[Entry]:
        """Entries whose key begins so."""
        ...

    async def select(
        self, which: Which, mark: int, limit: int, *, newest_first: bool = False, answers: bool = False
    ) -> Page:
        """See `storage.listing.Listing.select`."""
        ...

    async def write(self, changes: Sequence[Change]) -> int:
        """Apply all changes, or raise."""
        ...

    async def announce(self) -> None:
        """See `storage.base.Coherence.announce`."""
        ...


@dataclass(slots=True)
class Doomed:
    """What a purge would remove; `size` is that of the answers in bytes."""

    count: int = 0
    size: int = 0
    examples: list[Listed] = field(default_factory=list)


class Holdings:
    """Looks into a store, and takes out of it, of the writes that wait and of memory."""

    def __init__(self, store: Holding, buffer: WriteBehind, hot: HotTier) -> None:
        """Act on these."""
        self._store = store
        self._buffer = buffer
        self._hot = hot

    async def page(self, asked: Listing) -> Page:
        """As many entries as were asked for, or those found in about two seconds.

        Raises:
            StorageError: the store cannot tell.
        """
        # What was stored a moment ago may wait to be written.
        await self._flush()
        found: list[Listed] = []
        mark, ends = asked.mark, time.monotonic() + _LOOK_S
        while True:
            rest = asked.limit - len(found)
            page = await self._store.select(asked.which, mark, rest, newest_first=asked.newest_first)
            found += page.listed
            if page.mark is None or len(found) >= asked.limit or time.monotonic() >= ends:
                return Page(tuple(found), page.mark)
            mark = page.mark
            await asyncio.sleep(_PAUSE_S)

    async def find(self, shown_id: str, namespace: bytes | None = None, *, in_memory: bool = False) -> Entry | NotFound:
        """The entry of this id, stale ones included; with a `namespace`, only if it belongs there.

        With `in_memory`, also one that had to leave the store and is served from memory still.

        Raises:
            StorageError: the store cannot tell.
        """
        if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * MIN_PREFIX},64}}", shown_id):
            return NotFound.NO_ID
        # Of an odd number of digits, the last is half a byte.
        prefix = bytes.fromhex(shown_id[: len(shown_id) // 2 * 2])
        await self._flush()
        found = await self._store.find(prefix, _MOST_FOUND)
        found = [entry for entry in found if entry.key.hex().startswith(shown_id.lower())]
        if in_memory and not found:
            found = self._hot.find(shown_id.lower())
        mine = [entry for entry in found if namespace is None or entry.namespace == namespace]
        if len(mine) != 1:
            return NotFound.AMBIGUOUS if mine else NotFound.UNKNOWN
        return mine[0]

    async def remove(self, keys: Sequence[bytes]) -> None:
        """Remove the entries of these keys, written on return: who is told that they are gone must not get them again.

        Raises:
            StorageError: none was removed.
        """
        # Of what had to leave the store for want of room, others may hold something in memory.
        await self._store.announce()
        try:
            await self._store.write([Delete(key) for key in keys])
        except asyncio.CancelledError:
            # Nobody can tell whether it was written.
            self._forget(keys)
            raise
        self._forget(keys)

    async def would_purge(self, which: Which) -> Doomed:
        """What `purge` would remove.

        Raises:
            StorageError: the store cannot tell.
        """
        await self._flush()
        doomed, mark = Doomed(), 0
        while True:
            page = await self._store.select(which, mark, _STEP, newest_first=True)
            doomed.count += len(page.listed)
            doomed.size += sum(listed.size for listed in page.listed)
            doomed.examples += page.listed[: _EXAMPLES - len(doomed.examples)]
            if page.mark is None:
                return doomed
            mark = page.mark
            await asyncio.sleep(_PAUSE_S)

    async def purge(self, which: Which, removed: Callable[[int], None]) -> int:
        """Remove all entries that are meant, in steps with pauses; how many. `removed` hears how many each step took.

        Raises:
            Unfinished: the store failed; what had gone stays gone.
        """
        total, mark = 0, 0
        try:
            await self._flush()
            while True:
                # From the newest on: what is stored meanwhile is not met, so that it ends.
                page = await self._store.select(which, mark, _STEP, newest_first=True)
                if page.listed:
                    await self.remove([listed.entry.key for listed in page.listed])
                    total += len(page.listed)
                    removed(len(page.listed))
                if page.mark is None:
                    await self._store.announce()
                    return total
                mark = page.mark
                await asyncio.sleep(_PAUSE_S)
        except StorageError as error:
            raise Unfinished(total) from error
        finally:
            # What had to leave the store for want of room may be in memory still, and be meant.
            self._hot.clear()

    async def _flush(self) -> None:
        if not await self._buffer.flush():
            raise StorageBusy("the store is busy: what was stored last still waits to be written")

    def _forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._buffer.delete(key)
        if len(keys) == 1:
            self._hot.discard_entry(keys[0])
        else:
            self._hot.clear()
