"""The SQLite engine: one locked writer, one `query_only` reader, a file or (without a path) memory."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Never

import aiosqlite

from storage import sqlite_entries, sqlite_near
from storage.base import MIN_PREFIX, Candidate, Change, Entry, StorageUnavailable, Store, Totals, Unsketched
from storage.sqlite_file import PAGE_SIZE, connect, create_schema, in_use, our_errors, prepare, translated

_BUSY_WRITER_S = 5.0
_BUSY_READER_S = 0.25
_PAGE_CACHE_KIB = 8192

KEYS = "SELECT id, key FROM entry WHERE id > ? ORDER BY id LIMIT ?"


@asynccontextmanager
async def open_sqlite(path: Path | None, *, suspect: bool = False) -> AsyncIterator[Store]:
    """Open the engine on a file, or in memory where `path` is None.

    With `suspect`, a file is checked page by page first and set aside if it is corrupt.

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
            await asyncio.to_thread(prepare, path, suspect=suspect)
            with our_errors():
                await asyncio.to_thread(stack.enter_context, in_use(path))
            database = f"{await asyncio.to_thread(_uri_of, path)}?mode=rw"
        writer = await stack.enter_async_context(_connection(database, _BUSY_WRITER_S))
        reader = await stack.enter_async_context(_connection(database, _BUSY_READER_S, query_only=True))
        inode = None if path is None else await asyncio.to_thread(_inode_of, path)
        yield SqliteStore(reader, writer, path, inode)


@contextmanager
def _anchor(database: str) -> Iterator[None]:
    # Opened and filled in one thread: a caller cancelled meanwhile must not close what that thread still uses.
    with our_errors(), closing(connect(database, uri=True)) as connection:
        create_schema(connection)
        yield


@asynccontextmanager
async def _connection(database: str, busy_s: float, *, query_only: bool = False) -> AsyncIterator[aiosqlite.Connection]:
    with our_errors():
        connection = await aiosqlite.connect(database, uri=True, timeout=busy_s, isolation_level=None)
    try:
        with our_errors():
            await connection.execute("PRAGMA synchronous = NORMAL")
            await connection.execute("PRAGMA foreign_keys = ON")
            await connection.execute(f"PRAGMA cache_size = -{_PAGE_CACHE_KIB}")
            if query_only:
                await connection.execute("PRAGMA query_only = ON")
        yield connection
    finally:
        await asyncio.shield(connection.close())


class SqliteStore:
    """A `storage.base.Store` on two SQLite connections."""

    def __init__(
        self, reader: aiosqlite.Connection, writer: aiosqlite.Connection, path: Path | None, inode: int | None
    ) -> None:
        """Use open connections; `inode` is the file's when it was opened."""
        self._reader = reader
        self._writer = writer
        self._path = path
        self._inode = inode
        self._turn = asyncio.Lock()

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """See `Entries.get`."""
        async with self._reading() as reader:
            return await sqlite_entries.get(reader, key, now_ms)

    async def write(self, changes: Sequence[Change]) -> None:
        """See `Entries.write`."""
        async with self._transaction() as writer:
            await sqlite_entries.write(writer, changes)

    async def find(self, key_prefix: bytes, limit: int) -> list[Entry]:
        """See `Finding.find`."""
        if len(key_prefix) < MIN_PREFIX:
            raise ValueError(f"a prefix has at least {MIN_PREFIX} bytes")
        async with self._reading() as reader:
            return await sqlite_entries.find(reader, key_prefix, limit)

    async def keys_after(self, mark: int, limit: int) -> tuple[int, list[bytes]]:
        """See `Keys.keys_after`; marks are row ids.

        A row id that was the highest may be used again after its entry was removed: a key that another process stored
        under it can be passed over, which costs one miss.
        """
        async with self._reading() as reader:
            rows = list(await reader.execute_fetchall(KEYS, (mark, limit)))
        return (int(rows[-1][0]) if rows else mark), [key for _, key in rows]

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """See `Sketches.candidates`."""
        async with self._reading() as reader:
            return await sqlite_near.candidates(reader, space, keys, now_ms, per_key, limit)

    async def unsketched(self, scheme: int, limit: int) -> list[Unsketched]:
        """See `Sketches.unsketched`."""
        async with self._reading() as reader:
            return await sqlite_near.unsketched(reader, scheme, limit)

    async def record_scheme(self, scheme: int, description: str, now_ms: int) -> None:
        """See `Sketches.record_scheme`."""
        async with self._transaction() as writer:
            await sqlite_near.record_scheme(writer, scheme, description, now_ms)

    async def schemes(self) -> dict[int, str]:
        """See `Sketches.schemes`."""
        async with self._reading() as reader:
            return await sqlite_near.schemes(reader)

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """See `Vetoes.vetoed`."""
        async with self._reading() as reader:
            return await sqlite_near.vetoed(reader, pairs)

    async def veto(self, pairs: Sequence[bytes], now_ms: int) -> None:
        """See `Vetoes.veto`."""
        async with self._transaction() as writer:
            await sqlite_near.veto(writer, pairs, now_ms)

    async def expire(self, now_ms: int, limit: int) -> int:
        """See `Bounds.expire`."""
        async with self._transaction() as writer:
            removed = await sqlite_entries.remove_stale(writer, now_ms, limit)
        return await self._gave_back(removed)

    async def trim(self, max_entries: int, max_bytes: int, limit: int) -> int:
        """See `Bounds.trim`."""
        if not _surplus(await self.totals(), max_entries, max_bytes):
            return 0
        # Counted again under the lock: somebody else, or another process, may trim at the same moment.
        async with self._transaction() as writer:
            surplus = _surplus(await _totals(writer), max_entries, max_bytes)
            removed = await sqlite_entries.remove_unused(writer, min(surplus, limit))
        return await self._gave_back(removed)

    async def fact(self, upstream: str, name: str) -> str | None:
        """See `Facts.fact`."""
        async with self._reading() as reader:
            query = "SELECT value FROM fact WHERE upstream = ? AND name = ?"
            rows = list(await reader.execute_fetchall(query, (upstream, name)))
        return str(rows[0][0]) if rows else None

    async def note(self, upstream: str, name: str, value: str, now_ms: int) -> None:
        """See `Facts.note`."""
        async with self._transaction() as writer:
            statement = "INSERT OR REPLACE INTO fact (upstream, name, value, noted_ms) VALUES (?, ?, ?, ?)"
            await writer.execute(statement, (upstream, name, value, now_ms))

    async def totals(self) -> Totals:
        """See `Inspection.totals`; bytes are the pages in use, free pages not counted."""
        async with self._reading() as reader:
            return await _totals(reader)

    async def problems(self) -> list[str]:
        """See `Inspection.problems`."""
        found: list[str] = []
        async with self._reading() as reader:
            for (verdict,) in await reader.execute_fetchall("PRAGMA integrity_check"):
                if verdict != "ok":
                    found.append(f"integrity: {verdict}")
            for query, what in (*_INVARIANTS, *sqlite_near.INVARIANTS):
                ((count,),) = await reader.execute_fetchall(query)
                if count:
                    found.append(f"{count} {what}")
        return found

    async def lost(self) -> bool:
        """See `Inspection.lost`."""
        return self._path is not None and self._inode != await asyncio.to_thread(_inode_of, self._path)

    async def _gave_back(self, removed: int) -> int:
        if removed:
            # The entries are gone already, so a failure must not hide how many; the next step gives back the rest.
            with contextlib.suppress(StorageUnavailable):
                async with self._turn:
                    with _ours():
                        # Each step of this statement frees one page; `execute` would take a single step.
                        await self._writer.executescript("PRAGMA incremental_vacuum(256)")
        return removed

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[aiosqlite.Connection]:
        # In memory, SQLite has no readers beside a writer: wait for our own writes instead of failing as busy.
        async with self._turn if self._path is None else contextlib.nullcontext():
            with _ours():
                yield self._reader

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._turn:
            try:
                with _ours():
                    await self._writer.execute("BEGIN IMMEDIATE")
                    yield self._writer
                    await self._writer.execute("COMMIT")
            except BaseException:
                await asyncio.shield(self._undo())
                raise

    async def _undo(self) -> None:
        # An error such as "disk full" has already rolled back by itself.
        with contextlib.suppress(sqlite3.Error, ValueError):
            await self._writer.execute("ROLLBACK")


_INVARIANTS = (
    ("SELECT count(*) FROM entry WHERE id NOT IN (SELECT entry FROM body)", "entries without an answer"),
    ("SELECT count(*) FROM body WHERE entry NOT IN (SELECT id FROM entry)", "answers without an entry"),
    (
        "SELECT count(*) FROM entry JOIN body ON entry = id WHERE size <> length(answer)",
        "entries with the size of another",
    ),
    ("SELECT count(*) FROM entry WHERE expires_ms < stored_ms OR hits < 0", "entries with impossible times or counts"),
)


async def _totals(connection: aiosqlite.Connection) -> Totals:
    query = (
        "SELECT (SELECT count(*) FROM entry), page_count - freelist_count FROM pragma_page_count, pragma_freelist_count"
    )
    ((entries, pages),) = await connection.execute_fetchall(query)
    return Totals(int(entries), int(pages) * PAGE_SIZE)


def _surplus(totals: Totals, max_entries: int, max_bytes: int) -> int:
    surplus = max(totals.entries - max_entries, 0)
    if totals.bytes > max_bytes:
        # How many entries make up the surplus bytes is an estimate; the next step looks again.
        surplus = max(surplus, 1, totals.entries * (totals.bytes - max_bytes) // totals.bytes)
    return min(surplus, totals.entries)


@contextmanager
def _ours() -> Iterator[None]:
    try:
        with our_errors():
            yield
    except (OverflowError, UnicodeEncodeError) as error:
        raise StorageUnavailable(f"SQLite cannot hold this value: {type(error).__name__}") from None
    except ValueError as error:
        _closed(error)


def _closed(error: ValueError) -> Never:
    # aiosqlite says so when its connection is closed; any other ValueError is a bug of ours.
    if "closed" not in str(error) and "no active connection" not in str(error):
        raise error
    raise StorageUnavailable("the store is closed") from translated(error)


def _uri_of(path: Path) -> str:
    return path.absolute().as_uri()


def _inode_of(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
