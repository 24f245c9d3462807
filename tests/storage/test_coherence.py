"""Each process is told when others removed or replaced entries, and of nothing else."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Change, Delete, Put, Sketched, StorageError, Used
from storage.sqlite import open_sqlite
from storage.store import Store
from tests.storage.engines import NOW, entry, key, near, room, sketch
from tests.storage.files import run_python


@pytest.fixture
async def pair(path: Path) -> AsyncIterator[tuple[Store, Store]]:
    """Two stores of one file, which know of each other."""
    async with open_sqlite(path) as one, open_sqlite(path) as other:
        await one.write([Put(near(n), sketch(n)) for n in range(5)])
        assert await one.replaced_elsewhere()
        assert await other.replaced_elsewhere()
        yield one, other
        assert await one.problems() == []


async def test_at_first_anything_may_have_happened(store: Store) -> None:
    assert await store.replaced_elsewhere()
    assert not await store.replaced_elsewhere()


async def test_at_first_anything_may_have_happened_though_one_wrote_oneself(store: Store) -> None:
    await store.write([Put(entry(1))])
    await store.write([Delete(key(1))])
    assert await store.replaced_elsewhere()
    assert not await store.replaced_elsewhere()


REPLACING: list[list[Change]] = [
    [Delete(key(1))],
    [Put(entry(1))],
    [Delete(key(1)), Put(entry(1))],
    [Put(entry(1)), Put(entry(9)), Used(key(2), 1, NOW)],
    [Put(entry(9)), Delete(key(1))],
]
OTHER: list[list[Change]] = [
    [],
    [Put(entry(9))],
    [Put(entry(9)), Put(entry(9))],
    [Put(entry(9)), Delete(key(9))],
    [Delete(key(9))],
    [Used(key(1), 1, NOW)],
    [Sketched(key(1), sketch(4))],
]


@pytest.mark.parametrize("changes", REPLACING)
async def test_what_another_removed_or_replaced_is_told_once(pair: tuple[Store, Store], changes: list[Change]) -> None:
    one, other = pair
    await one.write(changes)
    assert await other.replaced_elsewhere()
    assert not await other.replaced_elsewhere()
    assert not await one.replaced_elsewhere()


@pytest.mark.parametrize("changes", OTHER)
async def test_what_replaces_nothing_is_not_told(pair: tuple[Store, Store], changes: list[Change]) -> None:
    one, other = pair
    await one.write(changes)
    assert not await other.replaced_elsewhere()
    assert not await one.replaced_elsewhere()


async def test_expiry_bounds_vetoes_and_facts_are_not_told(pair: tuple[Store, Store]) -> None:
    one, other = pair
    assert await one.expire(NOW + 10**9, 1) == 1
    assert await one.trim(room(3), 10) == 1
    assert await one.write([Put(entry(9))], room(3)) == 1
    await one.veto([b"pair"], NOW)
    await one.note("a", "b", "c", NOW)
    await one.give_back(10**9)
    assert not await other.replaced_elsewhere()


async def test_a_write_that_failed_is_not_told(pair: tuple[Store, Store]) -> None:
    one, other = pair
    with pytest.raises(StorageError):
        await one.write([Delete(key(1)), Put(entry(9, key=b"short"))])
    assert not await other.replaced_elsewhere()


async def test_what_another_process_removed_is_told(pair: tuple[Store, Store], path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from storage.base import Delete
from storage.sqlite import open_sqlite
from tests.storage.engines import key

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        await store.write([Delete(key(1))])

asyncio.run(main())
"""
    await asyncio.to_thread(run_python, code, path)
    assert [await store.replaced_elsewhere() for store in pair] == [True, True]


STEPS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["replace", "ask", "add", "use"])), max_size=30)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_in_whatever_order_nothing_is_missed(tmp_path: Path, steps: list[tuple[int, str]]) -> None:
    path = tmp_path / f"{uuid.uuid4()}.db"
    async with open_sqlite(path) as one, open_sqlite(path) as two, open_sqlite(path) as three:
        stores = [one, two, three]
        await one.write([Put(entry(1))])
        for store in stores:
            await store.replaced_elsewhere()
        untold = [False] * 3
        for number, (who, what) in enumerate(steps, 100):
            if what == "replace":
                await stores[who].write([Put(entry(1))])
                untold = [told or other != who for other, told in enumerate(untold)]
            elif what == "ask":
                assert await stores[who].replaced_elsewhere() is untold[who]
                untold[who] = False
            elif what == "add":
                await stores[who].write([Put(entry(number))])
            else:
                await stores[who].write([Used(key(1), 1, NOW)])
        assert [await store.replaced_elsewhere() for store in stores] == untold


async def test_nothing_is_missed_while_all_write_and_ask(pair: tuple[Store, Store]) -> None:
    one, other = pair
    seen = asyncio.Event()

    async def write(store: Store) -> None:
        for _ in range(30):
            await store.write([Put(entry(1))])

    async def ask() -> int:
        told = 0
        while not seen.is_set():
            told += await one.replaced_elsewhere()
        return told

    asking = asyncio.create_task(ask())
    await asyncio.gather(write(one), write(other))
    seen.set()
    # Whatever was told when, the last change of the other is known by now.
    assert await asking + await one.replaced_elsewhere() >= 1
    assert not await one.replaced_elsewhere()
    await other.write([Put(entry(1))])
    assert await one.replaced_elsewhere()
