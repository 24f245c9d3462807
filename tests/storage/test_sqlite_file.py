"""The file: what is created, what is refused, what is set aside, and what happens when it cannot be written."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from storage.base import (
    Change,
    Delete,
    ForeignFile,
    Put,
    SchemaTooNew,
    StorageBusy,
    StorageCorrupt,
    StorageFull,
    StorageRefused,
    StorageUnavailable,
)
from storage.sqlite import open_sqlite
from storage.sqlite_file import APPLICATION_ID, in_use, prepare, translated
from tests.storage.engines import NOW, entry, key, near, room, sketch
from tests.storage.files import (
    damage,
    damage_all_but_header,
    damage_second_half,
    pragma,
    run_python,
    set_asides,
    snapshot,
    start_python,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nearhit.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """A sound file of ours with 50 entries, closed."""
    asyncio.run(fill(path))
    return path


async def fill(path: Path) -> None:
    async with open_sqlite(path) as store:
        await store.write([Put(entry(n, answer=b"x" * 2000)) for n in range(50)])


async def content(path: Path, *, suspect: bool = False) -> int:
    """Open, look through, and count the entries that are there."""
    async with open_sqlite(path, suspect=suspect) as store:
        assert await store.problems() == []
        return (await store.totals()).entries


# What is created


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_only_the_owner_can_read_what_is_created(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    async def look() -> dict[str, int]:
        async with open_sqlite(folder / "nearhit.db") as store:
            await store.write([Put(entry())])
            return {p.name: p.stat().st_mode & 0o777 for p in (folder, *folder.iterdir())}

    modes = asyncio.run(look())
    assert modes.pop("data") == 0o700
    assert set(modes) >= {"nearhit.db", "nearhit.db-wal", "nearhit.db-shm"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 8192),
        ("auto_vacuum", 2),
        ("application_id", APPLICATION_ID),
        ("journal_mode", "wal"),
        ("integrity_check", "ok"),
    ],
)
def test_the_file_has_what_cannot_be_changed_later(filled: Path, name: str, value: object) -> None:
    assert pragma(filled, name) == value


def test_a_closed_store_leaves_no_write_ahead_log(filled: Path) -> None:
    assert set(snapshot(filled.parent)) <= {"nearhit.db", "nearhit.db.lock", "nearhit.db.upkeep"}


async def test_missing_folders_are_created(tmp_path: Path) -> None:
    assert await content(tmp_path / "a" / "b" / "nearhit.db") == 0


async def test_entries_outlive_their_process(filled: Path) -> None:
    assert await content(filled) == 50
    assert await content(filled, suspect=True) == 50


async def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    odd = tmp_path / "what? 100% #1 é" / "near hit?mode=ro#.db"
    await fill(odd)
    assert await content(odd) == 50


async def test_a_file_that_shrinks_gives_space_back(filled: Path) -> None:
    before = (await asyncio.to_thread(filled.stat)).st_size
    async with open_sqlite(filled) as store:
        assert await store.trim(room(1, 2**60), 100) == 49
        assert await store.give_back(2**30) > 0
    assert (await asyncio.to_thread(filled.stat)).st_size < before - 100_000


# What is accepted


def test_an_empty_file_is_accepted(path: Path) -> None:
    path.touch()
    assert asyncio.run(content(path)) == 0


def test_a_start_that_was_killed_before_its_first_migration_is_taken_up(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 8192")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    assert path.stat().st_size > 0
    assert asyncio.run(content(path)) == 0


# What is refused, and left as it was


def foreign_sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("INSERT INTO theirs VALUES (1)")
        connection.commit()


def foreign_sqlite_alike(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA page_size = 8192")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("CREATE TABLE theirs (x)")


def foreign_application(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 1234")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE entry (x)")


def foreign_with_log(path: Path) -> None:
    """A database of another program that was killed: its latest writes are in the log only."""
    other = path.with_name("origin")
    with closing(sqlite3.connect(other, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE theirs (x)")
        shutil.copy(other, path)
        shutil.copy(f"{other}-wal", f"{path}-wal")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "another program's database": foreign_sqlite,
    "another program's database of the same shape": foreign_sqlite_alike,
    "another application id": foreign_application,
    "another program's database with a log": foreign_with_log,
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(100_000)),
    "garbage with a log": lambda path: (path.write_bytes(b"g" * 100), path.with_name("nearhit.db-wal").write_text("w")),
    "one byte": lambda path: path.write_bytes(b"x"),
    "zeros": lambda path: path.write_bytes(bytes(20_000)),
    "the first bytes of a database": lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(10)),
    "a log file": lambda path: path.write_text("2026-01-01 started\n" * 100),
    "JSON Lines": lambda path: path.write_text('{"key": 1}\n{"key": 2}\n'),
}


@pytest.mark.parametrize("suspect", [False, True], ids=["plain", "suspect"])
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_and_left_alone(path: Path, make: Callable[[Path], object], suspect: bool) -> None:
    make(path)
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode
    with pytest.raises(ForeignFile, match=re.escape(str(path))):
        prepare(path, suspect=suspect)
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) == before
    assert set_asides(path) == []


@pytest.mark.parametrize("start", ["", " ", "\n\n"])
def test_json_lines_are_told_how_to_come_in(path: Path, start: str) -> None:
    path.write_text(start + '{"prompt": "hi"}\n')
    with pytest.raises(ForeignFile, match="nearhit import"):
        prepare(path)


def test_a_newer_schema_is_refused_and_left_alone(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("INSERT INTO migration VALUES (99, '0099_later', 1)")
    before = filled.read_bytes()
    with pytest.raises(SchemaTooNew, match="99"):
        prepare(filled, suspect=True)
    assert filled.read_bytes() == before
    assert set_asides(filled) == []


async def test_opening_a_refused_file_says_so(path: Path) -> None:
    await asyncio.to_thread(path.write_text, "{}")
    with pytest.raises(StorageRefused):
        async with open_sqlite(path):
            pass


def test_a_folder_in_place_of_the_file_is_no_reason_to_crash(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    with pytest.raises(StorageUnavailable):
        prepare(path)


async def test_a_lock_file_that_cannot_be_opened_makes_the_store_unavailable(filled: Path) -> None:
    lock = filled.with_name("nearhit.db.lock")
    await asyncio.to_thread(lock.unlink)
    await asyncio.to_thread(lock.mkdir)
    with pytest.raises(StorageUnavailable):
        async with open_sqlite(filled):
            pass


# What is set aside


def middle(path: Path) -> None:
    damage_all_but_header(path)


def truncated(path: Path) -> None:
    os.truncate(path, 8192 * 3 + 100)


def header(path: Path) -> None:
    damage(path, 0, b"\xff" * 60)


def schema_page(path: Path) -> None:
    damage(path, 100, b"\xff" * 4000)


@pytest.mark.parametrize("harm", [middle, truncated, header, schema_page])
async def test_a_corrupt_file_is_set_aside_whole_and_a_new_one_begun(
    filled: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(harm, filled)
    damaged = await asyncio.to_thread(filled.read_bytes)
    assert await content(filled, suspect=True) == 0
    (aside,) = await asyncio.to_thread(lambda: list(filled.parent.glob("nearhit.db.corrupt-*[0-9]")))
    assert await asyncio.to_thread(aside.read_bytes) == damaged
    assert "set aside" in caplog.text
    assert aside.name in caplog.text


@pytest.mark.parametrize("harm", [truncated, header, schema_page])
async def test_corruption_that_shows_on_opening_needs_no_suspicion(filled: Path, harm: Callable[[Path], None]) -> None:
    await asyncio.to_thread(harm, filled)
    assert await content(filled) == 0
    assert await asyncio.to_thread(set_asides, filled) == ["corrupt"]


async def test_damage_that_is_read_later_is_told_as_corruption(filled: Path) -> None:
    await asyncio.to_thread(damage_second_half, filled)
    async with open_sqlite(filled) as store:
        with pytest.raises(StorageCorrupt):
            await asyncio.gather(*(store.get(key(n), NOW) for n in range(50)))


def test_the_write_ahead_log_is_set_aside_too(filled: Path) -> None:
    # Another program that looks into the file keeps SQLite from clearing the log away.
    with closing(sqlite3.connect(filled, isolation_level=None)) as other:
        other.execute("UPDATE entry SET hits = 1")
        middle(filled)
        assert asyncio.run(content(filled, suspect=True)) == 0
        assert set_asides(filled) == ["corrupt", "corrupt-shm", "corrupt-wal"]


def test_a_corrupt_file_in_use_by_another_process_is_not_taken_away(filled: Path) -> None:
    header(filled)
    before = filled.read_bytes()
    with in_use(filled), pytest.raises(StorageBusy, match="still open"):
        prepare(filled)
    assert filled.read_bytes() == before
    assert set_asides(filled) == []
    prepare(filled)
    assert set_asides(filled) == ["corrupt"]


def test_an_open_store_keeps_others_from_setting_its_file_aside(filled: Path) -> None:
    async def try_while_open() -> None:
        async with open_sqlite(filled):
            await asyncio.to_thread(middle, filled)
            done = await asyncio.to_thread(run_python, PREPARE, filled, check=False)
            assert "StorageBusy" in done.stderr
            assert await asyncio.to_thread(set_asides, filled) == []

    asyncio.run(try_while_open())


PREPARE = """
import sys
from pathlib import Path
from storage.sqlite_file import prepare
prepare(Path(sys.argv[1]), suspect=True)
"""


def test_a_file_that_another_process_renewed_meanwhile_is_kept(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header(filled)

    def renewed_by_another(path: Path, *, suspect: bool) -> None:
        monkeypatch.undo()
        prepare(path)
        asyncio.run(fill(path))
        raise StorageCorrupt("what was read before the other process renewed the file")

    monkeypatch.setattr("storage.sqlite_file._open_and_migrate", renewed_by_another)
    prepare(filled)
    assert asyncio.run(content(filled)) == 50
    assert set_asides(filled) == ["corrupt"]


# What cannot be written now


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    code = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
connection.close()
"""
    with start_python(code, path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        yield
        other.communicate("\n")


def test_a_store_locked_by_another_process_is_busy_for_writers_only(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.sqlite._BUSY_WRITER_S", 0.02)

    async def read_and_write() -> None:
        async with open_sqlite(filled) as store:
            other = locked_by_another_process(filled)
            await asyncio.to_thread(other.__enter__)
            for attempt in (store.write([Put(entry(99))]), store.expire(NOW, 1), store.note("a", "b", "c", NOW)):
                with pytest.raises(StorageBusy):
                    await attempt
            assert await store.get(key(1), NOW) is not None
            assert (await store.totals()).entries == 50
            await asyncio.to_thread(other.__exit__, None, None, None)
            await store.write([Put(entry(99))])
            assert await store.get(key(99), NOW) == entry(99)
            assert await store.problems() == []

    asyncio.run(read_and_write())


def test_a_store_locked_at_opening_is_busy(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.sqlite_file._BUSY_S", 0.02)
    with locked_by_another_process(filled), pytest.raises(StorageBusy):
        prepare(filled)
    prepare(filled)


def test_a_file_that_another_program_keeps_from_its_log_is_busy(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.sqlite_file._BUSY_S", 0.02)
    with closing(sqlite3.connect(filled, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM entry").fetchall()
        with pytest.raises(StorageBusy):
            prepare(filled)
    prepare(filled)
    assert pragma(filled, "journal_mode") == "wal"


FULL = """
import asyncio, resource, sys
from pathlib import Path
from storage.base import Put, StorageFull
from storage.sqlite import open_sqlite
from tests.storage.engines import NOW, entry, key

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        await store.write([Put(entry(99))])
        limit(Path(sys.argv[1] + "-wal").stat().st_size + 20_000)
        full = 0
        for number in range(100, 110):
            try:
                await store.write([Put(entry(number)), Put(entry(number + 100, answer=b"x" * 50_000))])
            except StorageFull:
                full += 1
        assert full == 10, full
        for number in (1, 99):
            assert await store.get(key(number), NOW) is not None
        assert await store.get(key(100), NOW) is None
        assert await store.problems() == []
        if sys.argv[2] == "lifted":
            limit(resource.RLIM_INFINITY)
            await store.write([Put(entry(300))])
            assert await store.get(key(300), NOW) == entry(300)
            assert await store.problems() == []

asyncio.run(main())
"""


@pytest.mark.parametrize("then", ["lifted", "ended"])
def test_a_full_disk_stops_writing_and_nothing_else(filled: Path, then: str) -> None:
    run_python(FULL, filled, then)
    assert asyncio.run(content(filled, suspect=True)) == (52 if then == "lifted" else 51)


NO_ROOM = """
import resource, sys
from pathlib import Path
from storage.base import StorageFull
from storage.sqlite_file import prepare

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    prepare(Path(sys.argv[1]))
except StorageFull:
    sys.exit(0)
sys.exit("no error")
"""


def test_a_new_file_without_room_is_full_and_begun_anew_later(path: Path) -> None:
    run_python(NO_ROOM, path)
    assert asyncio.run(content(path)) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_file_system_that_takes_no_more_is_full(code: int) -> None:
    assert type(translated(OSError(code, os.strerror(code)))) is StorageFull


def test_any_other_trouble_of_the_file_system_is_unavailable() -> None:
    assert type(translated(OSError(errno.EIO, "input/output error"))) is StorageUnavailable


# What `problems` notices


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("DELETE FROM body WHERE entry = 3", "1 entries without an answer"),
        ("DELETE FROM entry WHERE id IN (3, 4)", "2 answers without an entry"),
        ("UPDATE entry SET size = size + 1 WHERE id = 3", "1 entries with the size of another"),
        ("UPDATE entry SET hits = -1 WHERE id = 3", "1 entries with impossible times or counts"),
        ("UPDATE entry SET expires_ms = stored_ms - 1 WHERE id = 3", "1 entries with impossible times or counts"),
    ],
)
def test_a_broken_invariant_is_told_in_words(filled: Path, harm: str, told: str) -> None:
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute(harm)
    assert asyncio.run(problems(filled)) == [told]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("DELETE FROM band WHERE key = 2", ["1 sketches with too few or too many band keys"]),
        ("INSERT INTO band VALUES (9, 1)", ["1 sketches with too few or too many band keys"]),
        ("INSERT INTO band VALUES (9, 77), (8, 77)", ["2 band keys without a sketch"]),
        ("UPDATE entry SET near = 0 WHERE id = 1", ["1 sketches without a near entry"]),
        ("UPDATE entry SET words = NULL WHERE id = 1", ["1 sketches without a near entry"]),
        (
            "DELETE FROM sketch WHERE entry = 1",
            ["1 near entries that will never be sketched", "2 band keys without a sketch"],
        ),
        (
            "PRAGMA foreign_keys = ON; DELETE FROM entry WHERE id = 1",
            ["2 band keys without a sketch"],
        ),
    ],
)
def test_a_broken_invariant_of_the_near_tier_is_told_in_words(path: Path, harm: str, told: list[str]) -> None:
    asyncio.run(put(path, Put(near(1), sketch(1, 2)), Put(near(2))))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(harm)
    assert asyncio.run(problems(path)) == told


async def test_a_removal_that_finds_half_a_key_tells_of_corruption(path: Path) -> None:
    async with open_sqlite(path) as store:
        await store.write([Put(near(1), sketch(1, 2))])
        await asyncio.to_thread(harm_keys, path)
        with pytest.raises(StorageCorrupt):
            await store.write([Delete(key(1))])


def harm_keys(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE sketch SET keys = x'010203'")


async def put(path: Path, *changes: Change) -> None:
    async with open_sqlite(path) as store:
        await store.write(changes)


def test_a_broken_index_is_told(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_schema SET sql = replace(sql, '(worth)', '(cost_ms)') WHERE name = 'entry_by_worth'"
        )
    assert any(told.startswith("integrity: ") for told in asyncio.run(problems(filled)))


async def problems(path: Path) -> list[str]:
    async with open_sqlite(path) as store:
        return await store.problems()


@pytest.mark.usefixtures("usual_umask")
def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    with pytest.raises(ForeignFile, match="is no file"):
        prepare(pipe)
    assert pipe.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
