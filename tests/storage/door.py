"""A real store that a test can hold up and make fail, to stand behind a `WriteBehind`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storage.base import Candidate, Change, Entry, Room, StorageError
from storage.store import Store


class Door:
    """A real store behind a door that can be shut, and that fails on demand."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.open = asyncio.Event()
        self.open.set()
        self.arrived = asyncio.Event()
        self.failures: list[StorageError] = []
        self.read_failures: list[StorageError] = []
        self.batches: list[list[Change]] = []

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        await self._pass()
        if self.read_failures:
            raise self.read_failures.pop(0)
        return await self.store.get(key, now_ms)

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        await self._pass()
        if self.read_failures:
            raise self.read_failures.pop(0)
        return await self.store.candidates(space, keys, now_ms, per_key=per_key, limit=limit)

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        if self.read_failures:
            raise self.read_failures.pop(0)
        return await self.store.vetoed(pairs)

    async def write(self, changes: Sequence[Change], room: Room | None = None) -> int:
        await self._pass()
        if self.failures:
            raise self.failures.pop(0)
        evicted = await self.store.write(changes, room)
        self.batches.append(list(changes))
        return evicted

    def shut(self) -> None:
        self.open.clear()
        self.arrived.clear()

    async def _pass(self) -> None:
        self.arrived.set()
        await self.open.wait()


class OnErrorToList:
    def __init__(self, errors: list[tuple[str, type[StorageError]]]) -> None:
        self._errors = errors

    def __call__(self, operation: str, error: StorageError) -> None:
        self._errors.append((operation, type(error)))
