"""What happened a moment ago, bounded. Pure."""

from __future__ import annotations

from collections import OrderedDict

_REMEMBERED = 4096


class Lately:
    """When something last happened to each of the last keys."""

    def __init__(self, window_ms: int) -> None:
        """What is `window_ms` old has happened long ago; with 0, everything has."""
        self._window_ms = window_ms
        self._last: OrderedDict[bytes, int] = OrderedDict()

    def note(self, key: bytes, now_ms: int) -> None:
        """It happens now."""
        self._last.pop(key, None)
        self._last[key] = now_ms
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)

    def happened(self, key: bytes, now_ms: int) -> bool:
        """Whether it happened a moment ago."""
        last_ms = self._last.get(key)
        return self._window_ms > 0 and last_ms is not None and 0 <= now_ms - last_ms <= self._window_ms


class Repeats:
    """Which requests came a moment ago: the same one again means "try again"."""

    def __init__(self, window_ms: int) -> None:
        """A repeat within `window_ms` is a retry; with 0, none is."""
        self._asks = window_ms > 0
        self._lately = Lately(window_ms)

    def is_retry(self, repeat: bytes, now_ms: int) -> bool:
        """Whether the request that `repeat` identifies was noted a moment ago; notes it."""
        if not self._asks:
            return False
        retry = self._lately.happened(repeat, now_ms)
        self._lately.note(repeat, now_ms)
        return retry
