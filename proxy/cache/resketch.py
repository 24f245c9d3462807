"""Entries without a sketch, or with one of another scheme, get one in the background, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from proxy.cache.near.matcher import Matcher
from storage.base import Change, Sketched, StorageError, Unsketched

_BATCH = 32
_PAUSE_S = 0.05
_RETRY_S = 5.0
_AGAIN_S = 5.0


class Sketches(Protocol):
    """What this needs of storage."""

    async def leads(self) -> bool:
        """Whether the upkeep is this process's."""
        ...

    async def unsketched(self, scheme: int, limit: int) -> list[Unsketched]:
        """Entries that have no sketch of this scheme."""
        ...

    async def record_scheme(self, scheme: int, description: str, now_ms: int) -> None:
        """Note what a scheme is, for people."""
        ...

    async def write(self, changes: Sequence[Change]) -> int:
        """Apply all changes, or none."""
        ...


class Resketcher:
    """Keeps the sketches of a store up to date."""

    def __init__(
        self,
        store: Sketches,
        matcher: Matcher,
        *,
        now_ms: Callable[[], int],
        failed: Callable[[str, StorageError], None],
    ) -> None:
        """Make them as `matcher` does; `failed` hears of errors, which are tried again."""
        self._store = store
        self._matcher = matcher
        self._now_ms = now_ms
        self._failed = failed

    async def run(self) -> None:
        """Make what is missing, again and again until cancelled.

        Two versions of nearhit on one file would make each other's sketches anew for ever, but one of them leads.
        """
        recorded = False
        while True:
            try:
                if not recorded:
                    await self._store.record_scheme(self._matcher.scheme, self._matcher.description, self._now_ms())
                    recorded = True
                if await self._store.leads():
                    await self._catch_up()
            except StorageError as error:
                self._failed("sketch", error)
                await asyncio.sleep(_RETRY_S)
            else:
                await asyncio.sleep(_AGAIN_S)

    async def _catch_up(self) -> None:
        while await self.step():  # noqa: ASYNC110 - a pause between steps, nothing is waited for
            await asyncio.sleep(_PAUSE_S)

    async def step(self) -> int:
        """Sketch a few entries; how many."""
        entries = await self._store.unsketched(self._matcher.scheme, _BATCH)
        if entries:
            await self._store.write(await asyncio.to_thread(self._sketched, entries))
        return len(entries)

    def _sketched(self, entries: Sequence[Unsketched]) -> list[Change]:
        prepare, sketch = self._matcher.prepare, self._matcher.sketch
        return [Sketched(entry.key, sketch(prepare(entry.words), entry.space)) for entry in entries]
