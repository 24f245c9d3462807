"""Large files, filled with plain SQL: many times faster than by the store, which is what it is compared with."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench.messages import MODEL, answer, numbered
from storage.base import Entry
from storage.sqlite import open_sqlite
from storage.sqlite_file import connect
from storage.worth import gain

HOUR_MS = 3_600_000

_FIELDS = tuple(field for field in Entry.__slots__ if field != "answer")
_COLUMNS = ("id", *_FIELDS, "size", "used_ms", "hits", "worth")
_ENTRY = f"INSERT INTO entry ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_BODY = "INSERT INTO body (entry, answer) VALUES (?, ?)"
_TRANSACTION = 50_000
_CACHE_KIB = 512 * 1024
_SPACE = hashlib.sha256(b"space").digest()
_FINGERPRINT = hashlib.sha256(MODEL.encode()).digest()
_ANSWER = answer()


@dataclass(frozen=True, slots=True)
class Bulk:
    """Which entries: those of a range of numbers, `per_topic` in a row to each topic, stored and expiring then."""

    numbers: range
    per_topic: int
    stored_ms: int
    expires_ms: int

    def entries(self) -> Iterator[Entry]:
        """The entries, one by one."""
        return (self._entry(number) for number in self.numbers)

    def _entry(self, number: int) -> Entry:
        return Entry(
            key=key_of(number),
            key_version=1,
            namespace=b"",
            space=_SPACE,
            upstream="http://127.0.0.1:8080",
            fingerprint=_FINGERPRINT,
            endpoint="chat",
            model=MODEL,
            words=numbered(number),
            stored_ms=self.stored_ms,
            expires_ms=self.expires_ms,
            # So that what is worth least lies everywhere in the file.
            cost_ms=200 + number * 7919 % 5000,
            prompt_tokens=52,
            completion_tokens=71,
            usage_known=True,
            answer=_ANSWER,
            topic=int.from_bytes(hashlib.sha256(b"topic %d" % (number // self.per_topic)).digest()[:8], signed=True),
        )


def key_of(number: int) -> bytes:
    """The key of the entry of this number."""
    return hashlib.sha256(b"key %d" % number).digest()


def fill(path: Path, bulk: Bulk) -> float:
    """Add the entries to a file, which is made where there is none; how many seconds it took."""
    begun = time.monotonic()
    asyncio.run(_create(path))
    with closing(connect(str(path))) as connection:
        # What is half written when the machine fails is thrown away anyway.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        entries = bulk.entries()
        while insert(connection, islice(entries, _TRANSACTION)):
            pass
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return time.monotonic() - begun


def insert(connection: sqlite3.Connection, entries: Iterable[Entry]) -> int:
    """Add the entries in one transaction; how many there were."""
    ((last,),) = connection.execute("SELECT ifnull(max(id), 0) FROM entry")
    rows = list(enumerate(entries, last + 1))
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(_ENTRY, (_row(place, entry) for place, entry in rows))
    connection.executemany(_BODY, ((place, entry.answer) for place, entry in rows))
    connection.execute("COMMIT")
    return len(rows)


async def _create(path: Path) -> None:
    async with open_sqlite(path):
        pass


def _row(place: int, entry: Entry) -> tuple[Any, ...]:
    size = len(entry.answer)
    gained = gain(entry.cost_ms, size, 1)
    return (place, *(getattr(entry, name) for name in _FIELDS), size, entry.stored_ms, 0, gained)
