"""Expired entries go, and bounds hold, in small steps with pauses, never in somebody's request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from storage.base import Bounds, StorageError

_STEP = 200
_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Limits:
    """What the store may grow to."""

    max_entries: int
    max_bytes: int


class Upkeep:
    """Sweeps a store every `every_s` seconds."""

    def __init__(
        self,
        bounds: Bounds,
        limits: Limits,
        *,
        now_ms: Callable[[], int],
        evicted: Callable[[str, int], None],
        failed: Callable[[str, StorageError], None],
        every_s: float,
    ) -> None:
        """`evicted` hears the reason and number of entries removed; `failed` of errors, which end a sweep."""
        self._bounds = bounds
        self._limits = limits
        self._now_ms = now_ms
        self._evicted = evicted
        self._failed = failed
        self._every_s = every_s

    async def run(self) -> None:
        """Sweep again and again until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.sweep()

    async def sweep(self) -> None:
        """Remove what has expired, then what exceeds the bounds."""
        limits = self._limits
        try:
            await self._steps("expired", lambda: self._bounds.expire(self._now_ms(), _STEP))
            await self._steps("bound", lambda: self._bounds.trim(limits.max_entries, limits.max_bytes, _STEP))
        except StorageError as error:
            self._failed("upkeep", error)

    async def _steps(self, reason: str, step: Callable[[], Awaitable[int]]) -> None:
        while removed := await step():
            self._evicted(reason, removed)
            await asyncio.sleep(_PAUSE_S)
