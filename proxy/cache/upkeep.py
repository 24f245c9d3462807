"""Expired entries go, and bounds hold, in small steps with pauses, never in somebody's request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from proxy.cache.steady import Steadiness
from storage.base import Bounds, Room, StorageError

_STEP = 200
_PAUSE_S = 0.02
_STEP_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Clocks:
    """`now_ms` is the time; `counted_ms` only counts, the time that the machine sleeps included."""

    now_ms: Callable[[], int]
    counted_ms: Callable[[], int]


class Upkeep:
    """Sweeps a store every `every_s` seconds, where no other process does so."""

    def __init__(
        self,
        bounds: Bounds,
        room: Room,
        *,
        clocks: Clocks,
        evicted: Callable[[str, int], None],
        failed: Callable[[str, StorageError], None],
        every_s: float,
        settle_s: float,
    ) -> None:
        """`evicted` hears the reason and number of entries removed; `failed` of errors, which end a sweep.

        What has expired is not served, but only removed once the clock has run steadily for `settle_s` seconds: by a
        clock that is ahead for a while, all would be lost.
        """
        self._bounds = bounds
        self._room = room
        self._clocks = clocks
        self._steadiness = Steadiness(round(settle_s * 1000))
        self._evicted = evicted
        self._failed = failed
        self._every_s = every_s

    async def run(self) -> None:
        """Sweep again and again until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.sweep()

    async def sweep(self) -> None:
        """Remove what has expired, then what exceeds the bounds, and give back the space."""
        # Asked once: a clock that jumps in the middle of a sweep takes nothing along.
        now_ms = self._clocks.now_ms()
        steady = self._steadiness.is_steady(now_ms, self._clocks.counted_ms())
        try:
            if not await self._bounds.leads():
                return
            if steady:
                await self._steps("expired", lambda: self._bounds.expire(now_ms, _STEP))
            await self._steps("bound", lambda: self._bounds.trim(self._room, _STEP))
            while await self._bounds.give_back(_STEP_BYTES):  # noqa: ASYNC110 - a pause, nothing is waited for
                await asyncio.sleep(_PAUSE_S)
        except StorageError as error:
            self._failed("upkeep", error)

    async def _steps(self, reason: str, step: Callable[[], Awaitable[int]]) -> None:
        while removed := await step():
            self._evicted(reason, removed)
            await asyncio.sleep(_PAUSE_S)
