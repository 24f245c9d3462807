"""Whether the clock can be believed: boxes without a battery start in the past, and jump once they know. Pure."""

from __future__ import annotations

_JUMP_MS = 60_000
"""Less is a correction that every clock gets now and then."""


class Steadiness:
    """Compares the clock with one that only counts: it is steady once both went on alike for `settle_ms`."""

    def __init__(self, settle_ms: int) -> None:
        """Nothing is known of the clock yet."""
        self._settle_ms = settle_ms
        self._offset_ms: int | None = None
        self._since_ms = 0

    def is_steady(self, now_ms: int, counted_ms: int) -> bool:
        """Take a look at both at one moment: `now_ms` of the clock, `counted_ms` since any fixed time."""
        offset_ms = now_ms - counted_ms
        if self._offset_ms is None or abs(offset_ms - self._offset_ms) > _JUMP_MS:
            self._offset_ms, self._since_ms = offset_ms, counted_ms
        return counted_ms - self._since_ms >= self._settle_ms
