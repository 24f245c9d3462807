"""Writes gathered in memory and applied in batches, with every change visible at once to whoever reads through here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from storage.base import Change, Delete, Entries, Entry, Put, StorageBusy, StorageError, Used
from storage.presence import Presence

log = logging.getLogger("nearhit.storage")

BATCH = 512
ROW_BYTES = 512
"""What an entry weighs beside its answer and words; an estimate for the bound on pending bytes."""

OnError = Callable[[str, StorageError], None]


class WriteBehind:
    """Reads and writes of entries in front of `Entries`, whose writes follow within `flush_s` seconds.

    A write that fails for good is dropped and reported: the cache then knows one answer less. A busy store is tried
    again. At most `max_pending_bytes` wait; more is refused by `put`.
    """

    def __init__(
        self,
        entries: Entries,
        on_error: OnError,
        *,
        flush_s: float,
        max_pending_bytes: int,
        presence: Presence | None = None,
    ) -> None:
        """`on_error` gets the operation's name and the error, each time one fails.

        `presence`, where given, knows keys that need not be asked for.
        """
        self._presence = presence
        self._entries = entries
        self._on_error = on_error
        self._flush_s = flush_s
        self._max_pending_bytes = max_pending_bytes
        self._pending: dict[bytes, Entry | None] = {}
        self._writing: dict[bytes, Entry | None] = {}
        self._used: dict[bytes, tuple[int, int]] = {}
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """The entry that is fresh at `now_ms`, pending writes included; None where the store fails, too."""
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

    def lacks(self, key: bytes) -> bool:
        """Whether it is known, without asking the store, that there is no entry of this key."""
        return self._presence is not None and key not in self._pending and self._presence.lacks(key)

    def put(self, entry: Entry) -> bool:
        """Store the entry; False when too much waits to be written already."""
        more = _weight(entry) - _weight(self._pending.get(entry.key))
        if self._pending_bytes + more > self._max_pending_bytes:
            return False
        if self._presence is not None:
            self._presence.add(entry.key)
        self._change(entry.key, entry)
        return True

    def delete(self, key: bytes) -> None:
        """Remove the entry of this key."""
        self._change(key, None)

    def used(self, key: bytes, now_ms: int) -> None:
        """Count one more hit for the entry of this key."""
        count, _ = self._used.get(key, (0, 0))
        self._used[key] = (count + 1, now_ms)

    def report_slow(self) -> None:
        """Count a look-up that its caller gave up waiting for."""
        self._on_error("get", StorageBusy("a look-up took too long"))

    async def flush(self) -> None:
        """Write everything that waits now."""
        async with self._turn:
            while self._pending or self._used:
                if not await self._write_batch():
                    return

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
        for changes in (self._pending, self._writing):
            if key in changes:
                entry = changes[key]
                return True, entry if entry is not None and entry.expires_ms > now_ms else None
        return False, None

    def _change(self, key: bytes, entry: Entry | None) -> None:
        self._pending_bytes += _weight(entry) - _weight(self._pending.get(key))
        self._pending[key] = entry
        self._used.pop(key, None)
        self._wake.set()

    async def _write_batch(self) -> bool:
        taken = dict(list(self._pending.items())[:BATCH])
        for key in taken:
            del self._pending[key]
        # A hit on an entry that waits for a later batch waits with it.
        used = {key: hits for key, hits in self._used.items() if key not in self._pending}
        for key in used:
            del self._used[key]
        self._writing = taken
        try:
            await self._entries.write(_changes(taken, used))
        except StorageBusy as error:
            self._on_error("write", error)
            self._take_back(taken, used)
            return False
        except StorageError as error:
            self._on_error("write", error)
        except asyncio.CancelledError:
            self._take_back(taken, used)
            raise
        finally:
            self._writing = {}
            self._pending_bytes = sum(map(_weight, self._pending.values()))
        return True

    def _take_back(self, taken: dict[bytes, Entry | None], used: dict[bytes, tuple[int, int]]) -> None:
        for key, (count, last_ms) in used.items():
            # An entry that was replaced meanwhile begins at no hits.
            if key not in self._pending:
                more, later_ms = self._used.get(key, (0, 0))
                self._used[key] = (count + more, max(last_ms, later_ms))
        self._pending = taken | self._pending


@asynccontextmanager
async def write_behind(
    entries: Entries,
    on_error: OnError,
    *,
    flush_s: float,
    max_pending_bytes: int,
    presence: Presence | None = None,
) -> AsyncIterator[WriteBehind]:
    """Run a `WriteBehind` for the life of this block; leaving it writes what still waits."""
    buffer = WriteBehind(entries, on_error, flush_s=flush_s, max_pending_bytes=max_pending_bytes, presence=presence)
    task = asyncio.create_task(buffer.run(), name="nearhit-flush")
    try:
        yield buffer
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await buffer.flush()


def _weight(entry: Entry | None) -> int:
    return 0 if entry is None else ROW_BYTES + len(entry.answer) + len(entry.words or "")


def _changes(taken: dict[bytes, Entry | None], used: dict[bytes, tuple[int, int]]) -> list[Change]:
    changes: list[Change] = [Delete(key) if entry is None else Put(entry) for key, entry in taken.items()]
    changes.extend(Used(key, count, now_ms) for key, (count, now_ms) in used.items())
    return changes
