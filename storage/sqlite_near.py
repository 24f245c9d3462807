"""Sketches, band keys and vetoes in SQLite. The writing functions run inside a transaction that their caller holds.

A row of `band` says that an entry has a band key. Nothing in the schema ties it to its entry, so whoever removes an
entry or its sketch takes the rows along by `remove_bands`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiosqlite import Connection

from storage.base import Candidate, Sketch, StorageCorrupt, Unsketched

# The range of each key begins at its `per_key`th latest entry. Ids grow, so the latest written has the highest.
CANDIDATES = """SELECT e.key, e.words, s.skeleton, best.shared
FROM (
  SELECT e.id, found.shared
  FROM (
    SELECT b.entry, count(*) AS shared
    FROM json_each(:keys) AS k CROSS JOIN band AS b ON b.key = k.value AND b.entry >= ifnull(
      (SELECT entry FROM band WHERE key = k.value ORDER BY entry DESC LIMIT 1 OFFSET :per_key - 1), 0)
    GROUP BY b.entry
  ) AS found CROSS JOIN entry AS e ON e.id = found.entry
  WHERE e.space = :space AND e.expires_ms > :now_ms AND e.near = 1
  ORDER BY found.shared DESC, e.id DESC LIMIT :limit
) AS best CROSS JOIN entry AS e ON e.id = best.id CROSS JOIN sketch AS s ON s.entry = best.id
ORDER BY best.shared DESC, best.id DESC"""

# "Another scheme" as two ranges and the nulls: an inequality would pass over all that is done.
UNSKETCHED = """SELECT e.key, e.space, e.words
FROM (
  SELECT entry FROM sketch WHERE scheme IS NULL
  UNION ALL SELECT entry FROM sketch WHERE scheme < :scheme
  UNION ALL SELECT entry FROM sketch WHERE scheme > :scheme
) AS todo CROSS JOIN entry AS e ON e.id = todo.entry LIMIT :limit"""

VETOED = "SELECT 1 FROM veto WHERE pair IN"
_VETO = "INSERT OR IGNORE INTO veto (pair, noted_ms) VALUES (?, ?)"

SKETCHABLE = """SELECT e.id, e.key, s.keys FROM entry AS e LEFT JOIN sketch AS s ON s.entry = e.id
WHERE e.near = 1 AND e.words IS NOT NULL AND e.key IN"""
_SKETCH = "INSERT OR REPLACE INTO sketch (entry, scheme, skeleton, keys) VALUES (?, ?, ?, ?)"
_BAND = "INSERT OR IGNORE INTO band (key, entry) VALUES (?, ?)"
UNBAND = "DELETE FROM band WHERE key = ? AND entry = ?"

_SCHEME = """INSERT INTO scheme (id, description, noted_ms) VALUES (?, ?, ?)
ON CONFLICT (id) DO UPDATE SET description = excluded.description"""

_AT_ONCE = 500

INVARIANTS = (
    (
        "SELECT count(*) FROM entry WHERE near = 1 AND words IS NOT NULL AND id NOT IN (SELECT entry FROM sketch)",
        "near entries that will never be sketched",
    ),
    (
        "SELECT count(*) FROM sketch WHERE entry NOT IN (SELECT id FROM entry WHERE near = 1 AND words IS NOT NULL)",
        "sketches without a near entry",
    ),
    ("SELECT count(*) FROM band WHERE entry NOT IN (SELECT entry FROM sketch)", "band keys without a sketch"),
    (
        """SELECT count(*) FROM sketch
        LEFT JOIN (SELECT entry AS id, count(*) AS bands FROM band GROUP BY entry) ON id = entry
        WHERE length(keys) <> 8 * ifnull(bands, 0)""",
        "sketches with too few or too many band keys",
    ),
)


async def candidates(
    reader: Connection, space: bytes, keys: Iterable[int], now_ms: int, per_key: int, limit: int
) -> list[Candidate]:
    """See `storage.base.Sketches.candidates`."""
    parameters = {
        "keys": json.dumps(sorted(set(keys))),
        "space": space,
        "now_ms": now_ms,
        "per_key": per_key,
        "limit": limit,
    }
    return [Candidate(*row) for row in await reader.execute_fetchall(CANDIDATES, parameters)]


async def unsketched(reader: Connection, scheme: int, limit: int) -> list[Unsketched]:
    """See `storage.base.Sketches.unsketched`."""
    rows = await reader.execute_fetchall(UNSKETCHED, {"scheme": scheme, "limit": limit})
    return [Unsketched(*row) for row in rows]


async def record_scheme(writer: Connection, scheme: int, description: str, now_ms: int) -> None:
    """See `storage.base.Sketches.record_scheme`."""
    await writer.execute(_SCHEME, (scheme, description, now_ms))


async def schemes(reader: Connection) -> dict[int, str]:
    """See `storage.base.Sketches.schemes`."""
    rows = await reader.execute_fetchall("SELECT id, description FROM scheme")
    return {int(scheme): str(description) for scheme, description in rows}


async def vetoed(reader: Connection, pairs: Sequence[bytes]) -> bool:
    """See `storage.base.Vetoes.vetoed`."""
    return bool(await select_in(reader, VETOED, pairs))


async def veto(writer: Connection, pairs: Iterable[bytes], now_ms: int) -> None:
    """See `storage.base.Vetoes.veto`."""
    await writer.executemany(_VETO, [(pair, now_ms) for pair in pairs])


async def write_sketches(writer: Connection, sketches: Mapping[bytes, Sketch | None]) -> None:
    """Set the sketches of the entries of these keys that are near and have words; None is one yet to be made."""
    rows = await select_in(writer, SKETCHABLE, list(sketches))
    await remove_bands(writer, [(entry, packed) for entry, _, packed in rows])
    made = [(entry, sketches[key]) for entry, key, _ in rows]
    await many(writer, _SKETCH, [(entry, *_fields(sketch)) for entry, sketch in made])
    # In the order of the table, so that a page is written once.
    bands = sorted({(key, entry) for entry, sketch in made if sketch is not None for key in sketch.keys})
    await many(writer, _BAND, bands)


async def remove_bands(writer: Connection, owners: Iterable[tuple[int, bytes | None]]) -> None:
    """Remove the band rows of entries, given by id and packed keys (None: no sketch)."""
    await many(writer, UNBAND, sorted((key, entry) for entry, packed in owners if packed for key in _keys(packed)))


async def select_in(connection: Connection, query: str, values: Sequence[Any]) -> list[Any]:
    """The rows of a query that ends in IN, over any number of values."""
    rows: list[Any] = []
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        rows += await connection.execute_fetchall(f"{query} ({', '.join('?' * len(part))})", part)
    return rows


async def many(writer: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Run the statement for each row; for none, spare the trip to the writer's thread."""
    if rows:
        await writer.executemany(statement, rows)


def _fields(sketch: Sketch | None) -> tuple[int | None, str, bytes]:
    if sketch is None:
        return None, "", b""
    packed = b"".join(key.to_bytes(8, "little", signed=True) for key in sorted(set(sketch.keys)))
    return sketch.scheme, sketch.skeleton, packed


def _keys(packed: bytes) -> tuple[int, ...]:
    if len(packed) % 8:
        raise StorageCorrupt("a sketch has half a key")
    return struct.unpack(f"<{len(packed) // 8}q", packed)
