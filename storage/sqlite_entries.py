"""Entries as rows of SQLite, and every way in which one is added or removed.

The writing functions run inside a transaction that their caller holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from aiosqlite import Connection

from storage.base import Change, Delete, Entry, Put, Sketch, Sketched, Used
from storage.sqlite_near import many, remove_bands, select_in, write_sketches

_READ = """SELECT e.key, e.key_version, e.namespace, e.space, e.upstream, e.fingerprint, e.endpoint, e.model, e.words,
  e.stored_ms, e.expires_ms, e.cost_ms, e.prompt_tokens, e.completion_tokens, e.usage_known, b.answer, e.near
FROM entry AS e JOIN body AS b ON b.entry = e.id"""
GET = f"{_READ} WHERE e.key = ? AND e.expires_ms > ?"
FIND = f"{_READ} WHERE e.key >= ? AND e.key <= ? ORDER BY e.key LIMIT ?"

_PUT = """INSERT INTO entry (key, key_version, namespace, space, upstream, fingerprint, endpoint, model, words,
  stored_ms, expires_ms, cost_ms, prompt_tokens, completion_tokens, usage_known, near, size, used_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_PUT_BODY = "INSERT INTO body (entry, answer) SELECT id, ? FROM entry WHERE key = ?"
_USED = "UPDATE entry SET hits = hits + ?, used_ms = max(used_ms, ?) WHERE key = ?"

# What is to be removed: id, and the band keys that must go along.
_DOOMED = "SELECT e.id, s.keys FROM entry AS e LEFT JOIN sketch AS s ON s.entry = e.id"
OF_KEYS = f"{_DOOMED} WHERE e.key IN"
STALE = f"{_DOOMED} WHERE e.expires_ms <= ? LIMIT ?"
UNUSED = f"{_DOOMED} ORDER BY e.used_ms, e.id LIMIT ?"
_REMOVE = "DELETE FROM entry WHERE id = ?"

_HIGHEST = b"\xff" * 32


async def get(reader: Connection, key: bytes, now_ms: int) -> Entry | None:
    """See `storage.base.Entries.get`."""
    rows = list(await reader.execute_fetchall(GET, (key, now_ms)))
    return _entry(rows[0]) if rows else None


async def find(reader: Connection, key_prefix: bytes, limit: int) -> list[Entry]:
    """See `storage.base.Finding.find`; a prefix of any length."""
    rows = await reader.execute_fetchall(FIND, (key_prefix, key_prefix + _HIGHEST, limit))
    return [_entry(row) for row in rows]


async def write(writer: Connection, changes: Sequence[Change]) -> None:
    """See `storage.base.Entries.write`."""
    net = _net(changes)
    puts = [put for put in net.last.values() if put is not None]
    entries = [put.entry for put in puts]
    # A replaced entry is removed first: SQLite's REPLACE would leave its body behind.
    await _remove(writer, await select_in(writer, OF_KEYS, list(net.last)))
    await many(writer, _PUT, [_row(entry) for entry in entries])
    await many(writer, _PUT_BODY, [(entry.answer, entry.key) for entry in entries])
    await write_sketches(writer, {put.entry.key: put.sketch for put in puts if put.entry.near} | net.sketched)
    await many(writer, _USED, [(used.count, used.now_ms, used.key) for used in net.used.values()])


async def remove_stale(writer: Connection, now_ms: int, limit: int) -> int:
    """Remove at most `limit` entries that were stale at `now_ms`; how many there were."""
    return await _remove(writer, list(await writer.execute_fetchall(STALE, (now_ms, limit))))


async def remove_unused(writer: Connection, limit: int) -> int:
    """Remove the `limit` entries that were unused for longest; how many there were."""
    return await _remove(writer, list(await writer.execute_fetchall(UNUSED, (limit,))))


async def _remove(writer: Connection, doomed: Sequence[Any]) -> int:
    # Every entry that goes, goes here. Its body and sketch follow by their foreign keys.
    await remove_bands(writer, doomed)
    await many(writer, _REMOVE, [(entry,) for entry, _ in doomed])
    return len(doomed)


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


def _row(e: Entry) -> tuple[Any, ...]:
    return (
        *(e.key, e.key_version, e.namespace, e.space, e.upstream, e.fingerprint, e.endpoint, e.model, e.words),
        *(e.stored_ms, e.expires_ms, e.cost_ms, e.prompt_tokens, e.completion_tokens, int(e.usage_known), int(e.near)),
        *(len(e.answer), e.stored_ms),
    )


def _entry(row: Any) -> Entry:
    fields = dict(zip(Entry.__slots__, row, strict=True))
    return Entry(**{**fields, "usage_known": bool(fields["usage_known"]), "near": bool(fields["near"])})
