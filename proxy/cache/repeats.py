"""Which requests came a moment ago: the same one again means "try again". Pure."""

from __future__ import annotations

from collections import OrderedDict

_REMEMBERED = 4096


class Repeats:
    """The times of the last requests."""

    def __init__(self, window_ms: int) -> None:
        """A repeat within `window_ms` is a retry; with 0, none is."""
        self._window_ms = window_ms
        self._last: OrderedDict[bytes, int] = OrderedDict()

    def is_retry(self, repeat: bytes, now_ms: int) -> bool:
        """Whether the request that `repeat` identifies was noted a moment ago; notes it."""
        if self._window_ms <= 0:
            return False
        last_ms = self._last.pop(repeat, None)
        self._last[repeat] = now_ms
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        return last_ms is not None and 0 <= now_ms - last_ms <= self._window_ms
