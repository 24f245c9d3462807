"""Work that goes on beside requests, and begins again should it fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

log = logging.getLogger("nearhit")

_AGAIN_S = 1.0


@asynccontextmanager
async def in_background(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> AsyncIterator[None]:
    """Do the work in a task of this name for the life of this block."""
    task = asyncio.create_task(_kept_up(work, name), name=name)
    try:
        yield
    finally:
        # Work that fails while it is being cancelled would begin again.
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_AGAIN_S)


async def _kept_up(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Do the work to its end; where it fails in a way that nobody foresaw, tell and begin again."""
    while True:
        try:
            await work()
        except Exception as error:
            log.critical("%s failed and begins again", name, exc_info=error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return
