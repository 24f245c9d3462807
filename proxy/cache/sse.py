"""Server-sent events, split from bytes that arrive in any pieces (WHATWG HTML, section 9.2.6). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\r?\n|\r\r")
_ONE_EVENT = re.compile(rb"data: [^\r\n]*\n\n")
"""One event in one piece, as servers send them while they generate."""
_LINE = re.compile(r"\r\n|\n|\r")


class EventSplitter:
    """Yields the data of each complete event; None for an event of unknown fields (some servers say `error: ...`)."""

    def __init__(self) -> None:
        """Begin between two events."""
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str | None]:
        """Take the next bytes; yields what they complete.

        Raises:
            UnicodeDecodeError: an event is not UTF-8.
        """
        if not self._rest and _ONE_EVENT.fullmatch(chunk):
            yield chunk[6:-2].decode("utf-8")
            return
        *complete, self._rest = _BLANK_LINE.split(self._rest + chunk if self._rest else chunk)
        for event in complete:
            yield from _data(event)

    def end(self) -> Iterator[str | None]:
        """What the last, unended event would have said: some servers leave out the last blank line."""
        rest, self._rest = self._rest, b""
        yield from _data(rest)


def _data(event: bytes) -> Iterator[str | None]:
    data: list[str] = []
    for line in _LINE.split(event.decode("utf-8")):
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif field not in ("", "event", "id", "retry"):
            yield None
    if data:
        yield "\n".join(data)
