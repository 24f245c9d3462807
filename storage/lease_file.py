"""The small SQLite file in which processes keep their leases. Blocking; call it in a thread.

Nothing in it is worth keeping: it is written without waiting for the disk, and a corrupt one is made anew. Times are
milliseconds of a clock that counts on, also while the machine sleeps, and that all processes of a machine share. Nobody
holds a lease for longer than a term from now: what says so is from before the machine was started, and void.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from storage.base import ForeignFile, SchemaTooNew, StorageCorrupt
from storage.leases import APART_MS, TERM_MS, Apart, Held, Standing, Taken
from storage.mounts import MOUNTINFO
from storage.neighbours import Neighbours
from storage.sqlite_file import make_private, our_errors, refuse_network, switch_to_wal

log = logging.getLogger("nearhit.storage")

APPLICATION_ID = 0x6E6C7365  # "nlse"
_VERSION = 1
_HEAD = 100
_BUSY_S = 0.2
_PAGE_SIZE = 1024
_LOG_PAGES = 64
_FORGOTTEN_MS = 60_000
"""A lease that ended so long ago is of no use to its holder either."""

_SCHEMA = (
    """CREATE TABLE lease (
        key BLOB PRIMARY KEY,
        holder INTEGER NOT NULL,
        token INTEGER NOT NULL,
        until_ms INTEGER NOT NULL,
        apart INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE counter (token INTEGER NOT NULL)",
)
_FIND = "SELECT holder, until_ms, apart FROM lease WHERE key = ?"
_COUNT = "UPDATE counter SET token = token + ?"
_COUNTED = "SELECT token FROM counter"
_TAKE = "INSERT OR REPLACE INTO lease (key, holder, token, until_ms, apart) VALUES (?, ?, ?, ?, 0)"
_RENEW = "UPDATE lease SET until_ms = ? WHERE key = ? AND holder = ? AND token = ? AND apart = 0"
_PART = "UPDATE lease SET until_ms = ?, apart = 1 WHERE key = ? AND holder = ? AND token = ? AND apart = 0"
_FREE = "DELETE FROM lease WHERE key = ? AND holder = ? AND token = ? AND apart = 0"
_LEAVE = "DELETE FROM lease WHERE holder = ? AND apart = 0"
_SWEEP = "DELETE FROM lease WHERE until_ms <= ? OR until_ms > ?"


class LeaseFile:
    """An open one, and who we are in it."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, neighbours: Neighbours, clock_ms: Callable[[], int]
    ) -> None:
        """Use these; `neighbours` are all who use the file."""
        # The clock is read here and not passed in: only so it is certainly read after the row that it is compared with.
        self._clock_ms = clock_ms
        self._path = path
        self._connection = connection
        self._neighbours = neighbours
        self._status = path.stat()

    def take(self, keys: Sequence[bytes], *, together: bool = False) -> list[Standing]:
        """See `Leases.take`. Where none can be taken, that is found without writing."""
        with our_errors():
            standings = self._standings(keys, together=together)
            if None in standings:
                with self._writing():
                    # Between the two, another may have taken some.
                    standings = self._standings(keys, together=together)
                    taken = iter(self._taken([key for key, one in zip(keys, standings, strict=True) if one is None]))
                    return [next(taken) if one is None else one for one in standings]
            return [one for one in standings if one is not None]

    def renew(self, leases: Iterable[Taken]) -> frozenset[Taken]:
        """Begin the terms of these anew; returns those that are still ours."""
        with our_errors(), self._writing():
            until_ms = self._clock_ms() + TERM_MS
            return frozenset(lease for lease in leases if self._change(_RENEW, (until_ms,), lease))

    def release(self, leases: Iterable[Taken], *, shareable: bool) -> None:
        """See `Leases.release`; those that are not ours any more stay as they are."""
        with our_errors(), self._writing():
            until_ms = self._clock_ms() + APART_MS
            for lease in leases:
                if shareable:
                    self._change(_FREE, (), lease)
                else:
                    self._change(_PART, (until_ms,), lease)

    def leave(self) -> None:
        """Let go of all that are ours."""
        with our_errors(), self._writing():
            self._connection.execute(_LEAVE, (self._neighbours.number,))

    def sweep(self) -> None:
        """Forget what ended a while ago."""
        with our_errors(), self._writing():
            now_ms = self._clock_ms()
            self._connection.execute(_SWEEP, (now_ms - _FORGOTTEN_MS, now_ms + TERM_MS))

    def lost(self) -> bool:
        """Whether it is not the file that others find by its name."""
        with suppress(OSError):
            return not os.path.samestat(self._status, self._path.stat())
        return True

    def close(self) -> None:
        """Use it no more."""
        with suppress(sqlite3.Error):
            self._connection.close()

    def _standings(self, keys: Sequence[bytes], *, together: bool) -> list[Held | Apart | None]:
        """How the keys stand, None: they are free."""
        standings: list[Held | Apart | None] = []
        there = cache(self._neighbours.has)
        for key in keys:
            standing = self._standing(key, there)
            if together and isinstance(standing, Held):
                return [standing] * len(keys)
            standings.append(standing)
        return standings

    def _standing(self, key: bytes, there: Callable[[int], bool]) -> Held | Apart | None:
        row = self._connection.execute(_FIND, (key,)).fetchone()
        if row is None:
            return None
        holder, until_ms, apart = row
        now_ms = self._clock_ms()
        if not now_ms < until_ms <= now_ms + TERM_MS:
            return None
        if apart or holder == self._neighbours.number:
            return Apart()
        return Held() if there(holder) else None

    def _taken(self, keys: Sequence[bytes]) -> list[Taken]:
        self._connection.execute(_COUNT, (len(keys),))
        (last,) = self._connection.execute(_COUNTED).fetchone()
        taken = [Taken(key, token) for token, key in enumerate(keys, last - len(keys) + 1)]
        number, until_ms = self._neighbours.number, self._clock_ms() + TERM_MS
        self._connection.executemany(_TAKE, [(one.key, number, one.token, until_ms) for one in taken])
        return taken

    def _change(self, sql: str, values: tuple[int, ...], lease: Taken) -> bool:
        own = (lease.key, self._neighbours.number, lease.token)
        return self._connection.execute(sql, (*values, *own)).rowcount == 1

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def open_lease_file(
    path: Path, neighbours: Neighbours, clock_ms: Callable[[], int], *, mountinfo: Path = MOUNTINFO
) -> LeaseFile:
    """Open the file, made where there is none, and anew where it is corrupt.

    Raises:
        StorageRefused: it is not ours, or a newer nearhit's; it was not touched.
        StorageUnavailable: it cannot be made, opened or locked now.
    """
    with our_errors():
        refuse_network(path, mountinfo)
        # Two that find it corrupt must not both make it anew.
        with neighbours.turn():
            try:
                connection = _connected(path, clock_ms())
            except StorageCorrupt as error:
                if not _was_ours(path):
                    raise ForeignFile(f"{path} is not nearhit's") from error
                log.warning("%s is corrupt (%s): made anew, nothing is lost", path, error)
                for suffix in ("", "-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
                connection = _connected(path, clock_ms())
            return LeaseFile(path, connection, neighbours, clock_ms)


def _connected(path: Path, now_ms: int) -> sqlite3.Connection:
    if not path.exists():
        path.touch(mode=0o600)
    if not path.is_file():
        raise ForeignFile(f"{path} is no file")
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        with our_errors():
            _refuse_foreign(path, connection)
            make_private(path)
            connection.execute("PRAGMA synchronous = OFF")
            if _value(connection, "page_count") == 0:
                _create(connection, now_ms)
            switch_to_wal(connection)
            connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
            _check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise StorageCorrupt(verdict)


def _create(connection: sqlite3.Connection, now_ms: int) -> None:
    connection.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        connection.execute(statement)
    # The tokens of a file that takes another's place go on above: nobody takes a thousand leases in a millisecond.
    connection.execute("INSERT INTO counter (token) VALUES (?)", (now_ms * 1000,))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.execute("COMMIT")


def _refuse_foreign(path: Path, connection: sqlite3.Connection) -> None:
    pages = _value(connection, "page_count")
    if pages and _value(connection, "application_id") != APPLICATION_ID:
        raise ForeignFile(f"{path} is a SQLite database of another program")
    if pages and _value(connection, "user_version") > _VERSION:
        raise SchemaTooNew(f"{path} is a newer nearhit's")


def _was_ours(path: Path) -> bool:
    # A look without SQLite ends the locks that this process has on the file, which is of no use to it any more.
    with path.open("rb") as file:
        head = file.read(_HEAD)
    # What the machine had not written yet when it was switched off is read as zeros.
    return not any(head) or int.from_bytes(head[68:72], "big") == APPLICATION_ID


def _value(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])
