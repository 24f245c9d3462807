"""nearhit migrate and nearhit backup, as people and programs run them, with and without a running nearhit."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from storage.base import Put
from storage.migrate import shipped
from storage.sqlite import open_sqlite
from storage.sqlite_offline import schema_of
from tests.conftest import StartProxy
from tests.fake_model import FakeModel
from tests.program.test_cli import PROGRAM, Ran, run, run_async
from tests.program.test_serve import serving
from tests.storage.engines import NOW, entry, key, near, sketch
from tests.storage.files import damage, damage_all_but_header, run_python, snapshot
from tests.web.test_explain import ask, asking, written

DATA = Path(__file__).parents[1] / "storage" / "data"
NAMES = [migration.name for migration in shipped("sqlite")]
SCHEMA = len(NAMES)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound database of 20 entries where the program looks for it."""
    path = tmp_path / ".local" / "share" / "nearhit" / "nearhit.db"
    asyncio.run(fill(path))
    return path


@pytest.fixture
def old(file: Path) -> Path:
    """The same place with what an old release has left there."""
    shutil.copyfile(DATA / "v2.db", file)
    return file


async def fill(path: Path) -> None:
    async with open_sqlite(path) as store:
        await store.write([Put(near(n, answer=b"x" * 2000), sketch(n, n + 1)) for n in range(1, 21)])


async def count(path: Path) -> int:
    async with open_sqlite(path) as store:
        assert await store.problems() == []
        return (await store.totals()).entries


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


# nearhit migrate


def test_a_file_that_is_up_to_date(tmp_path: Path, file: Path) -> None:
    before = snapshot(file.parent)
    assert run(tmp_path, "migrate") == Ran(0, f"{file} has schema {SCHEMA}: up to date\n", "")
    told = json.loads(run(tmp_path, "migrate", "--json").out)
    assert told == {
        "file": str(file),
        "schema": SCHEMA,
        "known": SCHEMA,
        "missing": [],
        "applied": 0,
        "backup": None,
    }
    assert snapshot(file.parent) == before


def test_a_dry_run_tells_what_is_missing_and_does_nothing(tmp_path: Path, old: Path) -> None:
    before = snapshot(old.parent)
    ran = run(tmp_path, "migrate", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert f"{old} has schema 2, this nearhit has {SCHEMA}" in ran.out
    assert "0003_worth" in ran.out
    assert "nothing was done" in ran.out
    assert snapshot(old.parent) == before


def test_an_old_file_is_brought_up_to_date_and_kept_as_it_was(tmp_path: Path, old: Path) -> None:
    kept = old.with_name("nearhit.db.schema-2.bak")
    ran = run(tmp_path, "migrate")
    assert (ran.code, ran.err) == (0, "")
    assert f"kept as it was: {kept}\nup to date now: {SCHEMA - 2} applied\n" in ran.out
    assert schema_of(old).missing == ()
    assert schema_of(kept).number == 2
    assert kept.stat().st_mode & 0o777 == 0o600
    assert old.stat().st_mode & 0o777 == 0o600
    assert asyncio.run(count(old)) == asyncio.run(count(kept)) > 0


def test_an_earlier_copy_is_never_replaced(tmp_path: Path, old: Path) -> None:
    kept = old.with_name("nearhit.db.schema-2.bak")
    kept.write_bytes(b"precious")
    told = json.loads(run(tmp_path, "migrate", "--json").out)
    assert told["backup"] == str(old.with_name("nearhit.db.schema-2-2.bak"))
    assert told["missing"] == NAMES[2:]
    assert told["applied"] == SCHEMA - 2
    assert kept.read_bytes() == b"precious"


def test_a_copy_can_be_left_out(tmp_path: Path, old: Path) -> None:
    ran = run(tmp_path, "migrate", "--no-backup", "--cache-file", str(old))
    assert ran.code == 0
    assert not list(old.parent.glob("*.bak"))
    assert schema_of(old).missing == ()


def test_a_newer_file_is_left_alone(tmp_path: Path, file: Path) -> None:
    execute(file, "INSERT INTO migration VALUES (99, '0099_later', 1)")
    before = snapshot(file.parent)
    for more in ((), ("--dry-run",)):
        ran = run(tmp_path, "migrate", *more)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert "the database has schema 99" in ran.err
        assert "start the newer nearhit" in ran.err
    assert snapshot(file.parent) == before


@pytest.mark.parametrize("command", [("migrate",), ("backup", "copy.db")])
@pytest.mark.parametrize(
    ("content", "hint"), [("my diary\n", "is not a nearhit database"), ('{"a": 1}\n', "nearhit import")]
)
def test_what_is_not_ours_is_exit_code_2(tmp_path: Path, command: tuple[str, ...], content: str, hint: str) -> None:
    notes = tmp_path / "notes"
    notes.write_text(content)
    ran = run(tmp_path, *command, "--cache-file", str(notes))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert hint in ran.err
    assert notes.read_text() == content


@pytest.mark.parametrize("command", [("migrate",), ("backup", "copy.db")])
def test_a_damaged_file_is_exit_code_1_with_what_to_do(tmp_path: Path, file: Path, command: tuple[str, ...]) -> None:
    damage(file, 0, b"\xff" * 60)
    before = snapshot(file.parent)
    ran = run(tmp_path, *command)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert f"{file} is corrupt" in ran.err
    assert "docs/troubles.md" in ran.err
    assert snapshot(file.parent) == before
    assert not (tmp_path / "copy.db").exists()


def test_a_damaged_old_file_is_not_migrated(tmp_path: Path, old: Path) -> None:
    damage_all_but_header(old)
    before = snapshot(old.parent)
    ran = run(tmp_path, "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert snapshot(old.parent) == before


@pytest.mark.parametrize("command", [("migrate",), ("backup", "copy.db")])
def test_without_a_file_there_is_nothing_to_do(tmp_path: Path, command: tuple[str, ...]) -> None:
    ran = run(tmp_path, *command)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith(f"nearhit: there is no database {tmp_path}/.local/share/nearhit/nearhit.db")
    assert list(tmp_path.iterdir()) == []
    ran = run(tmp_path, *command, "--cache-persist", "off")
    assert ran == Ran(1, "", "nearhit: cache.persist is off: there is no database file\n")


LIMITED = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
sys.exit(subprocess.run([sys.argv[1], *sys.argv[2:]], check=False).returncode)
"""


@pytest.mark.parametrize("more", [(), ("--no-backup",)])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, old: Path, more: tuple[str, ...]) -> None:
    done = run_python(LIMITED, PROGRAM, "migrate", "--cache-file", old, *more, check=False)
    assert done.returncode == 1, done
    assert "is the disk full, or not writable? Nothing was changed" in done.stderr
    assert schema_of(old).number == 2
    assert not list(old.parent.glob("*.bak*"))
    assert run(tmp_path, "migrate").code == 0
    assert asyncio.run(count(old)) > 0


async def test_a_file_is_migrated_while_it_is_served(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url) as running:
        assert (await running.chat("hi"))[1] == "MISS"
        ran = await run_async(tmp_path, "migrate")
        assert (ran.code, "up to date" in ran.out) == (0, True)
        assert (await running.chat("hi"))[1] == "HIT"


# nearhit backup


def test_a_backup_tells_what_it_holds(tmp_path: Path, file: Path) -> None:
    ran = run(tmp_path, "backup", "copy.db")
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(r"copy\.db: 20 entries, 0\.\d MiB, in [\d.e-]+ s\n", ran.out)
    copy = tmp_path / "copy.db"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert asyncio.run(count(copy)) == 20
    assert not (tmp_path / "copy.db.part").exists()


def test_a_backup_for_programs(tmp_path: Path, file: Path) -> None:
    told = json.loads(run(tmp_path, "backup", "copy.db", "--json").out)
    assert told["seconds"] >= 0
    size = (tmp_path / "copy.db").stat().st_size
    assert (told["file"], told["bytes"], told["entries"]) == ("copy.db", size, 20)


def test_a_backup_replaces_another_only_when_told(tmp_path: Path, file: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_text("precious")
    message = "nearhit: copy.db exists: name another file, or replace it with --force\n"
    assert run(tmp_path, "backup", "copy.db") == Ran(1, "", message)
    assert copy.read_text() == "precious"
    assert run(tmp_path, "backup", "copy.db", "--force").code == 0
    assert asyncio.run(count(copy)) == 20


@pytest.mark.parametrize("destination", [".", "missing/copy.db", ".local/share/nearhit/nearhit.db"])
def test_a_destination_that_is_none_is_one_line(tmp_path: Path, file: Path, destination: str) -> None:
    before = snapshot(file.parent)
    ran = run(tmp_path, "backup", destination, "--force")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert snapshot(file.parent) == before


def test_a_full_disk_leaves_no_half_backup(tmp_path: Path, file: Path) -> None:
    copy = tmp_path / "copy.db"
    done = run_python(LIMITED, PROGRAM, "backup", copy, "--cache-file", file, check=False)
    assert done.returncode == 1, done
    assert "is the disk full, or not writable?" in done.stderr
    assert not list(tmp_path.glob("copy*"))


async def test_a_backup_of_a_running_one_holds_what_was_answered_and_restores(
    tmp_path: Path, start: StartProxy, model: FakeModel
) -> None:
    proxy = await start(cache__flush_s=0.01)
    for number in range(5):
        await ask(proxy, asking(f"question {number}"))
    await written(proxy, 5)
    copy = tmp_path / "copy.db"
    ran = await run_async(tmp_path, "backup", str(copy), "--data-dir", str(tmp_path), "--json")
    assert (ran.code, json.loads(ran.out)["entries"]) == (0, 5)
    # Nothing of it was held up, and what comes later is not in it.
    await ask(proxy, asking("question 5"))
    await written(proxy, 6)
    # Restored as the help says: another start serves what the copy holds.
    restored = tmp_path / "restored.db"
    await asyncio.to_thread(copy.rename, restored)
    async with serving(tmp_path, model.url, "--cache-file", str(restored)) as running:
        assert (await running.chat("question 4"))[1] == "HIT"
        assert (await running.chat("question 5"))[1] == "MISS"


def test_a_restored_backup_takes_the_place_of_a_damaged_file(tmp_path: Path, file: Path) -> None:
    assert run(tmp_path, "backup", "copy.db").code == 0
    damage_all_but_header(file)
    (tmp_path / "copy.db").replace(file)
    assert run(tmp_path, "doctor", "--quick", "--port", "0", "--json").code == 1  # no upstream
    assert "corrupt" not in run(tmp_path, "doctor", "--port", "0").out

    async def served() -> bool:
        async with open_sqlite(file) as store:
            await store.write([Put(entry(99))])
            return await store.get(key(7), NOW) is not None

    assert asyncio.run(served())
