"""Leases in a small SQLite file beside the store's own; see `storage.leases`.

The file is opened once there is somebody to agree with. All of it happens in one thread of its own, and nobody waits
for that longer than `PATIENCE_S`; after trouble, it is left alone for `REST_S`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from storage.base import StorageBusy, StorageCorrupt, StorageError, StorageRefused, StorageUnavailable
from storage.lease_file import LeaseFile, open_lease_file
from storage.leases import RENEW_MS, TERM_MS, Apart, Standing, Taken
from storage.neighbours import Neighbours
from storage.sqlite_file import our_errors, refuse_network
from storage.write_behind import OnError

log = logging.getLogger("nearhit.storage")

LOOK_S = 1.0
"""How often it is looked who else is there."""
PATIENCE_S = 0.5
REST_S = 5.0
_SWEEP_LOOKS = 60

T = TypeVar("T")


class SqliteLeases:
    """A `storage.leases.Leases`, for as long as the block of `open_leases` lasts."""

    def __init__(self, database: Path, clock_ms: Callable[[], int], on_error: OnError, *, always: bool) -> None:
        """See `open_leases`."""
        self._database = database
        self._path = database.with_name(f"{database.name}.leases")
        self._lock = database.with_name(f"{database.name}.lock")
        self._clock_ms = clock_ms
        self._on_error = on_error
        self._always = always
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nearhit-leases")
        self._neighbours: Neighbours | None = None
        self._file: LeaseFile | None = None
        self._until_ms: dict[Taken, int] = {}
        self._rests_until_ms = 0
        self._refused = False
        self.shared = False
        """See `Leases`."""

    async def take(self, keys: Sequence[bytes], *, together: bool = False) -> Sequence[Standing]:
        """See `Leases.take`."""
        if not self.shared:
            return [Apart()] * len(keys)
        future = self._submit(lambda: self._taken(keys, together=together))
        try:
            standings, until_ms = await self._in_time(future)
        except StorageError as error:
            future.add_done_callback(self._give_back)
            self._failed(error)
            return [Apart()] * len(keys)
        except asyncio.CancelledError:
            future.add_done_callback(self._give_back)
            raise
        self._until_ms |= {one: until_ms for one in standings if isinstance(one, Taken)}
        return standings

    async def holds(self, leases: Collection[Taken]) -> Collection[Taken]:
        """See `Leases.holds`. Where the file cannot tell, the term can."""
        asked = [lease for lease in leases if lease in self._until_ms]
        if not asked:
            return ()
        try:
            self._learn(asked, *await self._in_time(self._submit(lambda: self._renewed(asked))))
        except StorageError as error:
            self._failed(error)
            now_ms = self._clock_ms()
            return [lease for lease in asked if now_ms < self._until_ms.get(lease, 0)]
        return [lease for lease in asked if lease in self._until_ms]

    async def release(self, leases: Collection[Taken], *, shareable: bool) -> None:
        """See `Leases.release`. What cannot be written now ends with its term."""
        held = [lease for lease in leases if self._until_ms.pop(lease, None) is not None]
        if not held:
            return
        try:
            await self._in_time(self._submit(lambda: self._released(held, shareable=shareable)))
        except StorageError as error:
            self._failed(error)

    async def look(self) -> None:
        """See who else is there, and renew what is held; done again and again while this is open."""
        due = [lease for lease, until_ms in self._until_ms.items() if until_ms - self._clock_ms() < TERM_MS - RENEW_MS]
        try:
            there = await self._submit(self._looked)
        except StorageError:
            # Then the store cannot be used either, which is told there.
            self.shared = False
            return
        try:
            if due:
                self._learn(due, *await self._submit(lambda: self._renewed(due)))
        except StorageError as error:
            self._failed(error)
        else:
            self.shared = there and not self._refused and self._clock_ms() >= self._rests_until_ms

    async def run(self) -> None:
        """Look again and again until cancelled."""
        for looks in range(1, 1 << 62):
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
                if looks % _SWEEP_LOOKS == 0 and self._file is not None:
                    await self._submit(self._swept)
            except StorageError as error:
                self._failed(error)
            except Exception as error:  # noqa: BLE001 - without this task, what is held would end with its term
                log.critical("looking after leases failed unexpectedly: %s", type(error).__name__)

    async def close(self) -> None:
        """Let go of everything."""
        self.shared = False
        with suppress(StorageError):
            await self._submit(self._left)
        await asyncio.to_thread(self._thread.shutdown)

    # What follows, down to the next such line, runs in the thread.

    def _looked(self) -> bool:
        with our_errors():
            if self._neighbours is not None and self._neighbours.lost():
                self._let_go()
            if self._neighbours is None:
                if not self._database.is_file():
                    raise StorageUnavailable(f"{self._database} is not there")
                refuse_network(self._lock)
                self._neighbours = Neighbours(self._lock)
            return self._always or self._neighbours.any()

    def _opened(self) -> LeaseFile:
        if self._neighbours is None:
            raise StorageUnavailable("leases are not open")
        if self._file is not None and self._file.lost():
            self._file.close()
            self._file = None
        if self._file is None:
            self._file = open_lease_file(self._path, self._neighbours, self._clock_ms)
        return self._file

    def _taken(self, keys: Sequence[bytes], *, together: bool) -> tuple[list[Standing], int]:
        now_ms = self._clock_ms()
        return self._with_file(lambda file: file.take(keys, together=together)), now_ms + TERM_MS

    def _renewed(self, leases: Sequence[Taken]) -> tuple[frozenset[Taken], int]:
        now_ms = self._clock_ms()
        return self._with_file(lambda file: file.renew(leases)), now_ms + TERM_MS

    def _released(self, leases: Sequence[Taken], *, shareable: bool) -> None:
        self._with_file(lambda file: file.release(leases, shareable=shareable))

    def _swept(self) -> None:
        self._with_file(lambda file: file.sweep())

    def _with_file(self, work: Callable[[LeaseFile], T]) -> T:
        try:
            return work(self._opened())
        except StorageCorrupt:
            # Whoever opens it next makes it anew.
            if self._file is not None:
                self._file.close()
                self._file = None
            raise

    def _left(self) -> None:
        try:
            if self._file is not None:
                self._file.leave()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._neighbours is not None:
            self._neighbours.close()
        self._file = self._neighbours = None

    # What follows runs in the event loop.

    def _learn(self, leases: Sequence[Taken], kept: frozenset[Taken], until_ms: int) -> None:
        for lease in leases:
            # It may have been released meanwhile.
            if self._until_ms.pop(lease, None) is not None and lease in kept:
                self._until_ms[lease] = until_ms

    def _submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _in_time(self, future: asyncio.Future[T]) -> T:
        # A thread cannot be interrupted: what it does too late is made undone.
        await asyncio.wait({future}, timeout=PATIENCE_S)
        if not future.done():
            raise StorageBusy("the leases take too long")
        return future.result()

    def _give_back(self, future: asyncio.Future[tuple[list[Standing], int]]) -> None:
        """Nobody waits for what was taken any more."""
        if future.cancelled() or future.exception() is not None:
            return
        standings, _ = future.result()
        taken = [one for one in standings if isinstance(one, Taken)]
        if taken:
            with suppress(RuntimeError):  # closed meanwhile
                self._thread.submit(lambda: self._released(taken, shareable=True))

    def _failed(self, error: StorageError) -> None:
        if isinstance(error, StorageRefused):
            self._refuse(error)
            return
        self.shared = False
        self._rests_until_ms = self._clock_ms() + round(REST_S * 1000)
        self._on_error("lease", error)

    def _refuse(self, error: StorageRefused) -> None:
        if not self._refused:
            log.warning("%s: equal requests at several nearhits are not joined", error)
        self._refused, self.shared = True, False


@asynccontextmanager
async def open_leases(
    database: Path, clock_ms: Callable[[], int], on_error: OnError, *, always: bool
) -> AsyncIterator[SqliteLeases]:
    """Leases for all who share a database, for the life of this block.

    `clock_ms` counts on and is shared by all processes of this machine. `on_error` gets `lease` and the error, each
    time something fails. Without `always`, they are used only while somebody else is there.
    """
    leases = SqliteLeases(database, clock_ms, on_error, always=always)
    task: asyncio.Task[None] | None = None
    try:
        await leases.look()
        task = asyncio.create_task(leases.run(), name="nearhit-leases")
        yield leases
    finally:
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await leases.close()
