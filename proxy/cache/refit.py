"""A stream that was asked for by one caller, made over for another who joined it: with usage or without. Pure.

Chat and completions tell usage in an event of its own, before the end mark, to those who asked for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from proxy.cache.answer import decode
from proxy.cache.dialects.call import Json
from proxy.cache.dialects.choices import usage_of_timings

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\r?\n|\r\r")
_DATA = re.compile(rb"(?:(?:event|id|retry|):[^\r\n]*(?:\r\n|\n|\r))*data: ?")
_END = b"[DONE]"


class Refit:
    """Feed it the bytes as they come; it gives those for the other caller."""

    def __init__(self, *, wants_usage: bool) -> None:
        """For one who wants usage from a stream that tells none, or the reverse."""
        self._wants_usage = wants_usage
        self._rest = b""
        self._last: dict[str, Json] = {}

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes; those of the events that they complete, made over."""
        # Of what was there before, only the last bytes can belong to a blank line that ends in this chunk.
        place, begin, events = max(0, len(self._rest) - 3), 0, []
        self._rest += chunk
        for blank in _BLANK_LINE.finditer(self._rest, place):
            events.append(self._rest[begin : blank.end()])
            begin = blank.end()
        self._rest = self._rest[begin:]
        return b"".join(self._made_over(events))

    def end(self) -> bytes:
        """What is left of an event that was not ended."""
        return self._rest

    def _made_over(self, events: Iterable[bytes]) -> Iterator[bytes]:
        for event in events:
            data = _data(event)
            if self._wants_usage:
                yield self._usage_before(data)
                yield event
            elif not _tells_only_usage(data):
                yield event

    def _usage_before(self, data: bytes | None) -> bytes:
        if data == _END:
            # Completions of some servers tell it in any case, in their last event.
            usage = usage_of_timings(self._last.get("timings")) if self._last.get("usage") is None else {}
            if not usage:
                return b""
            shown = {k: v for k, v in self._last.items() if k not in ("choices", "timings", "usage")}
            return b"data: %b\n\n" % json.dumps({**shown, "choices": [], **usage}, separators=(",", ":")).encode(
                "ascii"
            )
        event = _object(data)
        if event is not None:
            self._last = event
        return b""


def _data(event: bytes) -> bytes | None:
    # Whoever sends an event in several lines of data does not speak of usage in it.
    begin = _DATA.match(event)
    return event[begin.end() :].rstrip() if begin else None


def _tells_only_usage(data: bytes | None) -> bool:
    event = _object(data) if data is not None and b'"usage"' in data else None
    return event is not None and event.get("choices") == [] and isinstance(event.get("usage"), dict)


def _object(data: bytes | None) -> dict[str, Json] | None:
    try:
        event = decode((data or b"").decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
