"""Entries as a person lists them, in SQLite. Each look goes through a bounded number of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from aiosqlite import Connection

from storage.listing import Listed, Page, Which
from storage.sqlite_entries import COLUMNS, entry_of
from storage.sqlite_near import select_in

_SCANNED = 2000
_SCANNED_TEXT = 500
_BYTES = 8 * 1024 * 1024
_BEYOND = (1 << 63) - 1
_BETWEEN = "\x00"
_KINDS = frozenset({"role", "finish_reason", "object", "type", "model"})
"""Fields of answers that say the same in nearly all of them."""
_WHOLE_KEY = 64
_BEGINNING = 1000
"""Characters of the words that are read where the answers are not; questions may be megabytes long."""

_ANSWER = "(SELECT answer FROM body WHERE entry = e.id)"
_STORED = "SELECT key, stored_ms FROM entry WHERE key IN"


def folded(text: str | bytes | None) -> str:
    """The text without its case, of an answer all texts in it; SQLite's own functions know ASCII only."""
    if not isinstance(text, bytes):
        return (text or "").casefold()
    try:
        # Names of fields are in every answer, and an escape is no letter.
        return _BETWEEN.join(_texts(json.loads(text))).casefold()
    except (ValueError, RecursionError):
        return text.decode("utf-8", "replace").casefold()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in (value[name] for name in value.keys() - _KINDS) if isinstance(value, dict) else value:
            yield from _texts(part)


async def select(reader: Connection, which: Which, mark: int, limit: int, *, newest_first: bool, answers: bool) -> Page:
    """See `storage.listing.Listing.select`; `reader` knows `folded`."""
    scanned = _SCANNED if which.text is None else _SCANNED_TEXT
    rows = await _scan(reader, which, mark, scanned, newest_first=newest_first)
    end = int(rows[-1][0]) if len(rows) == scanned else None
    chosen: list[int] = []
    taken = 0
    for place, size, words, fits in rows:
        if not fits:
            continue
        read = size + words if answers or which.text is not None else 0
        if chosen and (taken + read > _BYTES or (which.text is None and len(chosen) >= limit)):
            end = chosen[-1]
            break
        chosen.append(int(place))
        taken += read
    found = await _listed(reader, which, chosen, answers=answers)
    found = sorted(found, key=lambda listed: listed.mark, reverse=newest_first)
    return Page(tuple(found[:limit]), end if len(found) <= limit else found[limit - 1].mark)


async def stored(reader: Connection, keys: Sequence[bytes]) -> dict[bytes, int]:
    """See `storage.listing.Listing.stored`."""
    return {bytes(key): int(stored_ms) for key, stored_ms in await select_in(reader, _STORED, keys)}


async def _scan(reader: Connection, which: Which, mark: int, scanned: int, *, newest_first: bool) -> Sequence[Any]:
    # Which texts are read is decided by the sizes, so none is read here.
    conditions, parameters = _conditions(replace(which, text=None))
    parameters |= {"mark": mark or (_BEYOND if newest_first else 0), "scanned": scanned}
    prefix = which.key_prefix or ""
    if prefix:
        parameters |= {"low": _key(prefix, "0"), "high": _key(prefix, "f")}
    query = scan(conditions, newest_first=newest_first, by_key=bool(prefix))
    return list(await reader.execute_fetchall(query, parameters))


def scan(conditions: str, *, newest_first: bool, by_key: bool = False) -> str:
    """The query for the entries on one side of a mark: where each is, its sizes, and whether it meets the conditions.

    With `by_key`, only those between two keys.
    """
    # The sign keeps SQLite from going through all entries in their order.
    place, within = ("+e.id", "e.key BETWEEN :low AND :high AND ") if by_key else ("e.id", "")
    beyond, order = ("<", "DESC") if newest_first else (">", "ASC")
    return f"""SELECT e.id, e.size, ifnull(length(CAST(e.words AS BLOB)), 0), {conditions}
    FROM entry AS e WHERE {within}{place} {beyond} :mark ORDER BY {place} {order} LIMIT :scanned"""  # noqa: S608 - ours


def _key(prefix: str, rest: str) -> bytes:
    return bytes.fromhex(prefix.ljust(_WHOLE_KEY, rest))


def _conditions(which: Which) -> tuple[str, dict[str, Any]]:
    text = None if which.text is None else which.text.casefold()
    wanted: list[tuple[str, str, Any]] = [
        ("e.model = :model", "model", which.model),
        ("e.endpoint = :endpoint", "endpoint", which.endpoint),
        ("e.namespace = :namespace", "namespace", which.namespace),
        ("e.fingerprint = :fingerprint", "fingerprint", which.fingerprint),
        ("e.stored_ms < :before", "before", which.stored_before_ms),
        ("e.stored_ms > :after", "after", which.stored_after_ms),
        ("substr(lower(hex(e.key)), 1, length(:prefix)) = :prefix", "prefix", which.key_prefix),
        ("e.sealed = :sealed", "sealed", None if which.sealed is None else int(which.sealed)),
        (f"(instr(folded(e.words), :text) OR (NOT e.sealed AND instr(folded({_ANSWER}), :text)))", "text", text),
    ]
    used = [(sql, name, value) for sql, name, value in wanted if value is not None]
    return " AND ".join(sql for sql, _, _ in used) or "1", {name: value for _, name, value in used}


async def _listed(reader: Connection, which: Which, places: Sequence[int], *, answers: bool) -> list[Listed]:
    # Asked again: in the place of an entry that was removed after the scan, there may be another one.
    conditions, parameters = _conditions(which)
    read = {"b.answer": _ANSWER} if answers else {"b.answer": "x''", "e.words": f"substr(e.words, 1, {_BEGINNING})"}
    columns = ", ".join(read.get(column, column) for column in COLUMNS)
    query = f"""SELECT {columns}, e.id, e.size, e.hits, e.used_ms
    FROM json_each(:places) CROSS JOIN entry AS e ON e.id = value WHERE {conditions}"""  # noqa: S608 - ours
    rows = await reader.execute_fetchall(query, parameters | {"places": json.dumps(places)})
    return [Listed(row[-4], entry_of(row[:-4]), *row[-3:]) for row in rows]
