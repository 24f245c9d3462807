"""Writes gathered in memory and applied in batches, with every change visible at once to whoever reads through here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import Protocol

from storage.base import Candidate, Delete, Entries, Entry, Put, Room, Sketch, StorageBusy, StorageError, Used
from storage.presence import Presence
from storage.waiting import Waiting, weight

log = logging.getLogger("nearhit.storage")

BATCH = 512
"""Most changes of one transaction."""
BATCH_BYTES = 4 * 1024 * 1024
"""What these may weigh, unless one alone weighs more: the write-ahead log holds a whole transaction."""
_CHANGE_BYTES = 160 * 1024
"""About what one change adds to the log at most: a page for each of the places where something comes or goes."""

OnError = Callable[[str, StorageError], None]
OnEvicted = Callable[[str, int], None]


class Behind(Entries, Protocol):
    """What of a store is read and written through `WriteBehind`."""

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """See `storage.base.Sketches.candidates`."""
        ...

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """See `storage.base.Vetoes.vetoed`."""
        ...


class WriteBehind:
    """Reads and writes of entries in front of a store, whose writes follow within `flush_s` seconds.

    A write that fails for good is dropped and reported: the cache then knows one answer less. A busy store is tried
    again. At most `max_pending_bytes` wait; more is refused by `put`.
    """

    def __init__(
        self,
        entries: Behind,
        on_error: OnError,
        *,
        flush_s: float,
        max_pending_bytes: int,
        presence: Presence | None = None,
        room: Room | None = None,
        on_evicted: OnEvicted | None = None,
    ) -> None:
        """`on_error` gets the operation's name and the error, each time one fails.

        `presence`, where given, knows keys that need not be asked for. `room` bounds the store; `on_evicted` gets
        the reason and number of entries that went for it.
        """
        self._presence = presence
        self._room = room
        # In a small room, the log is small as well.
        log_bytes = BATCH * 3 * _CHANGE_BYTES if room is None else room.log_bytes
        self._batch = max(min(BATCH, log_bytes // 3 // _CHANGE_BYTES), 1)
        self._batch_bytes = min(BATCH_BYTES, log_bytes // 4)
        self._on_evicted = on_evicted
        self._entries = entries
        self._on_error = on_error
        self._flush_s = flush_s
        self._max_pending_bytes = max_pending_bytes
        self._pending = Waiting()
        self._writing = Waiting()
        self._used: dict[bytes, tuple[int, int]] = {}
        self._asking: dict[object, list[Waiting]] = {}
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._lost = False

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """As `Entries.get`, pending writes included; None where the store fails, too."""
        known, entry = self._waiting(key, now_ms)
        if known:
            return entry
        if self.lacks(key):
            return None
        try:
            stored = await self._entries.get(key, now_ms)
        except StorageError as error:
            self._on_error("get", error)
            return None
        # The key may have been written or deleted while the store was asked.
        known, entry = self._waiting(key, now_ms)
        return entry if known else stored

    async def get_anew(self, key: bytes, now_ms: int) -> Entry | None:
        """As `get`, where another process may have stored it a moment ago."""
        if self._presence is not None:
            self._presence.add(key)
        return await self.get(key, now_ms)

    def lacks(self, key: bytes) -> bool:
        """Whether it is known, without asking the store, that there is no entry of this key."""
        return self._presence is not None and key not in self._pending and self._presence.lacks(key)

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """As `storage.base.Sketches.candidates`, pending writes included; only these where the store fails.

        May be fewer than the limit where pending writes took some of the store's best away.
        """
        # What is written while the store is asked may be missing from its answer, and waits no longer.
        written: list[Waiting] = []
        ticket = object()
        self._asking[ticket] = written
        try:
            stored = await self._entries.candidates(space, keys, now_ms, per_key=per_key, limit=limit)
        except StorageError as error:
            self._on_error("candidates", error)
            stored = []
        finally:
            del self._asking[ticket]
        if self._presence is not None:
            # Another process may have stored them a moment ago.
            for candidate in stored:
                self._presence.add(candidate.key)
        found: list[Candidate] = []
        above: list[Waiting] = []
        for waiting in (self._pending, self._writing, *reversed(written)):
            found += _outside(above, waiting.candidates(space, keys, now_ms, per_key))
            above.append(waiting)
        found += _outside(above, stored)
        return sorted(found, key=lambda candidate: -candidate.shared)[:limit]

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """Whether one of the pairs is vetoed, or the store cannot tell."""
        try:
            return await self._entries.vetoed(pairs)
        except StorageError as error:
            self._on_error("vetoed", error)
            return True

    def put(self, entry: Entry, sketch: Sketch | None = None) -> bool:
        """Store the entry; False when too much waits to be written already."""
        change = Put(entry, sketch)
        more = weight(change) - self._pending.weight_of(entry.key)
        if self._pending.weight + self._writing.weight + more > self._max_pending_bytes:
            return False
        if self._presence is not None:
            self._presence.add(entry.key)
        self._change(entry.key, change)
        return True

    def delete(self, key: bytes) -> None:
        """Remove the entry of this key."""
        self._change(key, Delete(key))

    def used(self, key: bytes, now_ms: int) -> None:
        """Count one more hit for the entry of this key."""
        count, _ = self._used.get(key, (0, 0))
        self._used[key] = (count + 1, now_ms)

    def report_slow(self) -> None:
        """Count a look-up that its caller gave up waiting for."""
        self._on_error("get", StorageBusy("a look-up took too long"))

    async def flush(self) -> bool:
        """Write everything that waits now; False where the store is busy, so that some of it still waits."""
        async with self._turn:
            while len(self._pending) or self._used:
                if not await self._write_batch():
                    return False
        return True

    async def written(self) -> bool:
        """As `flush`; False also where the store has refused what was written last, so that it is not there."""
        return await self.flush() and not self._lost

    async def run(self) -> None:
        """Flush again and again until cancelled."""
        while True:
            # Hit counts alone are worth no write of their own more often than this.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._flush_s * 10):
                    await self._wake.wait()
            await asyncio.sleep(self._flush_s)
            self._wake.clear()
            try:
                await self.flush()
            except Exception as error:  # noqa: BLE001 - one bad batch must not end the writing of all that follow
                log.critical("a flush failed unexpectedly: %s", type(error).__name__)

    def _waiting(self, key: bytes, now_ms: int) -> tuple[bool, Entry | None]:
        change = self._pending.get(key) or self._writing.get(key)
        if isinstance(change, Put) and change.entry.ends_ms > now_ms:
            return True, change.entry
        return change is not None, None

    def _change(self, key: bytes, change: Put | Delete) -> None:
        self._pending.add(change)
        self._used.pop(key, None)
        self._wake.set()

    async def _write_batch(self) -> bool:
        taken = self._writing = self._take()
        # A hit on an entry that waits for a later batch waits with it.
        free = (item for item in self._used.items() if item[0] not in self._pending)
        used = dict(islice(free, self._batch))
        for key in used:
            del self._used[key]
        try:
            uses = (Used(key, count, now_ms) for key, (count, now_ms) in used.items())
            evicted = await self._entries.write([*taken, *uses], self._room)
            self._lost = False
            if evicted and self._on_evicted is not None:
                self._on_evicted("bound", evicted)
            for written in self._asking.values():
                written.append(taken)
        except StorageBusy as error:
            self._on_error("write", error)
            self._take_back(taken, used)
            return False
        except StorageError as error:
            self._lost = True
            self._on_error("write", error)
        except asyncio.CancelledError:
            self._take_back(taken, used)
            raise
        finally:
            self._writing = Waiting()
        return True

    def _take(self) -> Waiting:
        if len(self._pending) > self._batch or self._pending.weight > self._batch_bytes:
            return self._pending.take(self._batch, self._batch_bytes)
        taken, self._pending = self._pending, Waiting()
        return taken

    def _take_back(self, taken: Waiting, used: dict[bytes, tuple[int, int]]) -> None:
        for key, (count, last_ms) in used.items():
            # An entry that was replaced meanwhile begins at no hits.
            if key not in self._pending:
                more, later_ms = self._used.get(key, (0, 0))
                self._used[key] = (count + more, max(last_ms, later_ms))
        later, self._pending = self._pending, taken
        for change in later:
            self._pending.add(change)


@asynccontextmanager
async def write_behind(
    entries: Behind,
    on_error: OnError,
    *,
    flush_s: float,
    max_pending_bytes: int,
    presence: Presence | None = None,
    room: Room | None = None,
    on_evicted: OnEvicted | None = None,
) -> AsyncIterator[WriteBehind]:
    """Run a `WriteBehind` for the life of this block; leaving it writes what still waits."""
    buffer = WriteBehind(
        entries,
        on_error,
        flush_s=flush_s,
        max_pending_bytes=max_pending_bytes,
        presence=presence,
        room=room,
        on_evicted=on_evicted,
    )
    task = asyncio.create_task(buffer.run(), name="nearhit-flush")
    try:
        yield buffer
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await buffer.flush()


def _outside(above: Sequence[Waiting], found: Sequence[Candidate]) -> list[Candidate]:
    # What was changed later counts, whether that is a candidate or not.
    return [candidate for candidate in found if not any(candidate.key in waiting for waiting in above)]
