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
  SELECT id, topic, worth, hits FROM entry ORDER BY worth, id LIMIT :limit
), bar AS MATERIALIZED (
  SELECT t.topic, (
    SELECT o.id FROM entry AS o WHERE o.topic = t.topic AND o.hits > 0
    ORDER BY o.worth DESC, o.id DESC LIMIT 1 OFFSET :top_k - 1
  ) AS last
  FROM (SELECT DISTINCT topic FROM least WHERE hits > 0) AS t
)
SELECT e.id, s.keys, e.worth,
  :top_k > 0 AND e.hits > 0 AND (b.id IS NULL OR (e.worth, e.id) >= (b.worth, b.id))
FROM least AS e LEFT JOIN bar ON bar.topic = e.topic LEFT JOIN entry AS b ON b.id = bar.last
LEFT JOIN sketch AS s ON s.entry = e.id ORDER BY e.worth, e.id"""
_TOPICS = "SELECT count(*) FROM (SELECT 1 FROM topic LIMIT ?)"
_RAISE = "UPDATE ageing SET floor = max(floor, ?)"
_REMOVE = "DELETE FROM entry WHERE id = ?"

_MEASURE = """SELECT (SELECT ifnull(sum(entries), 0) FROM topic), page_count, freelist_count
FROM pragma_page_count, pragma_freelist_count"""
_SPARED = 1000
"""So many of the best of their topics are passed over at most, where all of the least worthy are such."""
_AT_ONCE = 512
_ROUNDS = 4
_WAL_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Measure:
    """How many entries there are, how many pages the database has, and how many of these are free."""

    entries: int
    pages: int
    free: int

    def surplus(self, room: Room, coming: int, wal_bytes: int) -> int:
        """How many entries must go before `coming` more are added, where the log takes `wal_bytes` of the room."""
        count = min(max(self.entries + coming - room.max_entries, 0), self.entries)
        used = (self.pages - self.free) * PAGE_SIZE
        over = used - (room.max_bytes - wal_bytes)
        if over <= 0:
            return count
        # How many entries make up the surplus bytes is an estimate; whoever asks looks again.
        return min(max(count, 1, self.entries * over // used), self.entries)


def wal_allowance(max_bytes: int) -> int:
    """How many bytes of a room are kept for the write-ahead log."""
    return min(_WAL_BYTES, max_bytes // 4)


async def measure(connection: Connection) -> Measure:
    """How full the store is."""
    ((entries, pages, free),) = await connection.execute_fetchall(_MEASURE)
    return Measure(int(entries), int(pages), int(free))


async def make_room(writer: Connection, room: Room, coming: int, wal_bytes: int) -> int:
    """Remove what is too much for the room with `coming` more entries; how many went.

    Where that is very much, a part of it stays.
    """
    removed = 0
    for _ in range(_ROUNDS):
        full = await measure(writer)
        surplus = full.surplus(room, coming, wal_bytes)
        if not surplus:
            break
        removed += await remove_least_worthy(writer, room, min(surplus, _AT_ONCE))
    return removed


async def remove_ended(writer: Connection, now_ms: int, limit: int) -> int:
    """Remove at most `limit` entries whose grace had passed at `now_ms`; how many there were."""
    return await remove(writer, list(await writer.execute_fetchall(ENDED, (now_ms, limit))))


async def remove_least_worthy(writer: Connection, room: Room, limit: int) -> int:
    """Remove `limit` entries: the least worthy but those among the best of their topic, then the least worthy of all.

    The best of all topics together are at most half of what there is room for.
    """
    if limit <= 0:
        return 0
    half = room.max_entries // 2
    ((topics,),) = await writer.execute_fetchall(_TOPICS, (half + 1,))
    parameters = {"top_k": min(room.top_k, half // max(topics, 1)), "limit": limit + _SPARED}
    rows = list(await writer.execute_fetchall(LEAST_WORTHY, parameters))
    # Sorting keeps the order of worth among those that are alike.
    doomed = sorted(rows, key=lambda row: bool(row[3]))[:limit]
    if doomed:
        await writer.execute(_RAISE, (max(worth for _, _, worth, _ in doomed),))
    return await remove(writer, [(entry, keys) for entry, keys, _, _ in doomed])


async def remove(writer: Connection, doomed: Sequence[Any]) -> int:
    """Remove the entries of these ids, given with their packed band keys; how many there were."""
    # Every entry that goes, goes here. Its body and sketch follow by their foreign keys.
    await remove_bands(writer, doomed)
    await many(writer, _REMOVE, [(entry,) for entry, _ in doomed])
    return len(doomed)
