"""Which other words stored answers were served for lately: what a "that was wrong" is about."""

from __future__ import annotations

from collections import OrderedDict

from storage.base import Entry

_ENTRIES = 1024
_WORDS = 8
_LONGEST = 10_000


class Served:
    """The words of the last near hits by entry, bounded."""

    def __init__(self) -> None:
        """Nothing was served yet."""
        self._words: OrderedDict[bytes, list[str]] = OrderedDict()

    def note(self, entry: Entry, words: str) -> None:
        """The entry was served for these words."""
        asked = self._words.setdefault(entry.key, [])
        if words not in asked and len(words) <= _LONGEST:
            asked.append(words)
            del asked[:-_WORDS]
        self._words.move_to_end(entry.key)
        while len(self._words) > _ENTRIES:
            self._words.popitem(last=False)

    def of(self, key: bytes) -> list[str]:
        """The words that the entry of this key was served for."""
        return list(self._words.get(key, ()))
