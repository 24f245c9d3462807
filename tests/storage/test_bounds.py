"""Bounds hold after every write, by what the operating system says of the files, and nothing goes before its turn."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Change, Delete, Put, Room, StorageError, Used
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.write_behind import WriteBehind
from tests.storage.engines import FOREVER, NOW, entry, key, near, room, sketch

MIB = 1024 * 1024


def on_disk(path: Path) -> int:
    """What the database and its log take, in bytes."""
    parts = [path, path.with_name(f"{path.name}-wal")]
    return sum(part.stat().st_size for part in parts if part.exists())


async def there(store: Store, numbers: Sequence[int]) -> list[int]:
    found = await store.stored([key(number) for number in numbers])
    return [number for number in numbers if key(number) in found]


async def gave_all_back(store: Store) -> None:
    while await store.give_back(1 * MIB):
        pass


# The number of entries


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    most=st.integers(1, 60),
    top_k=st.sampled_from([0, 1, 3, 1000]),
    batches=st.lists(st.tuples(st.integers(0, 120), st.integers(1, 130)), max_size=8),
    topics=st.integers(1, 5),
)
async def test_after_every_write_there_are_no_more_than_allowed(
    store: Store, most: int, top_k: int, batches: list[tuple[int, int]], topics: int
) -> None:
    await store.write([Delete(key(number)) for number in range(300)])
    stored: set[int] = set()
    for start, count in batches:
        numbers = range(start, start + count)
        evicted = await store.write(
            [Put(entry(number, topic=number % topics)) for number in numbers], room(most, top_k=top_k)
        )
        before = stored | set(numbers)
        stored = set(await there(store, range(300)))
        assert stored <= before
        # Never more than the bound, and never fewer than could stay.
        assert len(stored) == min(most, len(before))
        assert evicted == len(before) - len(stored)


@pytest.mark.parametrize("size", [1, 7, 512])
async def test_the_bound_holds_however_entries_are_batched(store: Store, size: int) -> None:
    for start in range(0, 2000, size):
        await store.write([Put(entry(n)) for n in range(start, min(start + size, 2000))], room(100))
        assert (await store.totals()).entries <= 100
        if start >= 2000 // 4 and size == 1:
            break
    assert (await store.totals()).entries == 100


@pytest.mark.parametrize("count", [1, 2, 30])
async def test_what_a_write_brings_in_is_not_the_first_to_go_for_it(store: Store, count: int) -> None:
    """However little it is worth: nobody could have asked for it again."""
    await store.write([Put(entry(n, cost_ms=100_000), hits=50) for n in range(100)], room(100))
    new = range(1000, 1000 + count)
    await store.write([Put(entry(n, cost_ms=1, answer=b"x" * 5000)) for n in new], room(100))
    assert await there(store, new) == list(new)


async def test_what_a_write_brings_in_is_not_the_first_to_go_for_bytes(store: Store) -> None:
    bounds = room(max_bytes=16 * MIB)
    costly = [Put(entry(n, cost_ms=100_000, answer=b"x" * 100_000), hits=50) for n in range(300)]
    for start in range(0, 300, 20):
        await store.write(costly[start : start + 20], bounds)
    for number in range(1000, 1010):
        await store.write([Put(entry(number, cost_ms=1, answer=b"x" * 100_000))], bounds)
        assert await there(store, [number]) == [number]


async def test_a_room_for_one_holds_the_latest(store: Store) -> None:
    for number in range(5):
        await store.write([Put(entry(number))], room(1))
        assert await there(store, range(5)) == [number]


async def test_below_the_bound_nothing_goes_however_full_a_topic_is(store: Store) -> None:
    for start in range(0, 1000, 100):
        assert await store.write([Put(entry(n, topic=1)) for n in range(start, start + 100)], room(1000, top_k=1)) == 0
    assert await store.trim(room(1000, top_k=1), 1000) == 0
    assert (await store.totals()).entries == 1000


async def test_an_entry_that_is_replaced_takes_no_more_room(store: Store) -> None:
    await store.write([Put(entry(n)) for n in range(50)], room(50))
    for number in range(50):
        assert await store.write([Put(entry(number, answer=b"new"))], room(50)) == 0
    assert (await store.totals()).entries == 50


async def test_a_write_that_brings_nothing_in_removes_nothing(store: Store) -> None:
    await store.write([Put(entry(n)) for n in range(50)])
    assert await store.write([Used(key(1), 1, NOW), Delete(key(2))], room(10)) == 0
    assert (await store.totals()).entries == 49


# Topics


async def test_the_best_of_a_topic_outlive_better_entries_of_another(store: Store) -> None:
    """Of the small topic, those that were asked for again stay, though all of the large one are worth more."""
    large = [Put(entry(n, topic=1, cost_ms=50_000 + n), hits=20) for n in range(1000, 1090)]
    small = [Put(entry(n, topic=2, cost_ms=10), hits=1 + n) for n in range(10)]
    await store.write([*large, *small])
    assert await store.trim(room(50, top_k=5), 100) == 50
    assert await there(store, range(10)) == [5, 6, 7, 8, 9]


async def test_those_nobody_asked_for_again_are_not_the_best_of_a_topic(store: Store) -> None:
    await store.write([Put(entry(n, topic=n, cost_ms=10)) for n in range(10)])
    await store.write([Put(entry(n, topic=99, cost_ms=50_000), hits=1) for n in range(100, 110)])
    assert await store.trim(room(10, top_k=5), 100) == 10
    assert await there(store, range(200)) == list(range(100, 110))


async def test_the_best_of_every_topic_stay_however_many_topics_there_are(store: Store) -> None:
    """Forty topics with two good entries and a bad one each."""
    puts = [Put(entry(3 * t + n, topic=t, cost_ms=100 * (t + 1)), hits=n) for t in range(40) for n in range(3)]
    await store.write(puts)
    assert await store.trim(room(80, top_k=1), 1000) == 40
    best = range(2, 120, 3)
    assert await there(store, best) == list(best)


async def test_of_equals_no_more_than_asked_for_are_the_best_of_a_topic(store: Store) -> None:
    await store.write([Put(entry(n, topic=1, cost_ms=9000, answer=b"x"), hits=1) for n in range(100)])
    await store.write([Put(entry(n, topic=2, cost_ms=10), hits=1) for n in range(200, 203)])
    assert await store.trim(room(30, top_k=3), 1000) == 73
    assert await there(store, range(200, 203)) == [200, 201, 202]


# Bytes


class Measured:
    """A store whose files are measured after every write."""

    def __init__(self, store: Store, path: Path) -> None:
        self.largest = 0
        self.store = store
        self._path = path
        self.get, self.candidates, self.vetoed = store.get, store.candidates, store.vetoed

    async def write(self, changes: Sequence[Change], bounds: Room | None = None) -> int:
        evicted = await self.store.write(changes, bounds)
        self.largest = max(self.largest, await asyncio.to_thread(on_disk, self._path))
        return evicted


async def filled(path: Path, bounds: Room, sizes: Sequence[int], mebibytes: int, upkeep: bool) -> Measured:
    """What comes of a burst of near entries with answers of these sizes, of so many mebibytes in all."""
    failures: list[tuple[str, StorageError]] = []
    chance = random.Random(1)
    async with open_sqlite(path) as store:
        measured = Measured(store, path)
        buffer = WriteBehind(
            measured,
            lambda operation, error: failures.append((operation, error)),
            flush_s=FOREVER,
            max_pending_bytes=64 * MIB,
            room=bounds,
        )
        written, number = 0, 0
        while written < mebibytes * MIB:
            for _ in range(chance.choice([1, 30, 600])):
                number += 1
                answer = chance.randbytes(chance.choice(sizes))
                bands = [chance.getrandbits(62) for _ in range(16)]
                buffer.put(
                    near(number, answer=answer, topic=number % 7, cost_ms=chance.randint(1, 9999)), sketch(*bands)
                )
                buffer.used(key(chance.randint(1, number)), NOW)
                written += len(answer) + 2000
            await buffer.flush()
            if upkeep:
                await store.trim(bounds, 200)
                await store.give_back(2 * MIB)
                measured.largest = max(measured.largest, await asyncio.to_thread(on_disk, path))
        assert (await store.totals()).entries > 0
        assert await store.problems() == []
    assert failures == []
    return measured


@pytest.mark.parametrize(
    ("max_mib", "sizes", "written_mib", "upkeep"),
    [
        (2, [200, 2000], 2, False),
        (4, [200, 2000, 20_000], 10, False),
        (8, [200, 2000, 20_000, 200_000], 30, True),
        (16, [200, 2000, 20_000, 1_000_000], 60, False),
        (16, [200, 2000], 16, False),
    ],
)
async def test_the_files_never_exceed_the_bound(
    path: Path, max_mib: int, sizes: list[int], written_mib: int, upkeep: bool
) -> None:
    bounds = room(max_bytes=max_mib * MIB, top_k=50)
    measured = await filled(path, bounds, sizes, written_mib, upkeep)
    assert measured.largest <= bounds.max_bytes
    # It is not kept by leaving the room empty, either.
    assert measured.largest >= bounds.max_bytes // 2


async def test_an_answer_larger_than_the_room_takes_nothing_else_with_it(store: Store) -> None:
    bounds = room(max_bytes=4 * MIB)
    await store.write([Put(entry(n, answer=b"x" * 2000)) for n in range(100)], bounds)
    await store.write([Put(entry(1000, answer=b"x" * 6_000_000, cost_ms=10**8))], bounds)
    await store.trim(bounds, 1000)
    assert len(await there(store, range(100))) >= 50
    assert await there(store, [1000]) == []


async def test_a_large_answer_costs_about_as_many_bytes_as_it_brings(store: Store) -> None:
    """Small entries of little worth make place for it, and not far more than that."""
    bounds = room(max_bytes=16 * MIB)
    for start in range(0, 5000, 250):
        await store.write([Put(entry(n, answer=b"x" * 1000)) for n in range(start, start + 250)], bounds)
    before = (await store.totals()).entries
    await store.write([Put(entry(9000, answer=b"x" * 1_000_000, cost_ms=10**7))], bounds)
    assert await there(store, [9000]) == [9000]
    assert before - (await store.totals()).entries <= 2 * 1_000_000 // 1000


async def test_of_mixed_sizes_no_more_go_than_must(path: Path) -> None:
    """The largest are worth least and go first: a few of them make up the surplus."""
    async with open_sqlite(path) as store:
        await store.write([Put(entry(n, answer=b"x" * 1000)) for n in range(3000)])
        await store.write([Put(entry(n, answer=b"x" * 500_000)) for n in range(5000, 5040)])
        bounds = room(max_bytes=20 * MIB)
        while await store.trim(bounds, 200):
            pass
        assert len(await there(store, range(3000))) == 3000
        assert (await store.totals()).entries >= 3000 + 10


async def test_a_purge_of_everything_gives_the_space_back(path: Path) -> None:
    bounds = room(max_bytes=64 * MIB)
    async with open_sqlite(path) as store:
        for start in range(0, 1000, 100):
            puts = [Put(near(n, answer=b"x" * 20_000), sketch(*range(n, n + 16))) for n in range(start, start + 100)]
            await store.write(puts, bounds)
        assert await asyncio.to_thread(on_disk, path) > 20 * MIB
        for start in range(0, 1000, 100):
            await store.write([Delete(key(n)) for n in range(start, start + 100)])
        await gave_all_back(store)
        # The log is cut when it is used anew.
        await store.note("a", "b", "c", NOW)
        assert (await asyncio.to_thread(path.stat)).st_size < MIB
        assert await asyncio.to_thread(on_disk, path) < 64 * MIB // 8 + MIB
        assert await store.problems() == []
    assert await asyncio.to_thread(on_disk, path) < MIB


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(1, 3 * MIB), left=st.integers(0, 60))
async def test_space_is_given_back_in_steps_of_any_size(tmp_path: Path, limit: int, left: int) -> None:
    path = tmp_path / f"{uuid.uuid4()}.db"
    async with open_sqlite(path) as store:
        await store.write([Put(entry(n, answer=b"x" * 30_000)) for n in range(60)])
        await store.write([Delete(key(n)) for n in range(left, 60)])
        given_back = []
        while step := await store.give_back(limit):
            assert step <= max(limit, 8192)
            given_back.append(step)
            if len(given_back) > 30:
                limit = 10 * MIB
        assert sum(given_back) >= (60 - left) * 30_000 * 0.9
        assert await there(store, range(60)) == list(range(left))
        assert await store.problems() == []


async def test_a_much_smaller_room_after_a_restart_is_reached_in_steps(path: Path) -> None:
    async with open_sqlite(path) as store:
        for start in range(0, 3000, 100):
            await store.write([Put(entry(n, answer=b"x" * 6000)) for n in range(start, start + 100)], room())
        assert await asyncio.to_thread(on_disk, path) > 20 * MIB
    bounds = room(500, 4 * MIB)
    async with open_sqlite(path) as store:
        while step := await store.trim(bounds, 200):
            assert step <= 200
        await gave_all_back(store)
        await store.note("a", "b", "c", NOW)
        assert 0 < (await store.totals()).entries <= 500
        assert await asyncio.to_thread(on_disk, path) <= bounds.max_bytes
        assert await store.problems() == []


async def test_a_room_smaller_than_an_empty_file_keeps_working(store: Store) -> None:
    for number in range(5):
        await store.write([Put(entry(number))], room(max_bytes=1000))
    await store.trim(room(max_bytes=1000), 100)
    assert (await store.totals()).entries <= 1
    await store.write([Put(entry(9))])
    assert await there(store, [9]) == [9]


async def test_totals_are_what_the_operating_system_says(path: Path) -> None:
    async with open_sqlite(path) as store:
        for number in range(40):
            await store.write([Put(entry(number, answer=b"x" * 100_000))], room(max_bytes=64 * MIB))
        told, seen = (await store.totals()).bytes, await asyncio.to_thread(on_disk, path)
    assert seen <= told <= 2 * seen
