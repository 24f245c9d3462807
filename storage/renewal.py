"""A store that is opened again when its data turned out corrupt or its file was taken away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeVar

from storage.base import (
    Candidate,
    Change,
    Entry,
    Room,
    StorageCorrupt,
    StorageError,
    StorageRefused,
    StorageUnavailable,
    Totals,
    Unsketched,
)
from storage.listing import Page, Which
from storage.store import Store

log = logging.getLogger("nearhit.storage")

Opener = Callable[[bool], AbstractAsyncContextManager[Store]]
"""Opens a store; the argument says that the data is suspect and must be checked through."""

T = TypeVar("T")


class RenewableStore:
    """A `storage.store.Store` that stands for whichever store is open now; between two, it is unavailable."""

    def __init__(self) -> None:
        """Begin without a store; `renewable` opens the first."""
        self.current: Store | None = None
        self._followed: Store | None = None
        self.suspect = asyncio.Event()
        self.trouble = ""
        """Why there is none now, for people; empty while one is open."""

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """See `Entries.get`."""
        return await self._on_current(lambda store: store.get(key, now_ms))

    async def write(self, changes: Sequence[Change], room: Room | None = None) -> int:
        """See `Entries.write`."""
        return await self._on_current(lambda store: store.write(changes, room))

    async def keys_after(self, mark: int, limit: int) -> tuple[int, list[bytes]]:
        """See `Keys.keys_after`."""
        if mark and self._followed is not self.current:
            self._followed = None
            raise StorageUnavailable("the store was opened anew")
        self._followed = self.current
        return await self._on_current(lambda store: store.keys_after(mark, limit))

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """See `Sketches.candidates`."""
        return await self._on_current(lambda store: store.candidates(space, keys, now_ms, per_key=per_key, limit=limit))

    async def unsketched(self, scheme: int, limit: int) -> list[Unsketched]:
        """See `Sketches.unsketched`."""
        return await self._on_current(lambda store: store.unsketched(scheme, limit))

    async def record_scheme(self, scheme: int, description: str, now_ms: int) -> None:
        """See `Sketches.record_scheme`."""
        await self._on_current(lambda store: store.record_scheme(scheme, description, now_ms))

    async def schemes(self) -> dict[int, str]:
        """See `Sketches.schemes`."""
        return await self._on_current(lambda store: store.schemes())

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """See `Vetoes.vetoed`."""
        return await self._on_current(lambda store: store.vetoed(pairs))

    async def veto(self, pairs: Sequence[bytes], now_ms: int) -> None:
        """See `Vetoes.veto`."""
        await self._on_current(lambda store: store.veto(pairs, now_ms))

    async def expire(self, now_ms: int, limit: int) -> int:
        """See `Bounds.expire`."""
        return await self._on_current(lambda store: store.expire(now_ms, limit))

    async def trim(self, room: Room, limit: int) -> int:
        """See `Bounds.trim`."""
        return await self._on_current(lambda store: store.trim(room, limit))

    async def leads(self) -> bool:
        """See `Bounds.leads`."""
        return await self._on_current(lambda store: store.leads())

    async def give_back(self, limit: int) -> int:
        """See `Bounds.give_back`."""
        return await self._on_current(lambda store: store.give_back(limit))

    async def rewrite(self) -> None:
        """See `Shredding.rewrite`."""
        await self._on_current(lambda store: store.rewrite())

    async def replaced_elsewhere(self) -> bool:
        """See `Coherence.replaced_elsewhere`; True for each store that is opened."""
        return await self._on_current(lambda store: store.replaced_elsewhere())

    async def announce(self) -> None:
        """See `Coherence.announce`."""
        await self._on_current(lambda store: store.announce())

    async def select(
        self, which: Which, mark: int, limit: int, *, newest_first: bool = False, answers: bool = False
    ) -> Page:
        """See `Listing.select`."""
        return await self._on_current(
            lambda store: store.select(which, mark, limit, newest_first=newest_first, answers=answers)
        )

    async def stored(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """See `Listing.stored`."""
        return await self._on_current(lambda store: store.stored(keys))

    async def fact(self, upstream: str, name: str) -> str | None:
        """See `Facts.fact`."""
        return await self._on_current(lambda store: store.fact(upstream, name))

    async def note(self, upstream: str, name: str, value: str, now_ms: int) -> None:
        """See `Facts.note`."""
        await self._on_current(lambda store: store.note(upstream, name, value, now_ms))

    async def find(self, key_prefix: bytes, limit: int) -> list[Entry]:
        """See `Finding.find`."""
        return await self._on_current(lambda store: store.find(key_prefix, limit))

    async def totals(self) -> Totals:
        """See `Inspection.totals`."""
        return await self._on_current(lambda store: store.totals())

    async def problems(self) -> list[str]:
        """See `Inspection.problems`."""
        return await self._on_current(lambda store: store.problems())

    async def lost(self) -> bool:
        """See `Inspection.lost`."""
        return await self._on_current(lambda store: store.lost())

    async def _on_current(self, call: Callable[[Store], Awaitable[T]]) -> T:
        if self.current is None:
            raise StorageUnavailable(self.trouble or "the store is being opened again")
        try:
            return await call(self.current)
        except (StorageCorrupt, StorageRefused):
            self.suspect.set()
            raise


@asynccontextmanager
async def renewable(opener: Opener, *, watch_s: float, retry_s: float) -> AsyncIterator[RenewableStore]:
    """Hold a store open for the life of this block, opening it anew when it proves corrupt or its file is gone.

    The file is looked for every `watch_s` seconds; a renewal that fails is tried again after `retry_s`.

    While it cannot be opened, from the first time on, every use raises `StorageUnavailable`.

    Raises:
        StorageRefused: at the first opening; later refusals are logged and tried again.
    """
    store = RenewableStore()
    opened = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(_keep(store, opener, opened, watch_s, retry_s), name="nearhit-store")
    try:
        await asyncio.wait({task, opened}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield store
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, StorageError):
            await task


async def _keep(
    store: RenewableStore, opener: Opener, opened: asyncio.Future[None], watch_s: float, retry_s: float
) -> None:
    suspect = False
    while True:
        try:
            async with opener(suspect) as store.current:
                store.suspect.clear()
                store.trouble = ""
                if not opened.done():
                    opened.set_result(None)
                suspect = await _until_unusable(store, watch_s)
        except StorageError as error:
            if isinstance(error, StorageRefused) and not opened.done():
                raise
            if not opened.done():
                opened.set_result(None)
            if str(error) != store.trouble:
                log.error("the store cannot be opened, answers are kept in memory only: %s", error)
            store.trouble = str(error)
            await asyncio.sleep(retry_s)
        except Exception as error:
            if not opened.done():
                raise
            # Whatever the data made of our code, without this task no store would ever be opened again.
            store.trouble = f"the store cannot be used ({type(error).__name__})"
            log.critical("%s: checking it and opening it again", store.trouble, exc_info=error)
            suspect = True
            await asyncio.sleep(retry_s)
        finally:
            store.current = None


async def _until_unusable(store: RenewableStore, watch_s: float) -> bool:
    """Whether the data is suspect (True) or the file is gone (False), once it is one of them."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(watch_s):
                await store.suspect.wait()
                log.error("the store is corrupt or was taken over: checking it and opening it again")
                return True
        # Corrupt data has been noted as such; what is locked now is looked at again.
        with suppress(StorageCorrupt, StorageUnavailable):
            if await store.lost():
                log.error("the database file was deleted or replaced: going on with a new one")
                return False
