"""A database file looked at, and brought up to date, without the engine: for the command line. Blocking.

Whoever looks leaves the file as it is, and no other file beside it where that can be helped.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from storage.base import StorageError
from storage.migrate import refuse_newer, shipped
from storage.mounts import MOUNTINFO
from storage.sqlite_file import (
    connect,
    create_schema,
    make_private,
    our_errors,
    refuse_foreign,
    refuse_network,
    switch_to_wal,
)
from storage.sqlite_invariants import INVARIANTS

T = TypeVar("T")

_LATEST = 1000

_FROM_THE_FUTURE = """SELECT count(*), ifnull(max(at), 0)
FROM (SELECT max(stored_ms, used_ms) AS at FROM entry ORDER BY id DESC LIMIT ?) WHERE at > ?"""


@dataclass(frozen=True, slots=True)
class Schema:
    """How far a file is: `number` is its last migration (0: none), `missing` are those that it lacks."""

    number: int
    known: int
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ahead:
    """How many entries have times after a certain one, and the latest such time (ms; 0 where there is none)."""

    entries: int
    latest_ms: int


def read(path: Path, work: Callable[[sqlite3.Connection], T]) -> T:
    """What `work` finds out with a connection that cannot write; it may be called twice.

    Raises:
        StorageCorrupt: the file is damaged.
        StorageUnavailable: it cannot be read now.
    """
    # Even a reader makes a log and its index where there are none, and leaves them. Where the log holds nothing, the
    # file is read as one that never changes. Where it did change meanwhile, what was read may be a mixture.
    before = _at_rest(path)
    if before is not None:
        try:
            found = _read(path, "immutable=1", work)
        except StorageError:
            if before == _at_rest(path):
                raise
        else:
            if before == _at_rest(path):
                return found
    return _read(path, "mode=ro", work)


def schema_of(path: Path) -> Schema:
    """How far the schema of a file is.

    Raises:
        ForeignFile: it is not ours.
        StorageCorrupt: it is damaged.
        StorageUnavailable: it does not exist, or cannot be read now.
    """
    with our_errors():
        refuse_foreign(path)
    done = read(path, _ledger)
    known = shipped("sqlite")
    return Schema(max(done, default=0), len(known), tuple(m.name for m in known if m.number not in done))


def bring_up_to_date(path: Path, *, mountinfo: Path = MOUNTINFO) -> int:
    """Apply the migrations that a file lacks, all or none, under its write lock; how many there were.

    Raises:
        StorageRefused: it is not ours, or newer than this program. It was not touched.
        StorageCorrupt: it is damaged.
        StorageUnavailable: it does not exist, is on a network mount, locked by another, or the disk is full.
    """
    with our_errors():
        refuse_network(path, mountinfo)
        refuse_foreign(path)
        make_private(path)
        with closing(connect(_uri(path, "mode=rw"), uri=True)) as connection:
            applied = create_schema(connection)
            switch_to_wal(connection)
    return applied


def entries_of(path: Path) -> int:
    """How many entries a file has."""
    return int(read(path, lambda connection: connection.execute("SELECT count(*) FROM entry").fetchone()[0]))


def ahead_of(path: Path, limit_ms: int, *, all_of_them: bool) -> Ahead:
    """Entries with times after `limit_ms`: of all, which takes seconds where there are a million, or of the latest."""
    parameters = (-1 if all_of_them else _LATEST, limit_ms)
    return read(path, lambda connection: Ahead(*connection.execute(_FROM_THE_FUTURE, parameters).fetchone()))


def problems(path: Path) -> list[str]:
    """See `storage.base.Inspection.problems`; of an older schema, whatever holds of it."""
    known = len(shipped("sqlite"))

    def look(connection: sqlite3.Connection) -> list[str]:
        verdicts = [verdict for (verdict,) in connection.execute("PRAGMA integrity_check")]
        found = [f"integrity: {verdict}" for verdict in verdicts if verdict != "ok"]
        if max(_ledger(connection), default=0) != known:
            return found
        counted = [(connection.execute(query).fetchone()[0], what) for query, what in INVARIANTS]
        return found + [f"{count} {what}" for count, what in counted if count]

    return read(path, look)


def refuse_too_new(schema: Schema) -> None:
    """See to it that a newer schema is left to the program that made it.

    Raises:
        SchemaTooNew: it is newer than this program.
    """
    refuse_newer(schema.number, schema.known)


def log_bytes(path: Path) -> int:
    """The size of a file's write-ahead log; 0 where there is none."""
    try:
        return path.with_name(f"{path.name}-wal").stat().st_size
    except FileNotFoundError:
        return 0


def _ledger(connection: sqlite3.Connection) -> set[int]:
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'migration'").fetchone():
        return set()
    return {number for (number,) in connection.execute("SELECT number FROM migration")}


def _read(path: Path, how: str, work: Callable[[sqlite3.Connection], T]) -> T:
    with our_errors(), closing(connect(_uri(path, how), uri=True)) as connection:
        return work(connection)


def _at_rest(path: Path) -> tuple[int, ...] | None:
    """What tells whether a file changed, or None where a part of it is elsewhere."""
    with our_errors():
        if log_bytes(path) or os.path.lexists(f"{path}-journal"):
            return None
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _uri(path: Path, how: str) -> str:
    return f"{path.absolute().as_uri()}?{how}"
