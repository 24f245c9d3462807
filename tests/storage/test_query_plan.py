"""The plan of every look-up that must not grow with the store: an index that stops being used fails here."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from storage.sqlite import EXPIRE, GET, TRIM
from storage.sqlite_file import create_schema


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        create_schema(opened)
        yield opened


@pytest.mark.parametrize(
    ("statement", "parameters", "expected"),
    [
        (
            GET,
            (b"k" * 32, 1),
            [
                "SEARCH e USING INDEX sqlite_autoindex_entry_1 (key=?)",
                "SEARCH b USING INTEGER PRIMARY KEY (rowid=?)",
            ],
        ),
        (
            EXPIRE,
            (1, 10),
            [
                "SEARCH entry USING INTEGER PRIMARY KEY (rowid=?)",
                "LIST SUBQUERY 1",
                "SEARCH entry USING COVERING INDEX entry_by_expiry (expires_ms<?)",
            ],
        ),
        (
            TRIM,
            (10,),
            [
                "SEARCH entry USING INTEGER PRIMARY KEY (rowid=?)",
                "LIST SUBQUERY 1",
                "SCAN entry USING COVERING INDEX entry_by_use",
            ],
        ),
    ],
    ids=["get", "expire", "trim"],
)
def test_the_plan(
    connection: sqlite3.Connection, statement: str, parameters: tuple[object, ...], expected: list[str]
) -> None:
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    assert plan == expected
