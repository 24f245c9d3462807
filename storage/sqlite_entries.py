"""Entries as rows of SQLite, and every way in which one is added or removed.

The writing functions run inside a transaction that their caller holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from aiosqlite import Connection

from storage.base import Change, Delete, Entry, Put, Room, Sketch, Sketched, Used
from storage.sqlite_bounds import DOOMED, Load, load_of, make_room, remove
from storage.sqlite_near import many, select_in, write_sketches
from storage.worth import USED_SQL, gain

COLUMNS = tuple("b.answer" if field == "answer" else f"e.{field}" for field in Entry.__slots__)
"""Where each field of an entry is, in their order."""

_READ = f"SELECT {', '.join(COLUMNS)} FROM entry AS e JOIN body AS b ON b.entry = e.id"  # noqa: S608 - our own names
GET = f"{_READ} WHERE e.key = ? AND e.expires_ms + e.grace_ms > ?"
FIND = f"{_READ} WHERE e.key >= ? AND e.key <= ? ORDER BY e.key LIMIT ?"

_OWN = tuple(field for field in Entry.__slots__ if field != "answer")
_PUT = f"""INSERT INTO entry ({", ".join(_OWN)}, size, used_ms, hits, worth)
VALUES ({", ".join("?" * (len(_OWN) + 3))}, (SELECT floor FROM ageing) + ?)"""  # noqa: S608 - names of our own
_PUT_BODY = "INSERT INTO body (entry, answer) SELECT id, ? FROM entry WHERE key = ?"
_USED = f"""UPDATE entry SET hits = hits + ?, used_ms = max(used_ms, ?), worth = {USED_SQL}
WHERE key = ?"""  # noqa: S608 - all parts are ours

_LAST = "SELECT ifnull(max(id), 0) FROM entry"
_NO_LIMIT = 1 << 62

OF_KEYS = f"{DOOMED} WHERE e.key IN"

_HIGHEST = b"\xff" * 32


async def get(reader: Connection, key: bytes, now_ms: int) -> Entry | None:
    """See `storage.base.Entries.get`."""
    rows = list(await reader.execute_fetchall(GET, (key, now_ms)))
    return entry_of(rows[0]) if rows else None


async def find(reader: Connection, key_prefix: bytes, limit: int) -> list[Entry]:
    """See `storage.listing.Finding.find`; a prefix of any length."""
    rows = await reader.execute_fetchall(FIND, (key_prefix, key_prefix + _HIGHEST, limit))
    return [entry_of(row) for row in rows]


@dataclass(frozen=True, slots=True)
class Written:
    """How many entries a write replaced or deleted, and how many more went because there was no room."""

    replaced: int
    evicted: int


async def write(writer: Connection, changes: Sequence[Change], room: Room | None, wal_bytes: int) -> Written:
    """See `storage.base.Entries.write`; the log takes `wal_bytes` of the room."""
    net = _net(changes)
    largest = room.max_entry_bytes if room else _NO_LIMIT
    wanted = [put for put in net.last.values() if put is not None]
    puts = [put for put in wanted if _load_of(put) <= largest]
    entries = [put.entry for put in puts]
    # A replaced entry is removed first: SQLite's REPLACE would leave its body behind.
    replaced = await remove(writer, await select_in(writer, OF_KEYS, list(net.last)))
    evicted = len(wanted) - len(puts)
    ((last,),) = await writer.execute_fetchall(_LAST)
    if room and entries:
        # Made before the new ones are there, so that they take the place of the old ones in the file.
        coming = Load(len(entries), sum(map(_load_of, puts)))
        evicted += await make_room(writer, room, coming, wal_bytes, last)
    await many(writer, _PUT, [_row(put) for put in puts])
    await many(writer, _PUT_BODY, [(entry.answer, entry.key) for entry in entries])
    await write_sketches(writer, {put.entry.key: put.sketch for put in puts if put.entry.near} | net.sketched)
    await many(writer, _USED, [_use(used) for used in net.used.values()])
    if room and entries:
        # Each new one is kept for a while at least, however little it is worth yet.
        evicted += await make_room(writer, room, Load(), wal_bytes, last)
    return Written(replaced, evicted)


def _load_of(put: Put) -> int:
    texts = len(put.entry.words or "") + (len(put.sketch.skeleton) if put.sketch else 0)
    return load_of(len(put.entry.answer) + texts, len(put.sketch.keys) if put.sketch else 0)


@dataclass(frozen=True, slots=True)
class _Net:
    """What a run of changes amounts to, so that each kind of statement crosses to the writer's thread once.

    `last` holds the keys that are put or deleted (None), `sketched` and `used` others, or what follows on a put.
    """

    last: dict[bytes, Put | None] = field(default_factory=dict)
    sketched: dict[bytes, Sketch] = field(default_factory=dict)
    used: dict[bytes, Used] = field(default_factory=dict)

    def replace(self, key: bytes, put: Put | None) -> None:
        # Taken out first: among equals, what was written last is the latest.
        self.last.pop(key, None)
        self.last[key] = put
        self.sketched.pop(key, None)
        self.used.pop(key, None)


def _net(changes: Sequence[Change]) -> _Net:
    net = _Net()
    for change in changes:
        match change:
            case Put(entry):
                net.replace(entry.key, change)
            case Delete(key):
                net.replace(key, None)
            case Sketched(key, sketch):
                net.sketched[key] = sketch
            case Used(key, count, now_ms):
                before = net.used.get(key, Used(key, 0, now_ms))
                net.used[key] = Used(key, before.count + count, max(before.now_ms, now_ms))
            case _:
                assert_never(change)
    return net


def _row(put: Put) -> tuple[Any, ...]:
    entry, size = put.entry, len(put.entry.answer)
    gained = gain(entry.cost_ms, size, 1 + put.hits)
    return (*(getattr(entry, name) for name in _OWN), size, entry.stored_ms, put.hits, gained)


def _use(used: Used) -> tuple[Any, ...]:
    return used.count, used.now_ms, used.count, used.key


def entry_of(row: Any) -> Entry:
    """The entry in a row of `COLUMNS`."""
    fields = dict(zip(Entry.__slots__, row, strict=True))
    return Entry(**{**fields, **{name: bool(fields[name]) for name in ("usage_known", "near", "sealed")}})
