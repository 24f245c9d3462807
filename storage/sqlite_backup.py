"""A consistent copy of a database file while others write to it. Blocking.

Pages are copied in steps inside one read transaction: what is copied is the moment of its beginning, writers never
wait, and it ends however much is written meanwhile (without the transaction, each write would make SQLite begin anew).
What is written meanwhile stays in the write-ahead log until the copy is done. `VACUUM INTO` does the same, but builds
every index again, lets the log grow larger, and tells nothing of its progress.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from storage.base import StorageBusy, StorageCorrupt, StorageRefused
from storage.sqlite_file import connect, our_errors, refuse_foreign
from storage.sqlite_offline import read

Progress = Callable[[int, int], None]
"""Told after each step how many pages are copied, and of how many."""

_STEP_PAGES = 512
_FLUSH_STEPS = 16
"""Flushed all at once, a large copy would hold up everybody else who writes to the disk."""


class DestinationRefused(StorageRefused):
    """The copy cannot have this name; the message tells why."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a backup holds."""

    bytes: int
    entries: int


def back_up(path: Path, destination: Path, *, replace: bool = False, progress: Progress | None = None) -> Copied:
    """Copy a database to a new file of mode 0600; with `replace`, in the place of one that is there.

    The destination is whole or not there: the copy is made beside it as DESTINATION.part, checked, and then renamed.

    Raises:
        ForeignFile: the file is not ours.
        DestinationRefused: there is something at the destination, or it is no place for a copy.
        StorageCorrupt: the database is damaged; there is no copy.
        StorageUnavailable: it cannot be read, or the destination cannot be written: there is no copy.
    """
    with our_errors():
        refuse_foreign(path)
        _refuse_destination(path, destination, replace=replace)
        scratch = destination.with_name(f"{destination.name}.part")
        with _scratch(scratch) as descriptor:
            read(path, lambda connection: _copy(connection, scratch, _flushing(descriptor, progress)))
            copied = Copied(os.fstat(descriptor).st_size, _checked(scratch))
            os.fsync(descriptor)
            _refuse_destination(path, destination, replace=replace)
            scratch.replace(destination)
        _sync_folder(destination.parent)
    return copied


def _refuse_destination(path: Path, destination: Path, *, replace: bool) -> None:
    if destination.exists() and destination.samefile(path):
        raise DestinationRefused(f"{destination} is the database itself: name another file")
    if destination.is_dir():
        raise DestinationRefused(f"{destination} is a folder: name a file in it")
    if not destination.parent.is_dir():
        raise DestinationRefused(f"there is no folder {destination.parent}")
    # SQLite would take the log of another database for this one's, and mix them.
    for suffix in ("-wal", "-journal"):
        companion = destination.with_name(f"{destination.name}{suffix}")
        if os.path.lexists(companion):
            raise DestinationRefused(
                f"{companion} belongs to a database that is in use or was not closed: name another file"
            )
    if os.path.lexists(destination) and not replace:
        raise DestinationRefused(f"{destination} exists: name another file, or replace it with --force")


@contextmanager
def _scratch(scratch: Path) -> Iterator[int]:
    """An empty private file for the life of this block, which takes its name away or loses it."""
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(scratch, flags, 0o600)
    try:
        try:
            # One that a killed backup has left is taken over.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageBusy(f"another backup is writing {scratch}") from error
        try:
            os.fchmod(descriptor, 0o600)
            yield descriptor
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


def _flushing(descriptor: int, progress: Progress | None) -> Progress:
    steps = count(1)

    def told(done: int, total: int) -> None:
        if next(steps) % _FLUSH_STEPS == 0:
            os.fdatasync(descriptor)
        if progress is not None:
            progress(done, total)

    return told


def _copy(source: sqlite3.Connection, scratch: Path, progress: Progress) -> None:
    os.truncate(scratch, 0)
    # Nobody else uses the copy, so it needs no locks, which some network mounts lack, and no journal.
    with closing(connect(f"{scratch.absolute().as_uri()}?mode=rw&nolock=1", uri=True)) as copy:
        copy.execute("PRAGMA journal_mode = OFF")
        copy.execute("PRAGMA synchronous = OFF")
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        source.backup(copy, pages=_STEP_PAGES, progress=lambda _, left, total: progress(total - left, total))
        source.execute("ROLLBACK")


def _checked(copy: Path) -> int:
    """How many entries a copy has that is sound."""
    with our_errors(), closing(connect(f"{copy.absolute().as_uri()}?immutable=1", uri=True)) as connection:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StorageCorrupt(str(verdict))
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'entry'").fetchone():
            return 0
        return int(connection.execute("SELECT count(*) FROM entry").fetchone()[0])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
