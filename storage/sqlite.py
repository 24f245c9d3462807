"""The SQLite engine: one locked writer, one `query_only` reader, a file or (without a path) memory."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Never, assert_never

import aiosqlite

from storage.base import Change, Delete, Entry, Put, StorageUnavailable, Store, Totals, Used
from storage.sqlite_file import PAGE_SIZE, connect, create_schema, in_use, our_errors, prepare, translated

_BUSY_WRITER_S = 5.0
_BUSY_READER_S = 0.25
_PAGE_CACHE_KIB = 8192

GET = """SELECT e.key, e.key_version, e.namespace, e.space, e.upstream, e.fingerprint, e.endpoint, e.model, e.words,
  e.stored_ms, e.expires_ms, e.cost_ms, e.prompt_tokens, e.completion_tokens, e.usage_known, b.answer
FROM entry AS e JOIN body AS b ON b.entry = e.id WHERE e.key = ? AND e.expires_ms > ?"""

_PUT = """INSERT INTO entry (key, key_version, namespace, space, upstream, fingerprint, endpoint, model, words,
  stored_ms, expires_ms, cost_ms, prompt_tokens, completion_tokens, usage_known, size, used_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_PUT_BODY = "INSERT INTO body (entry, answer) SELECT id, ? FROM entry WHERE key = ?"
_DELETE = "DELETE FROM entry WHERE key = ?"
_USED = "UPDATE entry SET hits = hits + ?, used_ms = max(used_ms, ?) WHERE key = ?"

KEYS = "SELECT id, key FROM entry WHERE id > ? ORDER BY id LIMIT ?"
EXPIRE = "DELETE FROM entry WHERE id IN (SELECT id FROM entry WHERE expires_ms <= ? LIMIT ?)"
TRIM = "DELETE FROM entry WHERE id IN (SELECT id FROM entry ORDER BY used_ms, id LIMIT ?)"


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
            rows = list(await reader.execute_fetchall(GET, (key, now_ms)))
        return _entry(rows[0]) if rows else None

    async def write(self, changes: Sequence[Change]) -> None:
        """See `Entries.write`."""
        puts, deletes, used = _net(changes)
        async with self._transaction() as writer:
            await writer.executemany(_DELETE, [(key,) for key in deletes])
            await writer.executemany(_PUT, [_row(entry) for entry in puts])
            await writer.executemany(_PUT_BODY, [(entry.answer, entry.key) for entry in puts])
            await writer.executemany(_USED, [(u.count, u.now_ms, u.key) for u in used])

    async def keys_after(self, mark: int, limit: int) -> tuple[int, list[bytes]]:
        """See `Keys.keys_after`; marks are row ids.

        A row id that was the highest may be used again after its entry was removed: a key that another process stored
        under it can be passed over, which costs one miss.
        """
        async with self._reading() as reader:
            rows = list(await reader.execute_fetchall(KEYS, (mark, limit)))
        return (int(rows[-1][0]) if rows else mark), [key for _, key in rows]

    async def expire(self, now_ms: int, limit: int) -> int:
        """See `Bounds.expire`."""
        async with self._transaction() as writer:
            removed = (await writer.execute(EXPIRE, (now_ms, limit))).rowcount
        return await self._gave_back(removed)

    async def trim(self, max_entries: int, max_bytes: int, limit: int) -> int:
        """See `Bounds.trim`."""
        if not _surplus(await self.totals(), max_entries, max_bytes):
            return 0
        # Counted again under the lock: somebody else, or another process, may trim at the same moment.
        async with self._transaction() as writer:
            surplus = _surplus(await _totals(writer), max_entries, max_bytes)
            removed = (await writer.execute(TRIM, (min(surplus, limit),))).rowcount
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
            for query, what in _INVARIANTS:
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


def _net(changes: Sequence[Change]) -> tuple[list[Entry], list[bytes], list[Used]]:
    # What a run of changes amounts to, so that each kind of statement crosses to the writer's thread once.
    last: dict[bytes, Entry | None] = {}
    used: dict[bytes, Used] = {}
    for change in changes:
        match change:
            case Put(entry):
                last[entry.key] = entry
                used.pop(entry.key, None)
            case Delete(key):
                last[key] = None
                used.pop(key, None)
            case Used(key, count, now_ms):
                before = used.get(key, Used(key, 0, now_ms))
                used[key] = Used(key, before.count + count, max(before.now_ms, now_ms))
            case _:
                assert_never(change)
    puts = [entry for entry in last.values() if entry is not None]
    # A replaced entry is deleted first: SQLite's REPLACE would leave its body behind.
    return puts, list(last), list(used.values())


def _row(e: Entry) -> tuple[Any, ...]:
    return (
        *(e.key, e.key_version, e.namespace, e.space, e.upstream, e.fingerprint, e.endpoint, e.model, e.words),
        *(e.stored_ms, e.expires_ms, e.cost_ms, e.prompt_tokens, e.completion_tokens, int(e.usage_known)),
        *(len(e.answer), e.stored_ms),
    )


def _entry(row: Any) -> Entry:
    fields = dict(zip(Entry.__slots__, row, strict=True))
    return Entry(**{**fields, "usage_known": bool(fields["usage_known"])})


def _uri_of(path: Path) -> str:
    return path.absolute().as_uri()


def _inode_of(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
