"""A database file without the engine: looked at, migrated, copied; and who may read it."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from storage.base import ForeignFile, NotLocal, Put, SchemaTooNew, StorageCorrupt, StorageUnavailable
from storage.migrate import shipped
from storage.sqlite import open_sqlite
from storage.sqlite_backup import Copied, DestinationRefused, back_up
from storage.sqlite_file import prepare
from storage.sqlite_offline import (
    Ahead,
    Schema,
    ahead_of,
    bring_up_to_date,
    entries_of,
    problems,
    read,
    refuse_too_new,
    schema_of,
)
from tests.storage.engines import NOW, entry, key, near, sketch
from tests.storage.files import damage, damage_all_but_header, pragma, query, run_python, snapshot, start_python

DATA = Path(__file__).parent / "data"
NAMES = tuple(migration.name for migration in shipped("sqlite"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nearhit.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """A sound file of ours with 50 entries, closed."""
    asyncio.run(fill(path, 50))
    return path


@pytest.fixture
def old(path: Path) -> Path:
    """A file that an old release has left."""
    shutil.copy(DATA / "v1.db", path)
    path.chmod(0o600)
    return path


async def fill(path: Path, number: int) -> None:
    async with open_sqlite(path) as store:
        await store.write([Put(near(n, answer=b"x" * 2000), sketch(n, n + 1)) for n in range(1, number + 1)])


async def count(path: Path) -> int:
    async with open_sqlite(path) as store:
        assert await store.problems() == []
        return (await store.totals()).entries


def too_new(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO migration VALUES (99, '0099_later', 1)")


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from storage.base import Put
from storage.sqlite import open_sqlite
from tests.storage.engines import near, sketch

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        await store.write([Put(near(n), sketch(n)) for n in range(100, 110)])
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


# Looking


def test_a_new_file_is_up_to_date(filled: Path) -> None:
    assert schema_of(filled) == Schema(len(NAMES), len(NAMES), ())
    assert entries_of(filled) == 50


def test_an_old_file_tells_what_it_lacks(old: Path) -> None:
    assert schema_of(old) == Schema(1, len(NAMES), NAMES[1:])
    assert problems(old) == []


def test_an_empty_file_lacks_everything(path: Path) -> None:
    path.touch()
    assert schema_of(path) == Schema(0, len(NAMES), NAMES)


def test_a_newer_file_is_told_apart(filled: Path) -> None:
    too_new(filled)
    schema = schema_of(filled)
    assert (schema.number, schema.known) == (99, len(NAMES))
    with pytest.raises(SchemaTooNew, match="99"):
        refuse_too_new(schema)


def test_looking_at_a_file_that_nobody_uses_leaves_no_trace(filled: Path) -> None:
    before, names = snapshot(filled.parent), sorted(filled.parent.iterdir())
    times = [file.stat().st_mtime_ns for file in names]
    look(filled)
    assert (snapshot(filled.parent), sorted(filled.parent.iterdir())) == (before, names)
    assert [file.stat().st_mtime_ns for file in names] == times


def look(path: Path) -> None:
    schema_of(path)
    entries_of(path)
    ahead_of(path, NOW, all_of_them=True)
    assert problems(path) == []


def test_what_is_in_the_log_of_a_killed_process_is_seen_and_stays_there(filled: Path) -> None:
    assert run_python(KILLED, filled, check=False).returncode == -9
    log = filled.with_name("nearhit.db-wal")
    before = filled.read_bytes(), log.read_bytes()
    assert entries_of(filled) == 60
    look(filled)
    assert (filled.read_bytes(), log.read_bytes()) == before
    assert asyncio.run(count(filled)) == 60


def test_an_empty_log_beside_a_file_is_no_hindrance(filled: Path) -> None:
    # As a start leaves it that the disk had no room for: an index that no reader can use, either.
    filled.with_name("nearhit.db-wal").touch()
    filled.with_name("nearhit.db-shm").mkdir()
    before = snapshot(filled.parent)
    assert entries_of(filled) == 50
    look(filled)
    assert snapshot(filled.parent) == before


async def test_a_file_is_looked_at_while_it_is_used(filled: Path) -> None:
    async with open_sqlite(filled) as store:
        await store.write([Put(near(77), sketch(1))])
        assert await asyncio.to_thread(entries_of, filled) == 51
        await asyncio.to_thread(look, filled)
        await store.write([Put(near(78), sketch(1))])
        assert await store.problems() == []


def test_a_file_that_comes_into_use_meanwhile_is_looked_at_again(filled: Path) -> None:
    looks: list[int] = []

    def work(connection: sqlite3.Connection) -> int:
        looks.append(int(connection.execute("SELECT count(*) FROM entry").fetchone()[0]))
        if len(looks) == 1:
            asyncio.run(fill(filled, 60))
            # What was read of the old and the new file need not fit together.
            raise sqlite3.DatabaseError("database disk image is malformed")
        return looks[-1]

    assert read(filled, work) == 60
    assert looks == [50, 60]


def test_what_is_read_is_never_written(filled: Path) -> None:
    for statement in ("DELETE FROM entry", "CREATE TABLE more (x)"):
        with pytest.raises(StorageUnavailable):
            read(filled, lambda connection, statement=statement: connection.execute(statement))  # type: ignore[misc]
    assert asyncio.run(count(filled)) == 50


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "another program's": foreign,
    "a text": lambda path: path.write_text("my diary\n"),
    "JSON Lines": lambda path: path.write_text('{"a": 1}\n'),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_ours_is_refused_and_left_alone(path: Path, make: Callable[[Path], object]) -> None:
    make(path)
    path.chmod(0o644)
    before = snapshot(path.parent)
    for work in (schema_of, bring_up_to_date, lambda file: back_up(file, path.with_name("copy"))):
        with pytest.raises(ForeignFile):
            work(path)
    assert (snapshot(path.parent), path.stat().st_mode & 0o777) == (before, 0o644)


def test_a_missing_file_is_not_made(path: Path) -> None:
    for work in (schema_of, bring_up_to_date, entries_of, lambda file: back_up(file, path.with_name("copy"))):
        with pytest.raises(StorageUnavailable):
            work(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("offset", [0, 100], ids=["header", "schema page"])
def test_a_damaged_file_is_told_and_left_alone(filled: Path, offset: int) -> None:
    damage(filled, offset, b"\xff" * 60)
    before = snapshot(filled.parent)
    for work in (schema_of, bring_up_to_date, problems, lambda file: back_up(file, filled.with_name("copy"))):
        with pytest.raises(StorageCorrupt):
            work(filled)
    assert snapshot(filled.parent) == before


# Rules


@pytest.mark.parametrize(
    "harm",
    [
        "SELECT 1",
        "DELETE FROM body WHERE entry = 3",
        "DELETE FROM entry WHERE id IN (3, 4)",
        "UPDATE entry SET size = size + 1 WHERE id = 3",
        "UPDATE entry SET expires_ms = stored_ms - 1, hits = -1 WHERE id = 3",
        "DELETE FROM topic",
        "UPDATE topic SET entries = entries + 1",
        "DELETE FROM band WHERE key = 2",
        "INSERT INTO band VALUES (9, 777)",
        "UPDATE entry SET near = 0 WHERE id = 1",
        "DELETE FROM sketch WHERE entry = 1",
    ],
)
def test_the_engine_finds_the_same_problems(filled: Path, harm: str) -> None:
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute(harm)
    found = problems(filled)

    async def engine() -> list[str]:
        async with open_sqlite(filled) as store:
            return await store.problems()

    assert found == asyncio.run(engine())
    assert bool(found) == (harm != "SELECT 1")


def test_a_damaged_page_is_found(filled: Path) -> None:
    damage(filled, filled.stat().st_size - 8192, b"\xaa" * 8192)
    try:
        found = problems(filled)
    except StorageCorrupt as error:
        found = [str(error)]
    assert found


# Times


def test_entries_from_the_future_are_counted(path: Path) -> None:
    hour = 3_600_000

    async def write() -> None:
        async with open_sqlite(path) as store:
            await store.write([Put(entry(1, stored_ms=NOW + hour, expires_ms=NOW + 2 * hour))])
            await store.write([Put(entry(n)) for n in range(2, 1500)])
            await store.write([Put(entry(5000, stored_ms=NOW + 9, expires_ms=NOW + hour))])

    asyncio.run(write())
    assert ahead_of(path, NOW, all_of_them=True) == Ahead(2, NOW + hour)
    assert ahead_of(path, NOW, all_of_them=False) == Ahead(1, NOW + 9)
    assert ahead_of(path, NOW + hour, all_of_them=True) == Ahead(0, 0)


# Migrating


def test_an_old_file_is_brought_up_to_date(old: Path) -> None:
    entries = entries_of(old)
    assert bring_up_to_date(old) == len(NAMES) - 1
    assert schema_of(old).missing == ()
    assert [name for (name,) in query(old, "SELECT name FROM migration ORDER BY number")] == list(NAMES)
    assert bring_up_to_date(old) == 0
    assert asyncio.run(count(old)) == entries > 0


def test_a_newer_file_is_not_migrated(filled: Path) -> None:
    too_new(filled)
    before = filled.read_bytes()
    with pytest.raises(SchemaTooNew):
        bring_up_to_date(filled)
    assert filled.read_bytes() == before


def test_a_file_on_a_network_mount_is_not_migrated(old: Path) -> None:
    table = old.with_name("mountinfo")
    table.write_text(f"1 0 0:9 / {old.parent} rw - nfs server:/x rw\n")
    before = old.read_bytes()
    with pytest.raises(NotLocal):
        bring_up_to_date(old, mountinfo=table)
    assert old.read_bytes() == before


# Copying


def test_a_copy_is_whole_and_private(filled: Path) -> None:
    copy = filled.with_name("copy.db")
    steps: list[tuple[int, int]] = []
    copied = back_up(filled, copy, progress=lambda done, total: steps.append((done, total)))
    assert copied == Copied(filled.stat().st_size, 50)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert steps[-1][0] == steps[-1][1] == filled.stat().st_size // 8192
    assert {file.name for file in filled.parent.iterdir()} <= {
        *("nearhit.db", "copy.db", "nearhit.db.lock", "nearhit.db.upkeep")
    }
    assert asyncio.run(count(copy)) == 50
    assert pragma(copy, "auto_vacuum") == 2


def test_a_copy_in_the_place_of_the_file_is_started_with(filled: Path) -> None:
    copy = filled.with_name("copy.db")
    back_up(filled, copy)
    damage_all_but_header(filled)
    copy.replace(filled)

    async def served() -> None:
        async with open_sqlite(filled, suspect=True) as store:
            assert await store.get(key(7), NOW) == near(7, answer=b"x" * 2000)
            await store.write([Put(near(99), sketch(1))])
            assert await store.problems() == []

    asyncio.run(served())
    assert not list(filled.parent.glob("*.corrupt-*"))


def test_a_copy_has_what_is_in_the_log_alone(filled: Path) -> None:
    run_python(KILLED, filled, check=False)
    assert back_up(filled, filled.with_name("copy.db")).entries == 60
    assert asyncio.run(count(filled.with_name("copy.db"))) == 60


WRITING = """
import asyncio, sys
from pathlib import Path
from storage.base import Put
from storage.sqlite import open_sqlite
from tests.storage.engines import near, sketch

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        number = 1000
        while True:
            # Two at a time, so that a copy of half a transaction would have an odd number.
            await store.write([Put(near(n, answer=bytes(5000)), sketch(n)) for n in (number, number + 1)])
            number += 2
            if number == 1010:
                print("writing", flush=True)

asyncio.run(main())
"""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Another process that writes to the file as fast as it can."""
    process = start_python(WRITING, path)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_copies_under_steady_writes_end_and_are_of_one_moment_each(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.sqlite_backup._STEP_PAGES", 8)
    found: list[int] = []
    with writing(filled):
        for number in range(4):
            copy = filled.with_name(f"copy-{number}.db")
            found.append(back_up(filled, copy, progress=Waiting(filled)).entries)
            assert asyncio.run(count(copy)) == found[-1]
    assert all(entries % 2 == 0 for entries in found)
    assert found == sorted(found)
    assert len(set(found)) == 4


class Waiting:
    """After each step of a backup, waits until more was written: one that begins anew then would never end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps = 0

    def __call__(self, _done: int, total: int) -> None:
        self._steps += 1
        assert self._steps <= total // 8 + 1
        before = newest(self._path)
        while newest(self._path) == before:
            pass


def newest(path: Path) -> int:
    return int(query(path, "SELECT max(id) FROM entry")[0][0])


def test_a_copy_may_replace_an_older_one(filled: Path) -> None:
    copy = filled.with_name("copy.db")
    back_up(filled, copy)
    before = copy.read_bytes()
    asyncio.run(fill(filled, 60))
    with pytest.raises(DestinationRefused, match="--force"):
        back_up(filled, copy)
    assert copy.read_bytes() == before
    assert back_up(filled, copy, replace=True).entries == 60


def test_a_destination_that_is_no_place_for_a_copy_is_refused(filled: Path) -> None:
    folder = filled.parent
    (folder / "link").symlink_to(filled)
    (folder / "other.db-wal").touch()
    (folder / "dangling").symlink_to(folder / "nowhere")
    before = snapshot(folder)
    for name in ("nearhit.db", "link", ".", "missing/copy.db", "other.db"):
        with pytest.raises(DestinationRefused):
            back_up(filled, folder / name, replace=True)
    with pytest.raises(DestinationRefused):
        back_up(filled, folder / "dangling")
    assert snapshot(folder) == before


def test_a_damaged_database_has_no_copy(filled: Path) -> None:
    damage(filled, filled.stat().st_size - 8192 * 20, b"\xaa" * 8192 * 20)
    with pytest.raises(StorageCorrupt):
        back_up(filled, filled.with_name("copy.db"))
    assert not list(filled.parent.glob("copy*"))


def test_a_half_copy_of_a_killed_backup_is_taken_over(filled: Path) -> None:
    part = filled.with_name("copy.db.part")
    part.write_bytes(b"half" * 100_000)
    part.chmod(0o644)
    assert back_up(filled, filled.with_name("copy.db")).entries == 50
    assert not part.exists()
    assert filled.with_name("copy.db").stat().st_mode & 0o777 == 0o600


def test_a_link_in_the_place_of_the_half_copy_is_not_followed(filled: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    filled.with_name("copy.db.part").symlink_to(victim)
    with pytest.raises(StorageUnavailable):
        back_up(filled, filled.with_name("copy.db"))
    assert victim.read_text() == "precious"


def test_two_backups_to_one_file_do_not_mix(filled: Path) -> None:
    copy = filled.with_name("copy.db")

    def told(_done: int, _total: int) -> None:
        with pytest.raises(StorageUnavailable, match="another backup"):
            back_up(filled, copy)

    assert back_up(filled, copy, progress=told).entries == 50
    assert asyncio.run(count(copy)) == 50


def test_a_backup_that_is_stopped_leaves_nothing(filled: Path) -> None:
    def told(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(filled, filled.with_name("copy.db"), progress=told)
    assert not list(filled.parent.glob("copy*"))


NO_ROOM = """
import resource, sys
from pathlib import Path
from storage.base import StorageFull
from storage.sqlite_backup import back_up

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    back_up(Path(sys.argv[1]), Path(sys.argv[1] + ".copy"), replace=True)
except StorageFull:
    sys.exit(0)
sys.exit("no error")
"""


def test_a_full_disk_leaves_no_half_copy_and_the_older_one(filled: Path) -> None:
    run_python(NO_ROOM, filled)
    assert not list(filled.parent.glob("*.copy*"))
    copy = filled.with_name("nearhit.db.copy")
    back_up(filled, copy)
    before = copy.read_bytes()
    run_python(NO_ROOM, filled)
    assert copy.read_bytes() == before
    assert not list(filled.parent.glob("*.part"))


def test_an_empty_database_has_a_copy(path: Path) -> None:
    prepare(path)
    assert back_up(path, path.with_name("copy.db")).entries == 0


# Who may read it


def test_a_database_that_others_could_read_is_theirs_no_longer(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_python(KILLED, filled, check=False)
    files = [filled.with_name(f"nearhit.db{suffix}") for suffix in ("", "-wal", "-shm")]
    for file in files:
        file.chmod(0o644)
    assert asyncio.run(modes(filled, files)) == {0o600}
    assert "nearhit.db could be read by others (mode 644): it is mode 600 now" in caplog.text


async def modes(path: Path, files: list[Path]) -> set[int]:
    async with open_sqlite(path):
        return {await asyncio.to_thread(mode, file) for file in files}


def mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


def test_a_private_database_is_left_as_it_is(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled.chmod(0o400)
    filled.chmod(0o600)
    before = filled.stat().st_ctime_ns
    prepare(filled)
    assert filled.stat().st_ctime_ns == before
    assert caplog.text == ""


def test_a_database_of_another_user_keeps_its_mode(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.chmod(0o660)
    monkeypatch.setattr("os.geteuid", lambda: filled.stat().st_uid + 1)
    prepare(filled)
    assert mode(filled) == 0o660
