"""The plan of every look-up that must not grow with the store: an index that stops being used fails here."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from storage.sqlite_bounds import ENDED, LEAST_WORTHY
from storage.sqlite_entries import FIND, GET, OF_KEYS
from storage.sqlite_file import create_schema
from storage.sqlite_near import CANDIDATES, SKETCHABLE, UNBAND, UNSKETCHED, VETOED


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        create_schema(opened)
        yield opened


OF_ENTRY = "SEARCH s USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN"
BY_KEY = "SEARCH e USING INDEX sqlite_autoindex_entry_1 (key=?)"
BY_ID = "SEARCH e USING INTEGER PRIMARY KEY (rowid=?)"
BODY = "SEARCH b USING INTEGER PRIMARY KEY (rowid=?)"

PLANS: dict[str, tuple[str, object, list[str]]] = {
    "get": (GET, (b"k" * 32, 1), [BY_KEY, BODY]),
    "find": (
        FIND,
        (b"key", b"kez", 3),
        ["SEARCH e USING INDEX sqlite_autoindex_entry_1 (key>? AND key<?)", BODY],
    ),
    "replace": (
        f"{OF_KEYS} (?, ?)",
        (b"k" * 32, b"l" * 32),
        ["SEARCH e USING COVERING INDEX sqlite_autoindex_entry_1 (key=?)", OF_ENTRY],
    ),
    "expire": (
        ENDED,
        (1, 10),
        ["SEARCH e USING INDEX entry_by_end (<expr><?)", OF_ENTRY],
    ),
    "trim": (
        LEAST_WORTHY,
        (10, 3),
        [
            "MATERIALIZE least",
            "SCAN entry USING INDEX entry_by_worth",
            "MATERIALIZE bar",
            "CO-ROUTINE t",
            "SCAN least",
            "USE TEMP B-TREE FOR DISTINCT",
            "SCAN t",
            "CORRELATED SCALAR SUBQUERY 2",
            "SEARCH o USING COVERING INDEX entry_by_topic (topic=?)",
            "USE TEMP B-TREE FOR RIGHT PART OF ORDER BY",
            "SCAN e",
            "SEARCH bar USING AUTOMATIC COVERING INDEX (topic=?) LEFT-JOIN",
            "SEARCH b USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN",
            "SEARCH s USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN",
            "USE TEMP B-TREE FOR ORDER BY",
        ],
    ),
    # What is scanned and sorted here is no more than the keys asked for and the latest rows of each.
    "candidates": (
        CANDIDATES,
        {"keys": "[1, 2]", "space": b"s" * 32, "now_ms": 1, "per_key": 64, "limit": 10},
        [
            "CO-ROUTINE best",
            "CO-ROUTINE found",
            "SCAN k VIRTUAL TABLE INDEX 1:",
            "SEARCH b USING PRIMARY KEY (key=? AND entry>?)",
            "CORRELATED SCALAR SUBQUERY 1",
            "SEARCH band USING PRIMARY KEY (key=?)",
            "USE TEMP B-TREE FOR GROUP BY",
            "SCAN found",
            BY_ID,
            "USE TEMP B-TREE FOR ORDER BY",
            "SCAN best",
            BY_ID,
            "SEARCH s USING INTEGER PRIMARY KEY (rowid=?)",
            "USE TEMP B-TREE FOR ORDER BY",
        ],
    ),
    "unsketched": (
        UNSKETCHED,
        {"scheme": 1, "limit": 10},
        [
            "COMPOUND QUERY",
            "LEFT-MOST SUBQUERY",
            "SEARCH sketch USING COVERING INDEX sketch_by_scheme (scheme=?)",
            BY_ID,
            "UNION ALL",
            "SEARCH sketch USING COVERING INDEX sketch_by_scheme (scheme<?)",
            BY_ID,
            "UNION ALL",
            "SEARCH sketch USING COVERING INDEX sketch_by_scheme (scheme>?)",
            BY_ID,
        ],
    ),
    "sketched": (f"{SKETCHABLE} (?, ?)", (b"k" * 32, b"l" * 32), [BY_KEY, OF_ENTRY]),
    "remove bands": (UNBAND, (1, 2), ["SEARCH band USING PRIMARY KEY (key=? AND entry=?)"]),
    "vetoed": (f"{VETOED} (?, ?)", (b"1", b"2"), ["SEARCH veto USING PRIMARY KEY (pair=?)"]),
}


@pytest.mark.parametrize(("statement", "parameters", "expected"), PLANS.values(), ids=list(PLANS))
def test_the_plan(connection: sqlite3.Connection, statement: str, parameters: Any, expected: list[str]) -> None:
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    assert plan == expected
