"""Large answers with vectors, taken apart while they arrive, so that their end takes no longer than another's. Pure."""

from __future__ import annotations

import re

from msgspec import Raw

from proxy.cache.dialects.laying import BROKEN, Laid, fields_of, laid_of, lay_out
from proxy.cache.policy import Drop

_BEGIN = re.compile(rb'"data"[ \t\n\r]*:[ \t\n\r]*\[(?=[ \t\n\r]*\{)')
_NEXT = re.compile(rb"[ \t\n\r]*(,?)[ \t\n\r]*([^ \t\n\r]?)")
_LONGEST = 65_536
"""Bytes before the first item, or blanks after one, beyond which an answer is taken apart when it is whole."""
_MOST_BRACES = 1_000
"""In one item, that do not end it: beyond, an answer is taken apart when it is whole."""
_MARK = b'"these items"'
"""Stands for the items where they were taken out."""


class Arriving:
    """An answer for `expected` items, of which the items that are there are taken out.

    An item ends with a brace before another's beginning or the end of the list, and has to be an object by itself; what
    is left over has to be an object with this list as its `data`: then the answer is what these make together. One that
    this is not true of, an error for example, is taken apart when it is whole.
    """

    def __init__(self, expected: int) -> None:
        """Nothing has come yet."""
        self._expected = expected
        self._chunks: list[bytes] = []
        self._rest = bytearray()
        self._looked = 0
        self._braces = 0
        self._head: bytes | None = None
        self._items: list[dict[str, Raw]] = []
        self._ended = False
        self._odd = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._chunks.append(chunk)
        if self._odd:
            return
        self._rest += chunk
        try:
            while self._step():
                pass
        except BROKEN:
            self._odd = True
        if self._odd:
            self._rest.clear()
            self._items.clear()

    def finish(self) -> Laid | Drop:
        """What `lay_out` makes of all that came."""
        together = self._together() if self._ended and not self._odd else None
        return together or lay_out(b"".join(self._chunks), self._expected)

    def _step(self) -> bool:
        """Take one thing out of what is there; whether there may be more."""
        if self._odd or self._ended:
            return False
        return self._take_head() if self._head is None else self._take_item()

    def _take_head(self) -> bool:
        begin = _BEGIN.search(self._rest)
        if begin is None:
            self._odd = len(self._rest) > _LONGEST
            return False
        self._head = bytes(self._rest[: begin.end()])
        del self._rest[: begin.end()]
        return True

    def _take_item(self) -> bool:
        brace = self._rest.find(b"}", self._looked)
        if brace < 0:
            self._looked = len(self._rest)
            return False
        follows = _NEXT.match(self._rest, brace + 1)
        comma, sign = follows.groups() if follows else (b"", b"")
        if not sign:
            # It may follow yet.
            self._looked, self._odd = brace, len(self._rest) - brace > _LONGEST
            return False
        self._looked, self._ended = brace + 1, not comma and sign == b"]"
        if follows and (self._ended or (comma and sign == b"{")):
            self._items.append(fields_of(bytes(self._rest[: brace + 1])))
            self._odd = len(self._items) > self._expected
            del self._rest[: follows.start(2)]
            self._looked = self._braces = 0
        else:
            self._braces += 1
            self._odd = self._braces > _MOST_BRACES
        return True

    def _together(self) -> Laid | None:
        left = (self._head or b"") + _MARK + bytes(self._rest)
        try:
            fields = fields_of(left)
            # The mark may stand where only something else looked like the list, or more than once.
            is_ours = left.count(_MARK) == 1 and bytes(fields.get("data", b"")) == b"[" + _MARK + b"]"
            if is_ours and bytes(fields.get("error", b"null")) == b"null":
                return laid_of(fields, self._items, self._expected)
        except BROKEN:
            pass
        return None
