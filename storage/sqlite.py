"""The SQLite engine: one locked writer and `query_only` readers, on a file or (without a path) in memory.

What people ask for goes to a reader of its own: hits must not wait for a walk through all entries.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sqlite3
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import aiosqlite

from storage import sqlite_listing
from storage.leadership import Leadership, leadership
from storage.migrate import shipped
from storage.mounts import MOUNTINFO
from storage.sqlite_file import connect, create_schema, in_use, our_errors, prepare
from storage.sqlite_store import Handles, Inode, SqliteStore, inode_of, log_of
from storage.store import Store

_BUSY_WRITER_S = 5.0
_BUSY_READER_S = 0.25
_PAGE_CACHE_KIB = 8192
_WALKER_CACHE_KIB = 1024
"""Who walks through everything reads each page once."""


@asynccontextmanager
async def open_sqlite(
    path: Path | None, *, suspect: bool = False, overwrite_deleted: bool = False, mountinfo: Path = MOUNTINFO
) -> AsyncIterator[Store]:
    """Open the engine on a file, or in memory where `path` is None.

    With `suspect`, a file is checked page by page first and set aside if it is corrupt. With `overwrite_deleted`, what
    is removed is overwritten in the file, as far as a program can see to that.

    Raises:
        StorageRefused: the file is not ours or too new.
        StorageUnavailable: it cannot be opened now.
    """
    async with contextlib.AsyncExitStack() as stack:
        if path is None:
            # Named, so that both connections see it; it lives as long as the anchor.
            database = f"file:/nearhit-{uuid.uuid4().hex}?vfs=memdb"
            await asyncio.to_thread(stack.enter_context, _anchor(database))
        else:
            await asyncio.to_thread(prepare, path, suspect=suspect, mountinfo=mountinfo)
            with our_errors():
                await asyncio.to_thread(stack.enter_context, in_use(path))
            database = f"{await asyncio.to_thread(_uri_of, path)}?mode=rw"
        # Before it is opened: a file that takes its place in between is noticed as another one.
        inode = None if path is None else await asyncio.to_thread(inode_of, path)
        writer = await stack.enter_async_context(_connection(database, _BUSY_WRITER_S))
        reader = await stack.enter_async_context(_connection(database, _BUSY_READER_S, query_only=True))
        walker = await stack.enter_async_context(
            _connection(database, _BUSY_WRITER_S, query_only=True, cache_kib=_WALKER_CACHE_KIB)
        )
        leadership = None if path is None else await asyncio.to_thread(stack.enter_context, _candidacy(path))
        schema = len(await asyncio.to_thread(shipped, "sqlite"))
        await writer.execute_fetchall(f"PRAGMA secure_delete = {'ON' if overwrite_deleted else 'OFF'}")
        store = SqliteStore(Handles(reader, walker, writer, path, inode, leadership, schema, overwrite_deleted))
        if path is not None:
            await stack.enter_async_context(_own_log(store, writer, path))
        yield store


@contextmanager
def _anchor(database: str) -> Iterator[None]:
    # Opened and filled in one thread: a caller cancelled meanwhile must not close what that thread still uses.
    with our_errors(), closing(connect(database, uri=True)) as connection:
        create_schema(connection)
        yield


@asynccontextmanager
async def _connection(
    database: str, busy_s: float, *, query_only: bool = False, cache_kib: int = _PAGE_CACHE_KIB
) -> AsyncIterator[aiosqlite.Connection]:
    with our_errors():
        connection = await aiosqlite.connect(database, uri=True, timeout=busy_s, isolation_level=None)
    try:
        with our_errors():
            await connection.execute("PRAGMA synchronous = NORMAL")
            await connection.execute("PRAGMA foreign_keys = ON")
            await connection.execute(f"PRAGMA cache_size = -{cache_kib}")
            await connection.create_function("folded", 1, sqlite_listing.folded, deterministic=True)
            if query_only:
                await connection.execute("PRAGMA query_only = ON")
        yield connection
    finally:
        await asyncio.shield(connection.close())


@asynccontextmanager
async def _own_log(store: SqliteStore, writer: aiosqlite.Connection, path: Path) -> AsyncIterator[None]:
    """Take the log away on leaving, where another database has the name by then: SQLite would apply it to that one."""
    try:
        yield
    finally:
        if await asyncio.to_thread(inode_of, path) != store.inode:
            # So that a database that was moved away is whole without its log, and nothing is left in this.
            with contextlib.suppress(sqlite3.Error, ValueError):
                await writer.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            await asyncio.to_thread(_remove_log, path, store.log_inode)


def _remove_log(path: Path, inode: Inode | None) -> None:
    log = log_of(path)
    with contextlib.suppress(OSError), log.open("rb") as file:
        # Of several processes that do this, one removes it; what the name stands for afterwards is somebody else's.
        fcntl.flock(file, fcntl.LOCK_EX)
        if inode_of(log) == inode:
            path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
            log.unlink()


@contextmanager
def _candidacy(path: Path) -> Iterator[Leadership]:
    with our_errors(), leadership(path.with_name(f"{path.name}.upkeep")) as candidate:
        yield candidate


def _uri_of(path: Path) -> str:
    return path.absolute().as_uri()
