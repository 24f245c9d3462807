"""What goes from a SQLite store and why: expired entries, and the least worthy where a bound is exceeded.

What removes runs inside a transaction that its caller holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiosqlite import Connection

from storage.base import Room
from storage.sqlite_file import PAGE_SIZE
from storage.sqlite_near import many, remove_bands

# What is to be removed: id, and the band keys that must go along.
DOOMED = "SELECT e.id, s.keys FROM entry AS e LEFT JOIN sketch AS s ON s.entry = e.id"
ENDED = f"{DOOMED} WHERE e.expires_ms + e.grace_ms <= ? LIMIT ?"
# The last column says whether it is among the best of its topic: one that was never asked for again is not.
LEAST_WORTHY = """WITH least AS MATERIALIZED (
  SELECT id, topic, worth, hits, size FROM entry ORDER BY worth, id LIMIT ?1
), bar AS MATERIALIZED (
  SELECT t.topic, (
    SELECT o.id FROM entry AS o WHERE o.topic = t.topic AND o.hits > 0
    ORDER BY o.worth DESC, o.id DESC LIMIT 1 OFFSET ?2 - 1
  ) AS last
  FROM (SELECT DISTINCT topic FROM least WHERE hits > 0) AS t
)
SELECT e.id, s.keys, e.worth, e.size,
  ?2 > 0 AND e.hits > 0 AND (b.id IS NULL OR (e.worth, e.id) >= (b.worth, b.id))
FROM least AS e LEFT JOIN bar ON bar.topic = e.topic LEFT JOIN entry AS b ON b.id = bar.last
LEFT JOIN sketch AS s ON s.entry = e.id ORDER BY e.worth, e.id"""
_TOPICS = "SELECT count(*) FROM (SELECT 1 FROM topic LIMIT ?)"
_RAISE = "UPDATE ageing SET floor = max(floor, ?)"
_REMOVE = "DELETE FROM entry WHERE id = ?"

_MEASURE = """SELECT (SELECT ifnull(sum(entries), 0) FROM topic), page_count, freelist_count
FROM pragma_page_count, pragma_freelist_count"""
_NEVER = (1 << 63) - 1
_FIRST_LOOK = 32
_SPARED = 1000
"""So many of the best of their topics are passed over at most, where all of the least worthy are such."""
_AT_ONCE = 512
_ROUNDS = 6
_ROW_BYTES = 1000
_BAND_BYTES = 40
"""At least what an entry takes on disk beside its answer, and each band key: where more must go, a look follows."""


@dataclass(frozen=True, slots=True)
class Measure:
    """How many entries there are, how many pages the database has, and how many of these are free."""

    entries: int
    pages: int
    free: int

    def surplus(self, room: Room, coming: Load, wal_bytes: int) -> Load:
        """What must go before more comes, where the log takes `wal_bytes` of the room."""
        used = (self.pages - self.free) * PAGE_SIZE
        return Load(
            min(max(self.entries + coming.entries - room.max_entries, 0), self.entries),
            max(used + coming.bytes - (room.max_bytes - wal_bytes), 0) if self.entries else 0,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A number of entries and, apart from them, of bytes on disk."""

    entries: int = 0
    bytes: int = 0


def load_of(answer_bytes: int, keys: int) -> int:
    """About how many bytes an entry with so many band keys takes on disk."""
    return answer_bytes + _ROW_BYTES + _BAND_BYTES * keys


async def measure(connection: Connection) -> Measure:
    """How full the store is."""
    ((entries, pages, free),) = await connection.execute_fetchall(_MEASURE)
    return Measure(int(entries), int(pages), int(free))


async def make_room(writer: Connection, room: Room, coming: Load, wal_bytes: int, spared_after: int) -> int:
    """Remove what is too much for the room with what is coming; how many went.

    Where that is very much, a part of it stays. Entries after the id `spared_after` go last.
    """
    removed = 0
    for _ in range(_ROUNDS):
        surplus = (await measure(writer)).surplus(room, coming, wal_bytes)
        if surplus == Load():
            break
        removed += await remove_least_worthy(writer, room, surplus, _AT_ONCE, spared_after)
    return removed


async def remove_ended(writer: Connection, now_ms: int, limit: int) -> int:
    """Remove at most `limit` entries whose grace had passed at `now_ms`; how many there were."""
    return await remove(writer, list(await writer.execute_fetchall(ENDED, (now_ms, limit))))


async def remove_least_worthy(
    writer: Connection, room: Room, surplus: Load, limit: int, spared_after: int = _NEVER
) -> int:
    """Remove about the surplus, at most `limit` entries; how many it were.

    The least worthy go first but those among the best of their topic and those after the id `spared_after`, then the
    least worthy of all. The best of all topics together are at most half of what there is room for.
    """
    if surplus == Load() or limit <= 0:
        return 0
    half = room.max_entries // 2
    ((topics,),) = await writer.execute_fetchall(_TOPICS, (half + 1,))
    top_k = min(room.top_k, half // max(topics, 1))
    looked_at = _FIRST_LOOK
    while True:
        rows = [_Doomed(*row) for row in await writer.execute_fetchall(LEAST_WORTHY, (looked_at, top_k))]
        plain = [row for row in rows if row.entry <= spared_after and not row.is_best]
        is_enough = len(plain) >= min(surplus.entries, limit) and sum(row.load for row in plain) >= surplus.bytes
        if is_enough or len(rows) < looked_at or looked_at >= limit + _SPARED:
            break
        looked_at = min(4 * looked_at, limit + _SPARED)
    # Sorting keeps the order of worth among those that are alike.
    rows.sort(key=lambda row: (row.entry > spared_after, row.is_best))
    doomed = _until_enough(rows[:limit], surplus)
    if doomed:
        await writer.execute(_RAISE, (max(row.worth for row in doomed),))
    return await remove(writer, [(row.entry, row.keys) for row in doomed])


@dataclass(frozen=True, slots=True)
class _Doomed:
    entry: int
    keys: bytes | None
    worth: float
    size: int
    is_best: bool

    @property
    def load(self) -> int:
        return load_of(self.size, len(self.keys or b"") // 8)


def _until_enough(rows: Sequence[_Doomed], surplus: Load) -> list[_Doomed]:
    doomed: list[_Doomed] = []
    freed = 0
    for row in rows:
        if len(doomed) >= surplus.entries and freed >= surplus.bytes:
            break
        doomed.append(row)
        freed += row.load
    return doomed


async def remove(writer: Connection, doomed: Sequence[Any]) -> int:
    """Remove the entries of these ids, given with their packed band keys; how many there were."""
    # Every entry that goes, goes here. Its body and sketch follow by their foreign keys.
    await remove_bands(writer, doomed)
    await many(writer, _REMOVE, [(entry,) for entry, _ in doomed])
    return len(doomed)
