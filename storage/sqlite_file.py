"""Opening a SQLite file safely: ours or foreign, new or old, sound or corrupt. Blocking; call it in a thread."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from storage.base import (
    ForeignFile,
    NotLocal,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from storage.migrate import apply, shipped
from storage.mounts import MOUNTINFO, network_mount

log = logging.getLogger("nearhit.storage")

APPLICATION_ID = 0x6E656172  # "near"
PAGE_SIZE = 8192
_MAGIC = b"SQLite format 3\x00"
_HEAD = 108  # the header of a database and of its first page
_LEAF = 0x0D
_BUSY_S = 5.0
_WAL_TRIES = 200

_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# SQLite says "full" for ENOSPC alone; a quota or size limit shows as a failed write.
_FULL_EXTENDED = frozenset({sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})
_FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


def translated(error: sqlite3.Error | OSError | ValueError) -> StorageError:
    """The storage error that a foreign error stands for.

    aiosqlite says `ValueError` when its connection was closed; SQLite's primary code is the low byte of the extended.
    """
    extended = getattr(error, "sqlite_errorcode", 0)
    code = extended & 0xFF
    if code in _CORRUPT:
        return StorageCorrupt(str(error))
    if code in _FULL or extended in _FULL_EXTENDED or getattr(error, "errno", None) in _FULL_ERRNO:
        return StorageFull(str(error))
    if code in _BUSY:
        return StorageBusy(str(error))
    if type(error) is sqlite3.DatabaseError:
        return StorageCorrupt(str(error))
    return StorageUnavailable(str(error))


@contextmanager
def our_errors() -> Iterator[None]:
    """The one line at which SQLite's errors become ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise translated(error) from error


def prepare(path: Path, *, suspect: bool = False, mountinfo: Path = MOUNTINFO) -> None:
    """Make sure that `path` is a sound, migrated nearhit database, creating it or setting a corrupt one aside.

    With `suspect`, every page is checked (seconds for a large file); else only what SQLite checks on opening.
    `mountinfo` is where the system tells what is mounted.

    Raises:
        ForeignFile: the file is not ours; it was not touched.
        SchemaTooNew: a newer nearhit wrote it; it was not touched.
        NotLocal: it is on a network mount; it was not touched.
        StorageUnavailable: it cannot be created, read or locked now.
    """
    with our_errors():
        refuse_network(path, mountinfo)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            path.touch(mode=0o600)
        if not (path.is_file() or path.is_dir()):
            raise ForeignFile(f"{path} is no file: point cache.file at another path")
        refuse_foreign(path)
        make_private(path)
        inode = path.stat().st_ino
        try:
            _open_and_migrate(path, suspect=suspect)
        except StorageCorrupt as error:
            _set_aside(path, inode, error)
            _open_and_migrate(path, suspect=False)


def connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    """A plain connection without implicit transactions."""
    return sqlite3.connect(database, uri=uri, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)


def create_schema(connection: sqlite3.Connection) -> int:
    """Fix what cannot be changed later, then migrate, all under the write lock; how many migrations were applied.

    Raises:
        SchemaTooNew: a newer nearhit wrote it.
    """
    if _value(connection, "page_count") == 0:
        # Laid down by the first write. On a database that has pages, auto_vacuum would write before we know it is ours.
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        applied = apply(connection, shipped("sqlite"), time.time_ns() // 1_000_000)
        if _value(connection, "application_id") != APPLICATION_ID:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return applied


def _value(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Mark the database as open for the life of this block, so that nobody sets it aside meanwhile."""
    with _lock(path, fcntl.LOCK_SH):
        yield


def refuse_network(path: Path, mountinfo: Path = MOUNTINFO) -> None:
    """See to it that nothing is opened where locks and shared memory cannot be relied on.

    Raises:
        NotLocal: the path is on a network mount.
    """
    kind = network_mount(path, mountinfo)
    if kind:
        raise NotLocal(
            f"{path} is on a network mount ({kind}), where locks cannot be relied on: "
            "point data_dir or cache.file at a local disk"
        )


def make_private(path: Path) -> None:
    """Take everybody else's rights to a database and its log, where they are ours to take."""
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        # A file system without owners and modes refuses; there, nothing can be done.
        with suppress(OSError):
            status = part.stat()
            if status.st_mode & 0o077 and status.st_uid == os.geteuid():
                part.chmod(0o600)
                log.warning("%s could be read by others (mode %o): it is mode 600 now", part, status.st_mode & 0o777)


def refuse_foreign(path: Path) -> None:
    """See to it that nobody opens a file that is not ours. It is only read; one that is empty may become ours.

    Raises:
        ForeignFile: it is another program's.
        OSError: it cannot be read.
    """
    if path.stat().st_size == 0 or _is_ours_to_sqlite(path):
        return
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.lstrip()[:1] == b"{":
        raise ForeignFile(f"{path} looks like JSON Lines, not a database: bring it in with `nearhit import {path}`")
    # A damaged header of our own still carries the application id at its place (SQLite file format, offset 68).
    if int.from_bytes(head[68:72], "big") == APPLICATION_ID or _is_blank(head) or _wal_is_ours(path):
        return
    what = "a SQLite database of another program" if head.startswith(_MAGIC) else "not a nearhit database"
    raise ForeignFile(f"{path} is {what}: it is left alone; point cache.file at another path")


def _is_ours_to_sqlite(path: Path) -> bool:
    # To close a file of one's own takes away the locks that SQLite holds on it in this process (POSIX, fcntl): a
    # database that may be open here is only read through SQLite.
    try:
        with closing(connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            return _value(connection, "application_id") == APPLICATION_ID
    except sqlite3.Error:
        return False


def _is_blank(head: bytes) -> bool:
    # `PRAGMA auto_vacuum` commits an empty first page of its own: a process that is killed before its first migration
    # leaves just that, and one that starts at the same moment may see it. The schema's page holds no table yet.
    return (
        head.startswith(_MAGIC)
        and len(head) == _HEAD
        and int.from_bytes(head[16:18], "big") == PAGE_SIZE
        and int.from_bytes(head[64:68], "big") == 1  # incremental vacuum
        and not any(head[68:72])  # application id
        and head[100] == _LEAF
        and not any(head[103:105])  # number of cells
    )


def _wal_is_ours(path: Path) -> bool:
    # A database killed right after its creation may hold its first page in the WAL only.
    wal = path.with_name(path.name + "-wal")
    if not wal.exists() or wal.stat().st_size == 0:
        return False
    try:
        with closing(connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return _value(connection, "application_id") == APPLICATION_ID
    except sqlite3.Error:
        return False


def _open_and_migrate(path: Path, *, suspect: bool) -> None:
    with our_errors(), closing(connect(str(path))) as connection:
        create_schema(connection)
        switch_to_wal(connection)
        if suspect:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise StorageCorrupt(verdict)


def switch_to_wal(connection: sqlite3.Connection) -> None:
    """Let readers and the writer of this database not wait for each other.

    Raises:
        StorageBusy: another process holds it.
    """
    # SQLite answers "busy" here without waiting when another process switches at the same moment.
    for _ in range(_WAL_TRIES):
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if not isinstance(translated(error), StorageBusy):
                raise
            mode = "busy"
        if mode == "wal":
            return
        time.sleep(0.025)
    raise StorageBusy("the database could not be switched to write-ahead logging: another process holds it")


def _set_aside(path: Path, inode: int, reason: StorageCorrupt) -> None:
    # Where another process was quicker, the file of now is a new one, perhaps in use already.
    if _replaced(path, inode):
        return
    with _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if _replaced(path, inode):
            return
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{os.getpid()}"
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(path.with_name(f"{path.name}.corrupt-{stamp}{suffix}"))
        path.touch(mode=0o600)
    log.error("%s is corrupt (%s): set aside as %s.corrupt-%s, going on with a new one", path, reason, path.name, stamp)


def _replaced(path: Path, inode: int) -> bool:
    return path.exists() and path.stat().st_ino != inode


@contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError as error:
            raise StorageBusy(f"{path} is corrupt but still open in another nearhit") from error
        yield
    finally:
        os.close(descriptor)
