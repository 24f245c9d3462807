"""Leases: one holder at a time, whatever processes, clocks and files do; and where they fail, nobody is held up."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import IO

import pytest

from storage import lease_file, sqlite_leases
from storage.base import ForeignFile, SchemaTooNew, StorageBusy, StorageError, StorageUnavailable
from storage.lease_file import APPLICATION_ID, LeaseFile, open_lease_file
from storage.leases import APART_MS, RENEW_MS, TERM_MS, Apart, Held, Standing, Taken
from storage.neighbours import Neighbours
from storage.sqlite_leases import SqliteLeases, open_leases
from tests.conftest import eventually
from tests.storage.door import OnErrorToList
from tests.storage.files import damage, pragma, query, snapshot, start_python

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
SHORT_MS = 300
"""A term for tests that wait for its end."""
LONG_MS = 3_000
"""A term within which a busy machine runs every process."""

TAKE_ALL = """
import sys, time
from pathlib import Path
from storage import lease_file
from storage.leases import Taken
from storage.neighbours import Neighbours

lease_file._BUSY_S = 60.0
path = Path(sys.argv[1])
file = lease_file.open_lease_file(path, Neighbours(path.with_suffix(".lock")), lambda: time.monotonic_ns() // 1_000_000)
print("ready", flush=True)
sys.stdin.readline()
for number in range(0, int(sys.argv[2]), 4):
    numbers = range(number, number + 4)
    standings = file.take([one.to_bytes(32, "big") for one in numbers], together=number % 8 == 0)
    for one, standing in zip(numbers, standings, strict=True):
        if isinstance(standing, Taken):
            print(one, standing.token, flush=True)
print("done", flush=True)
sys.stdin.readline()
"""

HOLD = """
import os, select, signal, sys, time
from pathlib import Path
from storage import lease_file
from storage.neighbours import Neighbours

lease_file.TERM_MS, lease_file._BUSY_S = int(sys.argv[2]), 60.0
path = Path(sys.argv[1])
file = lease_file.open_lease_file(
    path, Neighbours(path.with_suffix(".lock")), lambda: time.monotonic_ns() // 1_000_000
)
(lease,) = file.take([b"k" * 32])
print(lease.token, flush=True)
if sys.argv[3:]:
    os.kill(os.getpid(), signal.SIGSTOP)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    if not file.renew([lease]):
        print("overtaken", flush=True)
        file.release([lease], shareable=True)
        print(len(file.renew([lease])), flush=True)
        break
"""

ON_FULL_DISK = """
import asyncio, sys, time
from pathlib import Path
from storage.sqlite_leases import open_leases

said = []

def clock_ms():
    return time.monotonic_ns() // 1_000_000

def failed(op, error):
    said.append((op, type(error).__name__))

async def main():
    async with open_leases(Path(sys.argv[1]), clock_ms, failed, always=True) as one:
        print(type((await one.take([b"k" * 32]))[0]).__name__, one.shared, said)

asyncio.run(main())
"""


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a busy machine takes decides no test."""
    monkeypatch.setattr(sqlite_leases, "PATIENCE_S", 60.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database; what is in it is of no concern here."""
    path = tmp_path / "nearhit.db"
    path.touch(mode=0o600)
    return path


@pytest.fixture
def leases_path(path: Path) -> Path:
    return path.with_name("nearhit.db.leases")


@contextmanager
def opened(path: Path, clock: Clock) -> Iterator[LeaseFile]:
    """One process's hold on the file."""
    neighbours = Neighbours(path.with_suffix(".lock"))
    try:
        with closing(open_lease_file(path, neighbours, clock)) as file:
            yield file
    finally:
        neighbours.close()


@pytest.fixture
def two(leases_path: Path, clock: Clock) -> Iterator[tuple[LeaseFile, LeaseFile]]:
    with opened(leases_path, clock) as one, opened(leases_path, clock) as other:
        yield one, other


@pytest.fixture
async def sharing(
    path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]]
) -> AsyncIterator[tuple[SqliteLeases, SqliteLeases]]:
    """Two that know of each other."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(leases(path, clock, errors))
        other = await stack.enter_async_context(leases(path, clock, errors))
        await one.look()
        yield one, other


def leases(
    path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]], *, always: bool = False
) -> AbstractAsyncContextManager[SqliteLeases]:
    return open_leases(path, clock, OnErrorToList(errors), always=always)


def taken(standings: Sequence[Standing]) -> Taken:
    (standing,) = standings
    assert isinstance(standing, Taken)
    return standing


# In the file


def test_one_at_a_time_has_it(two: tuple[LeaseFile, LeaseFile]) -> None:
    one, other = two
    first = taken(one.take([KEY]))
    assert other.take([KEY]) == [Held()]
    assert taken(other.take([OTHER_KEY])).token > first.token
    one.release([first], shareable=True)
    assert taken(other.take([KEY])).token > first.token


def test_it_ends_with_its_term_unless_it_is_renewed(two: tuple[LeaseFile, LeaseFile], clock: Clock) -> None:
    one, other = two
    first = taken(one.take([KEY]))
    for _ in range(3):
        clock.now_ms += TERM_MS - 1
        assert other.take([KEY]) == [Held()]
        assert one.renew([first]) == {first}
    clock.now_ms += TERM_MS
    assert taken(other.take([KEY])).token > first.token


def test_who_was_overtaken_can_do_nothing_with_it(two: tuple[LeaseFile, LeaseFile], clock: Clock) -> None:
    one, other = two
    first = taken(one.take([KEY]))
    clock.now_ms += TERM_MS
    second = taken(other.take([KEY]))
    assert one.renew([first]) == set()
    one.release([first], shareable=True)
    one.release([first], shareable=False)
    assert one.take([KEY]) == [Held()]
    assert other.renew([second]) == {second}


def test_who_was_late_and_was_not_overtaken_keeps_it(two: tuple[LeaseFile, LeaseFile], clock: Clock) -> None:
    one, other = two
    first = taken(one.take([KEY]))
    clock.now_ms += 3 * TERM_MS
    assert one.renew([first]) == {first}
    assert other.take([KEY]) == [Held()]


def test_after_one_that_could_not_be_shared_all_go_at_once_for_a_while(
    two: tuple[LeaseFile, LeaseFile], clock: Clock
) -> None:
    one, other = two
    one.release([taken(one.take([KEY]))], shareable=False)
    clock.now_ms += APART_MS - 1
    assert [*one.take([KEY]), *other.take([KEY]), *other.take([KEY])] == [Apart()] * 3
    clock.now_ms += 1
    taken(other.take([KEY]))
    assert one.take([KEY]) == [Held()]


def test_a_second_one_of_the_same_process_does_not_wait_for_the_first(two: tuple[LeaseFile, LeaseFile]) -> None:
    one, _ = two
    first = taken(one.take([KEY]))
    assert one.take([KEY]) == [Apart()]
    assert one.renew([first]) == {first}


def test_of_several_those_are_taken_that_are_free(two: tuple[LeaseFile, LeaseFile]) -> None:
    one, other = two
    first = taken(one.take([KEY]))
    one.release([taken(one.take([OTHER_KEY]))], shareable=False)
    last, held, apart, mine = other.take([b"p" * 32, KEY, OTHER_KEY, b"q" * 32])
    assert (held, apart) == (Held(), Apart())
    assert isinstance(last, Taken)
    assert isinstance(mine, Taken)
    assert first.token < last.token < mine.token
    assert other.renew([last, mine, first]) == {last, mine}
    other.release([last, mine], shareable=True)
    assert [type(one) for one in one.take([b"q" * 32, b"p" * 32])] == [Taken, Taken]


def test_several_are_taken_together_or_not_at_all(two: tuple[LeaseFile, LeaseFile]) -> None:
    one, other = two
    first = taken(one.take([KEY]))
    assert other.take([OTHER_KEY, KEY], together=True) == [Held(), Held()]
    one.release([taken(one.take([OTHER_KEY]))], shareable=False)
    one.release([first], shareable=True)
    apart, standing = other.take([OTHER_KEY, KEY], together=True)
    assert apart == Apart()
    assert isinstance(standing, Taken)
    assert one.take([KEY]) == [Held()]


def test_a_file_from_before_the_machine_was_started_holds_nobody_up(
    two: tuple[LeaseFile, LeaseFile], clock: Clock
) -> None:
    one, other = two
    taken(one.take([KEY]))
    one.release([taken(one.take([OTHER_KEY]))], shareable=False)
    clock.now_ms = 5_000
    taken(other.take([KEY]))
    taken(other.take([OTHER_KEY]))


def test_what_ended_is_forgotten_and_nothing_else(
    two: tuple[LeaseFile, LeaseFile], clock: Clock, leases_path: Path
) -> None:
    one, other = two
    one.release([taken(one.take([OTHER_KEY]))], shareable=False)
    taken(one.take([b"p" * 32]))
    clock.now_ms += 10 * TERM_MS
    kept = taken(one.take([KEY]))
    other.sweep()
    assert query(leases_path, "SELECT key FROM lease") == [(KEY,)]
    assert one.renew([kept]) == {kept}


def test_who_leaves_lets_go_of_all(two: tuple[LeaseFile, LeaseFile]) -> None:
    one, other = two
    taken(one.take([KEY]))
    held = taken(other.take([OTHER_KEY]))
    one.leave()
    taken(other.take([KEY]))
    assert other.renew([held]) == {held}


# Between processes


def lines(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()


def told(process: subprocess.Popen[str]) -> list[tuple[int, int]]:
    """The keys that it took, and their tokens."""
    found = []
    while (line := lines(process).readline()) not in ("done\n", ""):
        number, token = line.split()
        found.append((int(number), int(token)))
    return found


def test_of_several_processes_that_race_one_takes_each(leases_path: Path) -> None:
    with start_python(TAKE_ALL, leases_path, 200) as one, start_python(TAKE_ALL, leases_path, 200) as other:
        processes = (one, other)
        assert [lines(process).readline() for process in processes] == ["ready\n"] * 2
        for process in processes:
            go(process)
        found = [told(process) for process in processes]
        for process in processes:
            go(process)
    assert sorted(number for each in found for number, _ in each) == list(range(200))
    tokens = [token for each in found for _, token in each]
    assert len(set(tokens)) == 200
    assert all([token for _, token in each] == sorted(token for _, token in each) for each in found)


class MachineClock(Clock):
    """The clock of the processes that these tests start."""

    def __call__(self) -> int:
        return time.monotonic_ns() // 1_000_000


def test_from_one_that_is_killed_exactly_one_takes_over_at_once(leases_path: Path) -> None:
    clock = MachineClock()
    with (
        start_python(HOLD, leases_path, TERM_MS) as holder,
        opened(leases_path, clock) as one,
        opened(leases_path, clock) as other,
    ):
        token = int(lines(holder).readline())
        assert one.take([KEY]) == [Held()]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert taken(one.take([KEY])).token > token
        assert other.take([KEY]) == [Held()]


def test_one_that_is_paused_for_longer_than_its_term_is_overtaken_and_finds_out(
    leases_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.lease_file.TERM_MS", SHORT_MS)
    # It pauses itself: stopped from outside, it might be writing, and nobody else could.
    with start_python(HOLD, leases_path, SHORT_MS, "pause") as holder, opened(leases_path, MachineClock()) as one:
        token = int(lines(holder).readline())
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
        while (standings := one.take([KEY])) == [Held()]:
            pass
        mine = taken(standings)
        assert mine.token > token
        with monkeypatch.context() as patch:
            patch.setattr("storage.lease_file.TERM_MS", TERM_MS)
            assert one.renew([mine]) == {mine}
        holder.send_signal(signal.SIGCONT)
        # With a term that is longer than it believes possible, it would not know ours; it does not ask for it.
        assert [lines(holder).readline() for _ in range(2)] == ["overtaken\n", "0\n"]
        assert one.renew([mine]) == {mine}


def test_a_term_that_is_renewed_does_not_end(leases_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.lease_file.TERM_MS", LONG_MS)
    clock = MachineClock()
    with start_python(HOLD, leases_path, LONG_MS) as holder, opened(leases_path, clock) as one:
        lines(holder).readline()
        until_ms = clock() + round(1.2 * LONG_MS)
        while clock() < until_ms:
            assert one.take([KEY]) == [Held()]
        go(holder)


# The file itself


def test_only_its_owner_may_read_it(two: tuple[LeaseFile, LeaseFile], leases_path: Path) -> None:
    taken(two[0].take([KEY]))
    assert {part.stat().st_mode & 0o777 for part in leases_path.parent.iterdir()} == {0o600}


def test_it_is_told_from_other_databases(two: tuple[LeaseFile, LeaseFile], leases_path: Path) -> None:
    assert pragma(leases_path, "application_id") == APPLICATION_ID
    assert pragma(leases_path, "journal_mode") == "wal"


def foreign_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (id)")


def foreign_text(path: Path) -> None:
    path.write_text("my leases: flat, car\n" * 100)


def spoilt_foreign_database(path: Path) -> None:
    foreign_database(path)
    damage(path, 100, b"\xaa" * 1000)


@pytest.mark.parametrize("make", [foreign_database, foreign_text, spoilt_foreign_database])
def test_a_file_that_is_not_ours_is_left_alone(leases_path: Path, clock: Clock, make: Callable[[Path], None]) -> None:
    make(leases_path)
    before = snapshot(leases_path.parent)
    with pytest.raises(ForeignFile), opened(leases_path, clock):
        pass
    assert {name: digest for name, digest in snapshot(leases_path.parent).items() if name in before} == before


def test_what_is_no_file_is_left_alone(leases_path: Path, clock: Clock) -> None:
    leases_path.mkdir()
    with pytest.raises(ForeignFile), opened(leases_path, clock):
        pass
    leases_path.rmdir()
    os.mkfifo(leases_path)
    with pytest.raises(ForeignFile), opened(leases_path, clock):
        pass


def test_a_newer_one_is_left_alone(leases_path: Path, clock: Clock) -> None:
    with opened(leases_path, clock):
        pass
    with closing(sqlite3.connect(leases_path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(SchemaTooNew), opened(leases_path, clock):
        pass


def spoil_all(path: Path) -> None:
    size = path.stat().st_size
    damage(path, 100, b"\xaa" * (size - 100))


def spoil_header(path: Path) -> None:
    damage(path, 16, b"\xaa" * 40)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, 1500)


@pytest.mark.parametrize("spoil", [spoil_all, spoil_header, zero, cut])
def test_a_corrupt_one_is_made_anew(
    leases_path: Path, clock: Clock, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(leases_path, clock) as file:
        first = taken(file.take([KEY]))
    spoil(leases_path)
    clock.now_ms += 1
    with opened(leases_path, clock) as one, opened(leases_path, clock) as other:
        assert taken(one.take([KEY])).token > first.token
        assert other.take([KEY]) == [Held()]
    assert len([record for record in caplog.records if "is corrupt" in record.message]) == 1


def test_it_is_not_used_over_a_network(leases_path: Path, clock: Clock, tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"1 0 0:1 / {tmp_path} rw - nfs4 server:/ rw\n")
    neighbours = Neighbours(leases_path.with_suffix(".lock"))
    with closing(neighbours), pytest.raises(StorageUnavailable, match="network mount"):
        open_lease_file(leases_path, neighbours, clock, mountinfo=mountinfo)
    assert not leases_path.exists()


# In the event loop


async def test_whoever_is_alone_has_none_and_makes_no_file(
    path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]], leases_path: Path
) -> None:
    async with leases(path, clock, errors) as one:
        assert not one.shared
        assert await one.take([KEY]) == [Apart()]
        assert not await asyncio.to_thread(leases_path.exists)
        async with leases(path, clock, errors) as other:
            assert other.shared
            await one.look()
            assert one.shared
            await one.release([taken(await one.take([KEY]))], shareable=True)
        await one.look()
        assert not one.shared
    assert errors == []


async def test_they_can_be_wanted_always(
    path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]]
) -> None:
    async with leases(path, clock, errors, always=True) as one:
        assert one.shared
        taken(await one.take([KEY]))


async def test_others_are_noticed_without_being_asked_for(
    path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_leases, "LOOK_S", 0.01)
    async with leases(path, clock, errors) as one:
        async with leases(path, clock, errors):
            await eventually(lambda: one.shared)
        await eventually(lambda: not one.shared)


async def test_what_is_held_is_renewed_until_it_is_released(
    sharing: tuple[SqliteLeases, SqliteLeases], clock: Clock
) -> None:
    one, other = sharing
    lease = taken(await one.take([KEY]))
    for _ in range(5):
        clock.now_ms += RENEW_MS + 1
        await one.look()
        assert await other.take([KEY]) == [Held()]
        assert await one.holds([lease])
    await one.release([lease], shareable=True)
    assert not await one.holds([lease])
    taken(await other.take([KEY]))


async def test_who_was_overtaken_is_told_and_harms_nobody(
    sharing: tuple[SqliteLeases, SqliteLeases], clock: Clock
) -> None:
    one, other = sharing
    lease = taken(await one.take([KEY]))
    clock.now_ms += TERM_MS
    mine = taken(await other.take([KEY]))
    assert not await one.holds([lease])
    await one.release([lease], shareable=False)
    await one.look()
    assert await other.holds([mine])
    assert await one.take([KEY]) == [Held()]


async def test_who_closes_lets_go_of_all(
    path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]], leases_path: Path
) -> None:
    async with leases(path, clock, errors, always=True) as one:
        taken(await one.take([KEY]))
    assert await asyncio.to_thread(query, leases_path, "SELECT * FROM lease") == []
    assert not await one.holds([Taken(KEY, 1)])
    assert await one.take([KEY]) == [Apart()]


@asynccontextmanager
async def locked(path: Path) -> AsyncIterator[None]:
    """Somebody writes for as long as this block lasts."""
    connection = await asyncio.to_thread(_writing, path)
    try:
        yield
    finally:
        await asyncio.to_thread(connection.close)


def _writing(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


async def test_a_busy_file_holds_nobody_up(
    sharing: tuple[SqliteLeases, SqliteLeases],
    clock: Clock,
    leases_path: Path,
    errors: list[tuple[str, type[StorageError]]],
) -> None:
    one, _ = sharing
    lease = taken(await one.take([KEY]))
    async with locked(leases_path):
        assert await one.take([OTHER_KEY]) == [Apart()]
        assert errors == [("lease", StorageBusy)]
        assert not one.shared
        # It is not asked again for a while.
        assert await one.take([OTHER_KEY]) == [Apart()]
        assert len(errors) == 1
        # Within the term, nobody can have overtaken us.
        assert await one.holds([lease])
        clock.now_ms += TERM_MS
        assert not await one.holds([lease])
    clock.now_ms += round(sqlite_leases.REST_S * 1000)
    await one.look()
    assert one.shared
    taken(await one.take([OTHER_KEY]))


async def test_what_is_taken_when_nobody_waits_any_more_is_given_back(
    sharing: tuple[SqliteLeases, SqliteLeases],
    leases_path: Path,
    errors: list[tuple[str, type[StorageError]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease_file, "_BUSY_S", 60.0)
    one, other = sharing
    await one.release([taken(await one.take([OTHER_KEY]))], shareable=True)
    async with locked(leases_path):
        waiting = asyncio.create_task(one.take([KEY]))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(60):
        while not isinstance((await other.take([KEY]))[0], Taken):
            await asyncio.sleep(0.01)
    assert errors == []


async def test_a_full_disk_holds_nobody_up(
    sharing: tuple[SqliteLeases, SqliteLeases], clock: Clock, errors: list[tuple[str, type[StorageError]]]
) -> None:
    one, other = sharing
    lease = taken(await one.take([KEY]))
    file = one._file
    assert file is not None
    # What SQLite does where a file system has no room, or was remounted read-only.
    await asyncio.to_thread(file._connection.execute, "PRAGMA query_only = ON")
    assert await one.take([OTHER_KEY]) == [Apart()]
    await one.release([lease], shareable=True)
    assert [op for op, _ in errors] == ["lease", "lease"]
    assert await other.take([KEY]) == [Held()]
    clock.now_ms += TERM_MS
    taken(await other.take([KEY]))


@pytest.mark.parametrize("room", [0, 4096])
def test_a_disk_without_room_from_the_start_holds_nobody_up(path: Path, room: int) -> None:
    command = ["prlimit", f"--fsize={room}:unlimited", sys.executable, "-W", "error", "-c", ON_FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Apart False [('lease', 'Storage")


async def test_a_folder_that_is_not_there_holds_nobody_up(
    tmp_path: Path, clock: Clock, errors: list[tuple[str, type[StorageError]]]
) -> None:
    folder = tmp_path / "later"
    async with leases(folder / "nearhit.db", clock, errors, always=True) as one:
        for make in (folder.mkdir, (folder / "nearhit.db").touch):
            assert not one.shared
            assert await one.take([KEY]) == [Apart()]
            assert await asyncio.to_thread(snapshot, tmp_path) == {}
            await asyncio.to_thread(make)
            await one.look()
        taken(await one.take([KEY]))


async def test_a_foreign_file_is_said_once_and_holds_nobody_up(
    path: Path,
    clock: Clock,
    leases_path: Path,
    errors: list[tuple[str, type[StorageError]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    await asyncio.to_thread(foreign_database, leases_path)
    async with leases(path, clock, errors, always=True) as one:
        for _ in range(3):
            assert await one.take([KEY]) == [Apart()]
            clock.now_ms += 60_000
            await one.look()
            assert not one.shared
    assert errors == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "another program" in caplog.text


async def test_a_file_that_is_spoilt_in_use_is_made_anew(
    sharing: tuple[SqliteLeases, SqliteLeases], clock: Clock, leases_path: Path
) -> None:
    one, other = sharing
    await one.release([taken(await one.take([OTHER_KEY]))], shareable=True)
    await asyncio.to_thread(spoil_everything, leases_path)
    async with asyncio.timeout(60):
        while True:
            # As time goes by.
            clock.now_ms += TERM_MS
            await one.look()
            await other.look()
            key = os.urandom(32)
            if isinstance((await one.take([key]))[0], Taken) and await other.take([key]) == [Held()]:
                break


def spoil_everything(path: Path) -> None:
    for suffix in ("", "-wal"):
        part = path.with_name(path.name + suffix)
        damage(part, 100, b"\xaa" * (part.stat().st_size - 100))


@pytest.mark.parametrize("name", ["nearhit.db.leases", "nearhit.db.lock"])
async def test_a_file_that_is_deleted_in_use_is_made_anew(
    sharing: tuple[SqliteLeases, SqliteLeases], path: Path, name: str, errors: list[tuple[str, type[StorageError]]]
) -> None:
    one, other = sharing
    await one.release([taken(await one.take([OTHER_KEY]))], shareable=True)
    await asyncio.to_thread(path.with_name(name).unlink)
    for each in (one, other, one):
        await each.look()
    assert one.shared
    assert other.shared
    lease = taken(await one.take([KEY]))
    assert await other.take([KEY]) == [Held()]
    assert await one.holds([lease])
    assert errors == []
