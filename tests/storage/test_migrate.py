"""Migrations: released ones never change, a failed one leaves nothing, any number of processes may start at once."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage import migrate
from storage.base import SchemaTooNew
from storage.migrate import Migration, apply, shipped
from storage.sqlite_file import prepare
from tests.storage.engines import NOW
from tests.storage.files import query, run_python, start_python

RELEASED = {
    # Never edit a released migration: databases out there have run it. Add a new one instead.
    "0001_entries": "bfec1139da5868051ecf6d580ad0b2d097d62c7187a6a5a92f799177942da9c9",
    "0002_near": "06c13cd56a8698f9d58872df8f226b9c8b949625b6b6c30463e4cb9f9dea28fa",
    "0003_worth": "dfdb2709620316e08b7e9c12983f4e0eea2426ee94a89828004e125657548940",
}


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        yield opened


def test_released_migrations_are_as_they_were() -> None:
    folder = Path(migrate.__file__).parent.parent / "migrations" / "sqlite"
    digests = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*")}
    assert digests == RELEASED


def test_names_are_numbered_without_gaps() -> None:
    found = shipped("sqlite")
    assert [m.name for m in found] == sorted(RELEASED)
    assert [m.number for m in found] == [int(m.name[:4]) for m in found] == list(range(1, len(found) + 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Migrations of an engine called "other"."""
    monkeypatch.setattr(migrate, "__file__", str(tmp_path / "migrate.py"))
    made = tmp_path / "migrations" / "other"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["0001_a.sql", "0003_c.sql"], "numbered"),
        (["0002_a.sql"], "numbered"),
        (["0001_a.sql", "0001_b.sql"], "numbered"),
        (["1_a.sql"], "called"),
        (["0001_A.sql"], "called"),
        (["0001.sql"], "called"),
    ],
)
def test_a_badly_named_migration_is_found_at_once(folder: Path, names: list[str], why: str) -> None:
    for name in names:
        (folder / name).write_text("SELECT 1;\n")
    with pytest.raises(ValueError, match=why):
        shipped("other")


def test_a_script_is_split_at_the_ends_of_its_statements(folder: Path) -> None:
    trigger = "CREATE TRIGGER t AFTER INSERT ON a BEGIN\n  DELETE FROM b; -- one;\n  SELECT ';';\nEND;"
    (folder / "0001_a.sql").write_text(f"-- é; not a statement\nCREATE TABLE a (x);\n\n{trigger}\n", encoding="utf-8")
    (only,) = shipped("other")
    assert only.statements == ("-- é; not a statement\nCREATE TABLE a (x);", trigger)


def test_an_unfinished_statement_is_found_at_once(folder: Path) -> None:
    (folder / "0001_a.sql").write_text("CREATE TABLE a (x);\nCREATE TABLE b (x)\n")
    with pytest.raises(ValueError, match="CREATE TABLE b"):
        shipped("other")


ONE = Migration(1, "0001_one", ("CREATE TABLE one (x)",))
TWO = Migration(2, "0002_two", ("CREATE TABLE two (x)", "INSERT INTO two VALUES (2)"))
BROKEN = Migration(3, "0003_broken", ("CREATE TABLE three (x)", "INSERT INTO nowhere VALUES (1)"))


def tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def ledger(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT number, name, applied_ms FROM migration ORDER BY number").fetchall()


def test_only_missing_migrations_are_applied(connection: sqlite3.Connection) -> None:
    assert apply(connection, (ONE,), NOW) == 1
    assert apply(connection, (ONE, TWO), NOW + 5) == 1
    assert apply(connection, (ONE, TWO), NOW + 9) == 0
    assert ledger(connection) == [(1, "0001_one", NOW), (2, "0002_two", NOW + 5)]
    assert connection.execute("SELECT x FROM two").fetchall() == [(2,)]


def test_a_failure_in_the_middle_leaves_nothing(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        apply(connection, (ONE, TWO, BROKEN), NOW)
    assert connection.in_transaction
    connection.execute("ROLLBACK")
    assert tables(connection) == set()


def test_a_newer_ledger_is_refused(connection: sqlite3.Connection) -> None:
    apply(connection, (ONE, TWO), NOW)
    with pytest.raises(SchemaTooNew, match="schema 2"):
        apply(connection, (ONE,), NOW)


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nearhit.db"
    prepare(path)
    before = path.read_bytes()
    broken = (
        *shipped("sqlite"),
        Migration(len(RELEASED) + 1, "9999_broken", ("CREATE TABLE more (x)", "SELECT nonsense FROM nowhere")),
    )
    with monkeypatch.context() as patch:
        patch.setattr("storage.sqlite_file.shipped", lambda _: broken)
        with pytest.raises(Exception, match="nowhere"):
            prepare(path)
    assert path.read_bytes() == before
    prepare(path)


def test_a_first_opening_that_fails_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nearhit.db"
    with monkeypatch.context() as patch:
        patch.setattr("storage.sqlite_file.shipped", lambda _: (ONE, TWO, BROKEN))
        with pytest.raises(Exception, match="nowhere"):
            prepare(path)
    prepare(path)
    assert [name for (name,) in query(path, "SELECT name FROM migration")] == sorted(RELEASED)


def test_the_ledger_of_a_new_file_tells_what_was_applied(tmp_path: Path) -> None:
    path = tmp_path / "nearhit.db"
    prepare(path)
    prepare(path)
    rows = query(path, "SELECT number, name, applied_ms > 1700000000000 FROM migration ORDER BY number")
    assert rows == [(number, name, 1) for number, name in enumerate(sorted(RELEASED), 1)]


START = """
import sys
from pathlib import Path
from storage.sqlite_file import prepare

print("ready", flush=True)
for path in sys.stdin:
    try:
        prepare(Path(path.strip()), suspect=sys.argv[1] == "suspect")
        print("opened", flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"""


@pytest.mark.parametrize("suspect", ["plain", "suspect"])
def test_many_processes_may_open_one_new_file_at_once(tmp_path: Path, suspect: str) -> None:
    processes = [start_python(START, suspect) for _ in range(16)]
    try:
        assert {process.stdout.readline() for process in processes if process.stdout} == {"ready\n"}
        for repetition in range(8):
            path = tmp_path / str(repetition) / "nearhit.db"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{path}\n")
                process.stdin.flush()
            answers = [process.stdout.readline() for process in processes if process.stdout]
            assert answers == ["opened\n"] * 16
            assert [name for (name,) in query(path, "SELECT name FROM migration")] == sorted(RELEASED)
            assert query(path, "PRAGMA integrity_check") == [("ok",)]
    finally:
        for process in processes:
            process.communicate()


def test_an_installed_program_finds_its_migrations(tmp_path: Path) -> None:
    code = "import sys; from storage.migrate import shipped; print(*(m.name for m in shipped('sqlite')))"
    assert run_python(code).stdout.split() == sorted(RELEASED)
