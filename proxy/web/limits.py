"""How much one client may ask: requests at a time, and in a minute. Pure: whoever calls brings the time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

_MINUTE_S = 60.0
_ROUNDING = 1e-9


class Limit(StrEnum):
    """Which of a client's limits was reached; the names are those of its options."""

    CONCURRENCY = "max_concurrency"
    RATE = "requests_per_minute"


@dataclass(frozen=True, slots=True)
class Limited:
    """A request that may not be served now; `retry_after_s` is when to come again, in whole seconds."""

    limit: Limit
    retry_after_s: int


class Allowance:
    """What one client may still do. Its rate is a token bucket: full at first, as large as what a minute refills."""

    __slots__ = ("_as_of_s", "_max_concurrency", "_per_minute", "_tokens", "in_flight")

    def __init__(self, requests_per_minute: int, max_concurrency: int) -> None:
        """0 is no limit."""
        self._per_minute = requests_per_minute
        self._max_concurrency = max_concurrency
        self._tokens = float(requests_per_minute)
        self._as_of_s = -math.inf
        self.in_flight = 0
        """Requests that have entered and not left."""

    def enter(self, now_s: float) -> Limited | None:
        """Begin a request at this time of a steady clock, in seconds; one that is refused costs nothing."""
        if self._max_concurrency and self.in_flight >= self._max_concurrency:
            # When a running one ends, nobody knows.
            return Limited(Limit.CONCURRENCY, 1)
        if self._per_minute:
            wait_s = self._wait_s(now_s)
            if wait_s > 0:
                return Limited(Limit.RATE, math.ceil(wait_s))
            self._tokens -= 1
        self.in_flight += 1
        return None

    def leave(self) -> None:
        """End a request that was let in."""
        self.in_flight -= 1

    def _wait_s(self, now_s: float) -> float:
        refilled = max(0.0, now_s - self._as_of_s) * self._per_minute / _MINUTE_S
        self._tokens = min(float(self._per_minute), self._tokens + refilled)
        self._as_of_s = max(now_s, self._as_of_s)
        lacking = 1 - self._tokens
        return lacking * _MINUTE_S / self._per_minute if lacking > _ROUNDING else 0.0
