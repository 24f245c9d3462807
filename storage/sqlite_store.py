"""A `storage.store.Store` on open SQLite connections."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import aiosqlite

from storage import sqlite_bounds, sqlite_entries, sqlite_listing, sqlite_near
from storage.base import Candidate, Change, Entry, Room, StorageUnavailable, Totals, Unsketched
from storage.leadership import Leadership
from storage.listing import MIN_PREFIX, Page, Which
from storage.migrate import refuse_newer
from storage.sqlite_file import PAGE_SIZE, our_errors, translated
from storage.sqlite_invariants import INVARIANTS

Inode = tuple[int, int]
"""Device and number of a file."""

KEYS = "SELECT id, key FROM entry WHERE id > ? ORDER BY id LIMIT ?"


@dataclass(frozen=True, slots=True)
class Handles:
    """What a store is made of: connections, and what was found on opening.

    `walker` reads what may take long, so that `reader`, which hits wait for, never does. `path` and `leadership` are
    None in memory; `inode` is the file's; `schema` is the newest that this program knows.
    """

    reader: aiosqlite.Connection
    walker: aiosqlite.Connection
    writer: aiosqlite.Connection
    path: Path | None
    inode: Inode | None
    leadership: Leadership | None
    schema: int
    overwrites_deleted: bool


class SqliteStore:
    """A `storage.store.Store` on SQLite connections."""

    def __init__(self, handles: Handles) -> None:
        """Use these."""
        self._handles = handles
        self._reader = handles.reader
        self._walker = handles.walker
        self._writer = handles.writer
        self._path = handles.path
        self.inode = handles.inode
        self.log_inode: Inode | None = None
        """The write-ahead log's, as `lost` saw it last beside a file that was not lost."""
        self._turn = asyncio.Lock()
        self._seen = -1
        self._wal_bytes = 0

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """See `Entries.get`."""
        async with self._reading() as reader:
            return await sqlite_entries.get(reader, key, now_ms)

    async def write(self, changes: Sequence[Change], room: Room | None = None) -> int:
        """See `Entries.write`."""
        moved = 0
        async with self._transaction() as writer:
            wal_bytes = await self._wal_share(room) if room else 0
            written = await sqlite_entries.write(writer, changes, room, wal_bytes)
            if written.replaced:
                ((moved,),) = await writer.execute_fetchall(_MOVE)
        self._moved_by_us(moved)
        return written.evicted

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
        async with self._walking() as walker:
            rows = list(await walker.execute_fetchall(KEYS, (mark, limit)))
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

    async def leads(self) -> bool:
        """See `Bounds.leads`."""
        with _ours():
            leadership = self._handles.leadership
            return leadership is None or await asyncio.to_thread(leadership.held)

    async def expire(self, now_ms: int, limit: int) -> int:
        """See `Bounds.expire`."""
        async with self._transaction() as writer:
            return await sqlite_bounds.remove_ended(writer, now_ms, limit)

    async def trim(self, room: Room, limit: int) -> int:
        """See `Bounds.trim`."""
        # Counted under the lock: somebody else, or another process, may trim at the same moment.
        async with self._transaction() as writer:
            wal_bytes = await self._wal_share(room)
            surplus = (await sqlite_bounds.measure(writer)).surplus(room, sqlite_bounds.Load(), wal_bytes)
            return await sqlite_bounds.remove_least_worthy(writer, room, surplus, limit)

    async def give_back(self, limit: int) -> int:
        """See `Bounds.give_back`."""
        async with self._walking() as walker:
            before = await sqlite_bounds.measure(walker)
        if not before.free and not self._handles.overwrites_deleted:
            return 0
        pages = max(limit // PAGE_SIZE, 1)
        async with self._turn:
            with _ours():
                await self._refuse_newer(self._writer)
                # Each step of this statement frees one page; `execute` would take a single step.
                await self._writer.executescript(f"PRAGMA incremental_vacuum({pages})")
                # The file shrinks when the log is worked in, and the log when it is used anew.
                how = "TRUNCATE" if self._handles.overwrites_deleted else "PASSIVE"
                await self._writer.execute_fetchall(f"PRAGMA wal_checkpoint({how})")
                after = await sqlite_bounds.measure(self._writer)
        return max(before.pages - after.pages, 0) * PAGE_SIZE

    async def rewrite(self) -> None:
        """See `Shredding.rewrite`."""
        async with self._turn:
            with _ours():
                await self._refuse_newer(self._writer)
                await self._writer.execute_fetchall("VACUUM")
                await self._writer.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")

    async def replaced_elsewhere(self) -> bool:
        """See `Coherence.replaced_elsewhere`."""
        async with self._reading() as reader:
            ((moved,),) = await reader.execute_fetchall("SELECT moved FROM generation")
        # What this process moved itself is seen already, unless others moved it in between.
        elsewhere, self._seen = moved > self._seen, max(moved, self._seen)
        return bool(elsewhere)

    async def announce(self) -> None:
        """See `Coherence.announce`."""
        async with self._transaction() as writer:
            ((moved,),) = await writer.execute_fetchall(_MOVE)
        self._moved_by_us(moved)

    def _moved_by_us(self, moved: int) -> None:
        # 0: it was not moved.
        if moved and moved == self._seen + 1:
            self._seen = moved

    async def select(
        self, which: Which, mark: int, limit: int, *, newest_first: bool = False, answers: bool = False
    ) -> Page:
        """See `Listing.select`."""
        async with self._walking() as walker:
            return await sqlite_listing.select(walker, which, mark, limit, newest_first=newest_first, answers=answers)

    async def stored(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """See `Listing.stored`."""
        async with self._walking() as walker:
            return await sqlite_listing.stored(walker, keys)

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
        """See `Inspection.totals`."""
        async with self._walking() as walker:
            full = await sqlite_bounds.measure(walker)
        log_bytes = 0 if self._path is None else await asyncio.to_thread(_size_of, self._path)
        return Totals(full.entries, full.pages * PAGE_SIZE + log_bytes)

    async def problems(self) -> list[str]:
        """See `Inspection.problems`."""
        found: list[str] = []
        async with self._walking() as walker:
            for (verdict,) in await walker.execute_fetchall("PRAGMA integrity_check"):
                if verdict != "ok":
                    found.append(f"integrity: {verdict}")
            for query, what in INVARIANTS:
                ((count,),) = await walker.execute_fetchall(query)
                if count:
                    found.append(f"{count} {what}")
        return found

    async def lost(self) -> bool:
        """See `Inspection.lost`.

        Raises:
            SchemaTooNew: a newer nearhit has taken it over.
        """
        async with self._reading() as reader:
            await self._refuse_newer(reader)
        if self._path is None:
            return False
        is_lost = await asyncio.to_thread(inode_of, self._path) != self.inode
        if not is_lost:
            # By now it is there, because this has read.
            self.log_inode = await asyncio.to_thread(inode_of, log_of(self._path))
        return is_lost

    async def _wal_share(self, room: Room) -> int:
        """How many bytes of the room the log may take; from now on, it is worked in at an eighth of that."""
        if self._path is None:
            return 0
        wal_bytes = room.log_bytes
        if wal_bytes != self._wal_bytes:
            await self._writer.execute_fetchall(f"PRAGMA wal_autocheckpoint = {max(wal_bytes // 8 // PAGE_SIZE, 1)}")
            await self._writer.execute_fetchall(f"PRAGMA journal_size_limit = {wal_bytes // 2}")
            self._wal_bytes = wal_bytes
        return wal_bytes

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[aiosqlite.Connection]:
        # In memory, SQLite has no readers beside a writer: wait for our own writes instead of failing as busy.
        async with self._turn if self._path is None else contextlib.nullcontext():
            with _ours():
                yield self._reader

    @asynccontextmanager
    async def _walking(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._turn if self._path is None else contextlib.nullcontext():
            with _ours():
                yield self._walker

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self._turn:
            try:
                with _ours():
                    await self._writer.execute("BEGIN IMMEDIATE")
                    # A newer nearhit may have changed the schema while this one runs.
                    await self._refuse_newer(self._writer)
                    yield self._writer
                    await self._writer.execute("COMMIT")
            except BaseException:
                await asyncio.shield(self._undo())
                raise

    async def _refuse_newer(self, connection: aiosqlite.Connection) -> None:
        ((schema,),) = await connection.execute_fetchall("SELECT max(number) FROM migration")
        refuse_newer(int(schema), self._handles.schema)

    async def _undo(self) -> None:
        # An error such as "disk full" has already rolled back by itself.
        with contextlib.suppress(sqlite3.Error, ValueError):
            await self._writer.execute("ROLLBACK")


_MOVE = "UPDATE generation SET moved = moved + 1 RETURNING moved"


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


def _size_of(path: Path) -> int:
    try:
        return log_of(path).stat().st_size
    except OSError:
        return 0


def log_of(path: Path) -> Path:
    """The write-ahead log of a database."""
    return path.with_name(f"{path.name}-wal")


def inode_of(path: Path) -> Inode | None:
    """What tells a file from another one under the same name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
