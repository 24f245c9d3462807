"""Of all that use a file, one leads: from when it first can until it ends, however it ends."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path

from storage.base import StorageUnavailable
from storage.leadership import leadership
from storage.renewal import renewable
from storage.sqlite import open_sqlite
from storage.store import Store
from tests.conftest import eventually
from tests.storage.files import run_python, start_python

SOON = 0.01

LEAD = """
import asyncio, sys
from pathlib import Path
from storage.sqlite import open_sqlite

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        for asked in range(int(sys.argv[2])):
            print(await store.leads(), flush=True)
            await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


async def test_whoever_is_alone_leads(store: Store) -> None:
    assert await store.leads()
    assert await store.leads()


async def test_one_at_a_time_leads(path: Path) -> None:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_sqlite(path)) for _ in range(4)]
        asked = await asyncio.gather(*(store.leads() for store in stores for _ in range(5)))
        leading = [store for store in stores if await store.leads()]
        assert len(leading) == 1
        # It keeps what it has, and nobody else gets it meanwhile.
        assert sum(asked) == 5
        assert [await store.leads() for store in stores] == [store is leading[0] for store in stores]


async def test_another_leads_once_the_first_is_closed(path: Path) -> None:
    async with open_sqlite(path) as second:
        async with open_sqlite(path) as first:
            assert await first.leads()
            assert not await second.leads()
        assert await second.leads()


async def test_who_is_closed_leads_no_more(path: Path) -> None:
    async with open_sqlite(path) as first:
        assert await first.leads()
    with suppress(StorageUnavailable):
        assert not await first.leads()
    async with open_sqlite(path) as second:
        assert await second.leads()


async def test_a_candidate_that_gave_up_takes_nothing(path: Path) -> None:
    """Its descriptor's number may be another file's by now."""
    lock = path.with_name("lock")

    def compete() -> tuple[bool, bool]:
        with leadership(lock) as late:
            pass
        with lock.open("rb"), leadership(lock) as other:
            return late.held(), other.held()

    assert await asyncio.to_thread(compete) == (False, True)


async def test_stores_of_different_files_lead_each(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "a.db") as first, open_sqlite(tmp_path / "b.db") as second:
        assert await first.leads()
        assert await second.leads()


async def test_stores_in_memory_lead_each() -> None:
    async with open_sqlite(None) as first, open_sqlite(None) as second:
        assert await first.leads()
        assert await second.leads()


def test_the_lead_is_taken_over_from_a_process_that_is_killed(path: Path) -> None:
    with start_python(LEAD, path, 1) as first, start_python(LEAD, path, 3) as second:
        assert first.stdout is not None
        assert second.stdin is not None
        assert second.stdout is not None
        assert [first.stdout.readline(), second.stdout.readline()].count("True\n") == 1
        first.send_signal(signal.SIGKILL)
        first.wait()
        second.stdin.write("\n")
        second.stdin.flush()
        assert second.stdout.readline() == "True\n"
        second.kill()


def test_who_does_not_ask_does_not_lead(path: Path) -> None:
    with start_python(LEAD, path, 1) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "True\n"
        assert run_python(LEAD, path, 0).stdout == ""
        assert run_python(LEAD, path, 1).stdout == "False\n"
        waiting.kill()


async def test_only_its_owner_may_touch_the_lock(path: Path) -> None:
    async with open_sqlite(path) as store:
        assert await store.leads()
        modes = await asyncio.to_thread(lambda: {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()})
    assert modes == dict.fromkeys(modes, 0o600)
    assert f"{path.name}.upkeep" in modes


async def test_a_store_opened_anew_can_lead_again(path: Path) -> None:
    opened: list[bool] = []

    def opener(suspect: bool) -> AbstractAsyncContextManager[Store]:
        opened.append(suspect)
        return open_sqlite(path, suspect=suspect)

    async with renewable(opener, watch_s=SOON, retry_s=SOON) as store:
        assert await store.leads()
        await asyncio.to_thread(path.unlink)
        await eventually(lambda: len(opened) >= 2 and store.current is not None)
        assert await store.leads()
        async with open_sqlite(path) as other:
            assert not await other.leads()
    async with open_sqlite(path) as other:
        assert await other.leads()
