"""What other processes did to the store, and what earlier settings left in it, must not be served from here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from storage.base import Coherence, Delete, Entries, Facts, StorageError
from storage.listing import Listing, Which

log = logging.getLogger("nearhit")

FOLLOW_S = 0.25
_RETRY_S = 5.0
_PAUSE_S = 0.02
_STEP = 200
_TRACES = ("", "readable-traces")
"""The fact that tells, over a restart, that what was removed may still be found in the file."""


async def follow(store: Coherence, forget: Callable[[], None]) -> None:
    """Call `forget` whenever somebody else removed or replaced entries, until cancelled."""
    while True:
        # Without a store, memory is all there is; what happened meanwhile is told by the first answer after.
        try:
            with suppress(StorageError):
                if await store.replaced_elsewhere():
                    forget()
        except Exception:
            # Whoever cannot tell must not go on serving from memory.
            forget()
            raise
        await asyncio.sleep(FOLLOW_S)


class Readable(Entries, Listing, Facts, Protocol):
    """What forgetting needs of storage."""

    async def rewrite(self) -> None:
        """Write everything anew."""
        ...


async def forget_readable(store: Readable, now_ms: Callable[[], int]) -> None:
    """Remove all entries that are not sealed, and what is left of them in the file; tried again until done."""
    while True:
        try:
            removed = await _forget_readable(store, now_ms())
        except StorageError as error:
            log.warning("answers that can be read could not be removed yet: %s", error)
            await asyncio.sleep(_RETRY_S)
        else:
            if removed:
                log.info("cache.store_words is digest: %d answers that could be read were removed", removed)
            return


async def _forget_readable(store: Readable, now_ms: int) -> int:
    removed = 0
    traces = await store.fact(*_TRACES) == "yes"
    mark: int | None = 0
    while mark is not None:
        page = await store.select(Which(sealed=False), mark, _STEP)
        if page.listed:
            if not traces:
                await store.note(*_TRACES, "yes", now_ms)
                traces = True
            await store.write([Delete(listed.entry.key) for listed in page.listed])
        removed += len(page.listed)
        mark = page.mark
        await asyncio.sleep(_PAUSE_S)
    if traces:
        await store.rewrite()
        await store.note(*_TRACES, "no", now_ms)
    return removed
