"""The clocks."""

from __future__ import annotations

import time


def now_ms() -> int:
    """The clock on the wall: ms since the epoch."""
    return time.time_ns() // 1_000_000


def counted_ms() -> int:
    """A clock that nobody sets: ms since some moment, sleep included where the system counts it."""
    # Where a system has no clock that counts while it sleeps, waking up looks like a jump, which costs nothing.
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000
