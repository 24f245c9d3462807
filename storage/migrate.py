"""Numbered schema migrations.

One transaction under the write lock holds the ledger look-up, the statements and the new ledger rows, so that any
number of processes may start at once and a failure leaves nothing half-done.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.base import SchemaTooNew

_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")

_LEDGER = """CREATE TABLE IF NOT EXISTS migration (
  number     INTEGER PRIMARY KEY,
  name       TEXT    NOT NULL,
  applied_ms INTEGER NOT NULL
) STRICT"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file of SQL statements."""

    number: int
    name: str
    statements: tuple[str, ...]


def shipped(engine: str) -> tuple[Migration, ...]:
    """The migrations that belong to this program, in order.

    Raises:
        ValueError: a file name is not NNNN_name.sql, or the numbers have a gap.
    """
    here = Path(__file__).parent
    # An installed wheel carries them inside the package, a checkout beside it.
    candidates = (here / "migrations" / engine, here.parent / "migrations" / engine)
    folder = next(path for path in candidates if path.is_dir())
    found = tuple(_read(path) for path in sorted(folder.glob("*.sql")))
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"the migrations in {folder} are not numbered 1, 2, 3, ...")
    return found


def apply(connection: sqlite3.Connection, migrations: tuple[Migration, ...], now_ms: int) -> int:
    """Bring the schema up to date inside the transaction that the caller holds; returns how many were applied.

    Raises:
        SchemaTooNew: the ledger names a migration that this program does not have.
    """
    connection.execute(_LEDGER)
    done = {number for (number,) in connection.execute("SELECT number FROM migration")}
    refuse_newer(max(done, default=0), len(migrations))
    missing = [m for m in migrations if m.number not in done]
    for migration in missing:
        # executescript would commit the open transaction first, so statements run one by one.
        for statement in migration.statements:
            connection.execute(statement)
        row = (migration.number, migration.name, now_ms)
        connection.execute("INSERT INTO migration (number, name, applied_ms) VALUES (?, ?, ?)", row)
    return len(missing)


def refuse_newer(schema: int, known: int) -> None:
    """See to it that nobody works on a schema that is newer than the newest known.

    Raises:
        SchemaTooNew: it is.
    """
    if schema > known:
        raise SchemaTooNew(
            f"the database has schema {schema}, this nearhit knows {known}: start the newer nearhit, "
            "or point cache.file at another file"
        )


def _read(path: Path) -> Migration:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name}: a migration is called NNNN_name.sql")
    return Migration(int(match[1]), path.stem, tuple(_split(path.read_text(encoding="utf-8"))))


def _split(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement.strip()
            statement = ""
    if statement.strip():
        raise ValueError(f"unfinished statement: {statement.strip()[:80]}")
