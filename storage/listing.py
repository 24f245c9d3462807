"""Entries as people look for them: conditions, pages, and the Protocols that find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.base import Entry

MIN_PREFIX = 4
"""Bytes of a key that `Finding.find` needs at least."""


@dataclass(frozen=True, slots=True)
class Which:
    """Which entries are meant: those that meet every condition; None is no condition.

    `key_prefix` is in lower-case hexadecimal digits, any number. `text` occurs in the words or in the answer, whatever
    its case; of sealed answers, it is in none.
    """

    model: str | None = None
    endpoint: str | None = None
    namespace: bytes | None = None
    fingerprint: bytes | None = None
    stored_before_ms: int | None = None
    stored_after_ms: int | None = None
    text: str | None = None
    key_prefix: str | None = None
    sealed: bool | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry with what the store knows of it besides.

    `mark` is its place in the order in which entries came; `size` is that of the answer in bytes, whether or not
    `entry.answer` was asked for.
    """

    mark: int
    entry: Entry
    size: int
    hits: int
    used_ms: int


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing, and the mark to go on from; None where nothing is left to look at."""

    listed: tuple[Listed, ...]
    mark: int | None


class Finding(Protocol):
    """Entries found by what a person was shown of their key."""

    async def find(self, key_prefix: bytes, limit: int) -> list[Entry]:
        """At most `limit` entries, stale ones included, whose key begins with these bytes.

        Raises:
            ValueError: the prefix has fewer than `MIN_PREFIX` bytes.
        """
        ...


class Listing(Protocol):
    """Entries as a person lists them: stale ones included, what waits to be written not."""

    async def select(
        self, which: Which, mark: int, limit: int, *, newest_first: bool = False, answers: bool = False
    ) -> Page:
        """At most `limit` entries that came after `mark` (0: from the beginning), or before it, newest first.

        It looks at a bounded number of entries and reads a bounded number of bytes, so that a page may be short, or
        empty, and yet not the last. Without `answers`, those of the entries are empty, and of words longer than a
        thousand characters there is the beginning.
        """
        ...

    async def stored(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """When the entries of these keys were stored (ms), of those that there are."""
        ...
