"""Two versions of nearhit on one file: the older stops writing, loses nothing, and goes on once it may again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from storage.base import Delete, Put, SchemaTooNew, StorageError, StorageUnavailable, Used
from storage.migrate import shipped
from storage.renewal import RenewableStore, renewable
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.write_behind import WriteBehind
from tests.conftest import eventually
from tests.storage.engines import FOREVER, NOW, entry, key, near, room, sketch
from tests.storage.files import query, set_asides, snapshot, start_python

SOON = 0.01
NEXT = len(shipped("sqlite")) + 1


def run(path: Path, *statements: str) -> None:
    """What a process of another version does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


async def newer_takes_over(path: Path) -> None:
    added = f"INSERT INTO migration (number, name, applied_ms) VALUES ({NEXT}, '{NEXT:04}_next', {NOW})"
    await asyncio.to_thread(run, path, "CREATE TABLE next (id INTEGER PRIMARY KEY)", added)


async def newer_is_gone(path: Path) -> None:
    await asyncio.to_thread(run, path, "DROP TABLE next", f"DELETE FROM migration WHERE number = {NEXT}")


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(path) as opened:
        await opened.write([Put(entry(1)), Put(near(2), sketch(5))])
        yield opened


async def test_every_write_is_refused_and_writes_nothing(store: Store, path: Path) -> None:
    await newer_takes_over(path)
    before = await asyncio.to_thread(query, path, "SELECT * FROM entry")
    for use in (
        store.write([Put(entry(3)), Delete(key(1)), Used(key(2), 1, NOW)]),
        store.write([]),
        store.write([Put(entry(3))], room(1)),
        store.veto([b"pair"], NOW),
        store.note("upstream", "name", "value", NOW),
        store.record_scheme(1, "scheme", NOW),
        store.expire(NOW + 10**9, 10),
        store.trim(room(0), 10),
        store.lost(),
    ):
        with pytest.raises(SchemaTooNew, match=f"has schema {NEXT}, this nearhit knows {NEXT - 1}"):
            await use
    assert await asyncio.to_thread(query, path, "SELECT * FROM entry") == before
    for table in ("veto", "fact", "scheme"):
        assert await asyncio.to_thread(query, path, f"SELECT count(*) FROM {table}") == [(0,)]


async def test_what_was_refused_holds_no_lock(store: Store, path: Path) -> None:
    await newer_takes_over(path)
    with pytest.raises(SchemaTooNew):
        await store.write([Put(entry(3))])
    await asyncio.to_thread(run, path, "INSERT INTO next (id) VALUES (1)")
    assert await asyncio.to_thread(query, path, "SELECT id FROM next") == [(1,)]


async def test_it_writes_again_once_the_newer_schema_is_gone(store: Store, path: Path) -> None:
    await newer_takes_over(path)
    with pytest.raises(SchemaTooNew):
        await store.write([Put(entry(3))])
    await newer_is_gone(path)
    await store.write([Put(entry(3))])
    assert await store.get(key(3), NOW) == entry(3)


async def test_space_is_not_given_back_under_a_newer_nearhit(store: Store, path: Path) -> None:
    await store.write([Put(entry(n, answer=b"x" * 100_000)) for n in range(20)])
    await store.write([Delete(key(n)) for n in range(20)])
    await newer_takes_over(path)
    with pytest.raises(SchemaTooNew):
        await store.give_back(10**9)


async def available(store: Store) -> None:
    """Wait until it is; the limit only ends a test that has failed."""
    async with asyncio.timeout(60):
        while True:
            try:
                await store.totals()
            except StorageError:
                await asyncio.sleep(SOON)
            else:
                return


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "cannot be opened" in r.getMessage()]


async def test_without_a_write_it_is_noticed_and_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with renewable(lambda suspect: open_sqlite(path, suspect=suspect), watch_s=SOON, retry_s=SOON) as store:
        await store.write([Put(entry(1))])
        await newer_takes_over(path)
        await eventually(lambda: bool(told(caplog)))
        before = await asyncio.to_thread(snapshot, path.parent)
        # Tried again and again, told once.
        await asyncio.sleep(10 * SOON)
        assert len(told(caplog)) == 1
        assert f"schema {NEXT}" in told(caplog)[0]
        for use in (store.get(key(1), NOW), store.write([Put(entry(2))]), store.leads(), store.replaced_elsewhere()):
            with pytest.raises(StorageUnavailable):
                await use
        assert await asyncio.to_thread(snapshot, path.parent) == before
        await newer_is_gone(path)
        await available(store)
        assert await store.get(key(1), NOW) == entry(1)
        assert await store.replaced_elsewhere()
        assert await store.problems() == []
    assert await asyncio.to_thread(set_asides, path) == []
    assert len(told(caplog)) == 1


async def test_a_write_notices_at_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with renewable(lambda suspect: open_sqlite(path, suspect=suspect), watch_s=FOREVER, retry_s=SOON) as store:
        await newer_takes_over(path)
        with pytest.raises(SchemaTooNew):
            await store.write([Put(entry(2))])
        await eventually(lambda: bool(told(caplog)))
        await newer_is_gone(path)
        await available(store)
        await store.write([Put(entry(3))])
    assert await asyncio.to_thread(set_asides, path) == []
    assert len(told(caplog)) == 1


async def test_reading_through_a_buffer_goes_on_and_what_failed_is_told(path: Path) -> None:
    failures: list[tuple[str, type[StorageError]]] = []
    async with open_sqlite(path) as store:
        buffer = WriteBehind(
            store,
            lambda operation, error: failures.append((operation, type(error))),
            flush_s=FOREVER,
            max_pending_bytes=10**6,
        )
        buffer.put(entry(1))
        await buffer.flush()
        await newer_takes_over(path)
        buffer.put(entry(2))
        await buffer.flush()
        assert failures == [("write", SchemaTooNew)]
        assert await buffer.get(key(1), NOW) == entry(1)
        assert await buffer.get(key(2), NOW) is None


async def test_the_newer_one_works_on_meanwhile(path: Path) -> None:
    async def older(store: RenewableStore, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await store.write([Put(entry(1))])
            except StorageError:
                await asyncio.sleep(SOON)

    stop = asyncio.Event()
    async with renewable(lambda suspect: open_sqlite(path, suspect=suspect), watch_s=SOON, retry_s=SOON) as store:
        task = asyncio.create_task(older(store, stop))
        await newer_takes_over(path)
        for number in range(50):
            await asyncio.to_thread(run, path, f"INSERT INTO next (id) VALUES ({number})")
        stop.set()
        await task
    assert await asyncio.to_thread(query, path, "SELECT count(*) FROM next") == [(50,)]


async def test_an_upgrade_that_overlaps_on_one_schema_keeps_both_working(path: Path) -> None:
    """Two processes that know the same schema: nothing is migrated, each sees what the other writes."""
    async with open_sqlite(path) as old:
        await old.write([Put(entry(1))])
        code = """
import asyncio, sys
from pathlib import Path
from storage.base import Put
from storage.sqlite import open_sqlite
from tests.storage.engines import NOW, entry, key

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        found = await store.get(key(1), NOW)
        await store.write([Put(entry(2))])
        print(found == entry(1), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(await store.get(key(3), NOW) == entry(3), flush=True)

asyncio.run(main())
"""
        with await asyncio.to_thread(start_python, code, path) as new:
            assert new.stdin is not None
            assert new.stdout is not None
            assert await asyncio.to_thread(new.stdout.readline) == "True\n"
            await old.write([Put(entry(3))])
            assert await old.get(key(2), NOW) == entry(2)
            await asyncio.to_thread(new.communicate, "\n")
            assert new.returncode == 0
        await old.write([Put(entry(4))])
        assert (await old.totals()).entries == 4
        assert await old.problems() == []


_INSERT = """INSERT INTO entry (key, key_version, namespace, space, upstream, fingerprint, endpoint, model, words,
stored_ms, expires_ms, cost_ms, prompt_tokens, completion_tokens, usage_known, near, size, used_ms, hits)
VALUES (CAST(zeroblob(31) || x'{number:02x}' AS BLOB), 1, x'', zeroblob(32), 'u', x'', 'e', 'm', NULL,
{now}, {now} + 1000, 5, 1, 1, 1, 0, 2, {now}, 0)"""
_INSERT_BODY = "INSERT INTO body (entry, answer) SELECT max(id), x'6f6b' FROM entry"


def old_file(path: Path, entries: int) -> None:
    """A file as nearhit 0.4 left it: with schema 2."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("page_size = 8192", "auto_vacuum = INCREMENTAL", "journal_mode = WAL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("CREATE TABLE migration (number INTEGER PRIMARY KEY, name TEXT, applied_ms INTEGER) STRICT")
        for migration in shipped("sqlite")[:2]:
            for statement in migration.statements:
                connection.execute(statement)
            connection.execute("INSERT INTO migration VALUES (?, ?, ?)", (migration.number, migration.name, NOW))
        connection.execute(f"PRAGMA application_id = {0x6E656172}")
        connection.execute("BEGIN")
        for number in range(entries):
            connection.execute(_INSERT.format(number=number, now=NOW))
            connection.execute(_INSERT_BODY)
        connection.execute("COMMIT")


async def test_many_stores_bring_one_old_file_up_to_date_once(path: Path) -> None:
    await asyncio.to_thread(old_file, path, 200)
    async with AsyncExitStack() as stack:
        stores = await asyncio.gather(*(stack.enter_async_context(open_sqlite(path)) for _ in range(8)))
        for store in stores:
            assert (await store.totals()).entries == 200
        assert await stores[0].problems() == []
    numbers = await asyncio.to_thread(query, path, "SELECT number FROM migration ORDER BY number")
    assert numbers == [(number,) for number in range(1, NEXT)]


def test_many_processes_bring_one_old_file_up_to_date_once(path: Path) -> None:
    old_file(path, 200)
    code = """
import asyncio, sys
from pathlib import Path
from storage.sqlite import open_sqlite

async def main():
    sys.stdin.readline()
    async with open_sqlite(Path(sys.argv[1])) as store:
        print((await store.totals()).entries)

asyncio.run(main())
"""
    running = [start_python(code, path) for _ in range(5)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in running] == ["200\n"] * 5
    assert query(path, "SELECT count(*) FROM migration") == [(NEXT - 1,)]


async def test_an_old_process_may_write_on_after_the_upgrade(path: Path) -> None:
    """nearhit 0.4 does not look at the schema while it runs; what it writes breaks nothing."""
    await asyncio.to_thread(old_file, path, 10)
    async with open_sqlite(path) as store:
        await asyncio.to_thread(run, path, _INSERT.format(number=77, now=NOW), _INSERT_BODY)
        await asyncio.to_thread(run, path, "PRAGMA foreign_keys = ON", "DELETE FROM entry WHERE id < 4")
        assert await store.problems() == []
        assert await store.get(key(77), NOW) is not None
        assert (await store.totals()).entries == 8
        assert await store.trim(room(2), 100) == 6
        assert await store.problems() == []


async def test_a_file_that_is_too_new_is_refused_at_the_start(path: Path) -> None:
    async with open_sqlite(path):
        pass
    await newer_takes_over(path)
    before = await asyncio.to_thread(snapshot, path.parent)
    with pytest.raises(SchemaTooNew):
        async with open_sqlite(path):
            pytest.fail("it was opened")
    assert await asyncio.to_thread(snapshot, path.parent) == before
