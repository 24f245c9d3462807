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
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[str | None]:
        """Take the next bytes; yields what they complete.

        Raises:
            UnicodeDecodeError: an event is not UTF-8.
        """
        if not self._rest and _ONE_EVENT.fullmatch(chunk):
            yield chunk[6:-2].decode("utf-8")
            return
        # Of what was there before, only the last bytes can belong to a blank line that ends in this chunk.
        begin, place = 0, max(0, len(self._rest) - 3)
        self._rest += chunk
        while (blank := _BLANK_LINE.search(self._rest, place)) is not None:
            event, (_, place) = bytes(self._rest[begin : blank.start()]), blank.span()
            begin = place
            del blank  # a match keeps the buffer from being changed
            yield from _data(event)
        del self._rest[:begin]

    def end(self) -> Iterator[str | None]:
        """What the last, unended event would have said: some servers leave out the last blank line."""
        rest, self._rest = bytes(self._rest), bytearray()
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
