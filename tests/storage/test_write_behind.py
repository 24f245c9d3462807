"""Writes that follow later are seen at once, and none is lost as long as the store can take it."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from storage.base import Entry, Put, StorageBusy, StorageCorrupt, StorageError, StorageFull, StorageUnavailable
from storage.waiting import ROW_BYTES
from storage.write_behind import BATCH, WriteBehind, write_behind
from tests.conftest import eventually
from tests.storage.door import Door, OnErrorToList
from tests.storage.engines import FOREVER, NOW, entry, key
from tests.storage.files import query


def running(door: Door, *, flush_s: float = 0.001) -> AbstractAsyncContextManager[WriteBehind]:
    return write_behind(door, OnErrorToList([]), flush_s=flush_s, max_pending_bytes=10_000_000)


async def stored(door: Door, number: int) -> Entry | None:
    return await door.store.get(key(number), NOW)


async def hits(door: Door, path: Path) -> dict[int, tuple[int, int]]:
    """Hit count and last use of each entry, as another process would read them."""

    def read() -> dict[int, tuple[int, int]]:
        rows = query(path, "SELECT key, hits, used_ms FROM entry")
        return {int.from_bytes(k, "big"): (count, used_ms - NOW) for k, count, used_ms in rows}

    return await asyncio.to_thread(read)


# What is read before it is written


async def test_a_put_is_read_before_it_is_written(buffer: WriteBehind, door: Door) -> None:
    assert buffer.put(entry())
    assert await buffer.get(key(1), NOW) == entry()
    assert await stored(door, 1) is None


async def test_a_put_hides_the_stored_entry(buffer: WriteBehind, door: Door) -> None:
    await door.store.write([Put(entry(answer=b"old"))])
    buffer.put(entry(answer=b"new"))
    assert await buffer.get(key(1), NOW) == entry(answer=b"new")


async def test_a_stale_waiting_entry_is_not_served(buffer: WriteBehind, door: Door) -> None:
    await door.store.write([Put(entry())])
    buffer.put(entry(expires_ms=NOW + 5))
    assert await buffer.get(key(1), NOW + 4) is not None
    assert await buffer.get(key(1), NOW + 5) is None


async def test_a_delete_hides_the_stored_entry(buffer: WriteBehind, door: Door) -> None:
    await door.store.write([Put(entry())])
    buffer.delete(key(1))
    assert await buffer.get(key(1), NOW) is None
    assert await stored(door, 1) is not None
    await buffer.flush()
    assert await stored(door, 1) is None


async def test_a_delete_takes_back_a_waiting_put(buffer: WriteBehind, door: Door) -> None:
    buffer.put(entry())
    buffer.delete(key(1))
    assert await buffer.get(key(1), NOW) is None
    await buffer.flush()
    assert await stored(door, 1) is None


async def test_an_entry_is_read_while_it_is_being_written(buffer: WriteBehind, door: Door) -> None:
    buffer.put(entry())
    door.shut()
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    assert await buffer.get(key(1), NOW) == entry()
    door.open.set()
    await flushing
    assert await buffer.get(key(1), NOW) == entry()


@pytest.mark.parametrize("later", ["put", "delete"])
async def test_what_changes_while_the_store_is_asked_counts(buffer: WriteBehind, door: Door, later: str) -> None:
    await door.store.write([Put(entry(answer=b"old"))])
    door.shut()
    reading = asyncio.create_task(buffer.get(key(1), NOW))
    await door.arrived.wait()
    if later == "put":
        buffer.put(entry(answer=b"new"))
    else:
        buffer.delete(key(1))
    door.open.set()
    assert await reading == (entry(answer=b"new") if later == "put" else None)


# Flushing


async def test_a_flush_writes_everything_in_batches(buffer: WriteBehind, door: Door) -> None:
    for number in range(BATCH + 100):
        buffer.put(entry(number))
    await buffer.flush()
    assert [len(batch) for batch in door.batches] == [BATCH, 100]
    assert (await door.store.totals()).entries == BATCH + 100


async def test_a_flush_of_nothing_asks_the_store_nothing(buffer: WriteBehind, door: Door) -> None:
    await buffer.flush()
    assert door.batches == []


@pytest.mark.parametrize("later", ["put", "delete"])
async def test_a_change_during_a_flush_is_not_lost(buffer: WriteBehind, door: Door, later: str) -> None:
    buffer.put(entry(answer=b"old"))
    door.shut()
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    if later == "put":
        buffer.put(entry(answer=b"new"))
    else:
        buffer.delete(key(1))
    expected = entry(answer=b"new") if later == "put" else None
    assert await buffer.get(key(1), NOW) == expected
    door.open.set()
    await flushing
    assert await stored(door, 1) == expected


async def test_flushes_at_the_same_moment_keep_the_order(buffer: WriteBehind, door: Door) -> None:
    async def change(version: int) -> None:
        buffer.put(entry(model=str(version)))
        await buffer.flush()

    await asyncio.gather(*(change(version) for version in range(20)))
    assert await stored(door, 1) == entry(model="19")


async def test_writes_follow_by_themselves(door: Door) -> None:
    async with running(door) as buffer:
        for number in range(5):
            buffer.put(entry(number))
            await eventually(lambda: bool(door.batches))
            door.batches.clear()
    assert (await door.store.totals()).entries == 5


async def test_leaving_writes_what_waits(door: Door) -> None:
    async with running(door, flush_s=FOREVER) as buffer:
        buffer.put(entry(1))
        buffer.used(key(1), NOW)
    assert await stored(door, 1) == entry(1)


async def test_leaving_in_the_middle_of_a_write_loses_nothing(door: Door, path: Path) -> None:
    await door.store.write([Put(entry(2))])
    async with running(door) as buffer:
        door.shut()
        buffer.put(entry(1))
        buffer.used(key(2), NOW + 5)
        await door.arrived.wait()
        asyncio.get_running_loop().call_later(0.01, door.open.set)
    assert await stored(door, 1) == entry(1)
    assert await hits(door, path) == {1: (0, 0), 2: (1, 5)}


async def test_leaving_by_an_error_writes_what_waits(door: Door) -> None:
    async def fail() -> None:
        async with running(door, flush_s=FOREVER) as buffer:
            buffer.put(entry(1))
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await stored(door, 1) == entry(1)


# Hits


async def test_hits_arrive(buffer: WriteBehind, door: Door, path: Path) -> None:
    await door.store.write([Put(entry(1)), Put(entry(2))])
    for later in (1, 2, 7):
        buffer.used(key(1), NOW + later)
    await buffer.flush()
    assert await hits(door, path) == {1: (3, 7), 2: (0, 0)}


async def test_hits_alone_are_written_in_time(door: Door, path: Path) -> None:
    await door.store.write([Put(entry(1))])
    async with running(door) as buffer:
        buffer.used(key(1), NOW)
        await eventually(lambda: bool(door.batches))
    assert await hits(door, path) == {1: (1, 0)}


async def test_hits_of_a_waiting_entry_arrive_with_it(buffer: WriteBehind, door: Door, path: Path) -> None:
    buffer.put(entry(1))
    buffer.used(key(1), NOW + 3)
    await buffer.flush()
    assert await hits(door, path) == {1: (1, 3)}


async def test_a_replaced_entry_begins_at_no_hits(buffer: WriteBehind, door: Door, path: Path) -> None:
    buffer.put(entry(1))
    buffer.used(key(1), NOW + 3)
    buffer.put(entry(1))
    await buffer.flush()
    assert await hits(door, path) == {1: (0, 0)}


async def test_hits_of_an_entry_in_a_later_batch_arrive(buffer: WriteBehind, door: Door, path: Path) -> None:
    for number in range(BATCH + 1):
        buffer.put(entry(number))
    buffer.used(key(0), NOW + 1)
    buffer.used(key(BATCH), NOW + 2)
    await buffer.flush()
    arrived = await hits(door, path)
    assert (arrived[0], arrived[BATCH]) == ((1, 1), (1, 2))


async def test_hits_are_not_lost_when_the_store_is_busy(buffer: WriteBehind, door: Door, path: Path) -> None:
    await door.store.write([Put(entry(1))])
    door.failures = [StorageBusy("locked")]
    buffer.used(key(1), NOW + 1)
    await buffer.flush()
    buffer.used(key(1), NOW + 2)
    await buffer.flush()
    assert await hits(door, path) == {1: (2, 2)}


async def test_hits_of_before_a_replacement_do_not_come_back(buffer: WriteBehind, door: Door, path: Path) -> None:
    await door.store.write([Put(entry(1))])
    buffer.used(key(1), NOW + 9)
    door.shut()
    door.failures = [StorageBusy("locked")]
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    buffer.put(entry(1))
    door.open.set()
    await flushing
    await buffer.flush()
    assert await hits(door, path) == {1: (0, 0)}


# When the store fails


async def test_a_busy_store_is_tried_again(
    buffer: WriteBehind, door: Door, errors: list[tuple[str, type[StorageError]]]
) -> None:
    await door.store.write([Put(entry(2))])
    door.failures = [StorageBusy("locked"), StorageBusy("locked")]
    buffer.put(entry(1))
    buffer.delete(key(2))
    for _ in range(2):
        await buffer.flush()
        assert await buffer.get(key(1), NOW) == entry(1)
        assert await buffer.get(key(2), NOW) is None
    await buffer.flush()
    assert errors == [("write", StorageBusy)] * 2
    assert await stored(door, 1) == entry(1)
    assert await stored(door, 2) is None


async def test_a_busy_store_is_tried_again_without_a_further_change(door: Door) -> None:
    door.failures = [StorageBusy("locked")] * 3
    async with running(door) as buffer:
        buffer.put(entry(1))
        await eventually(lambda: bool(door.batches))
    assert await stored(door, 1) == entry(1)


async def test_a_change_while_the_store_is_busy_counts(buffer: WriteBehind, door: Door) -> None:
    buffer.put(entry(answer=b"old"))
    door.shut()
    door.failures = [StorageBusy("locked")]
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    buffer.put(entry(answer=b"new"))
    door.open.set()
    await flushing
    await buffer.flush()
    assert await stored(door, 1) == entry(answer=b"new")


@pytest.mark.parametrize("kind", [StorageFull, StorageUnavailable, StorageCorrupt])
async def test_a_store_that_cannot_write_costs_the_batch_and_is_reported(
    buffer: WriteBehind, door: Door, errors: list[tuple[str, type[StorageError]]], kind: type[StorageError]
) -> None:
    door.failures = [kind("no")]
    buffer.put(entry(1))
    await buffer.flush()
    assert errors == [("write", kind)]
    assert await buffer.get(key(1), NOW) is None
    buffer.put(entry(2))
    await buffer.flush()
    assert await stored(door, 2) == entry(2)


async def test_a_store_that_cannot_be_read_is_a_miss_and_reported(
    buffer: WriteBehind, door: Door, errors: list[tuple[str, type[StorageError]]]
) -> None:
    await door.store.write([Put(entry())])
    door.read_failures = [StorageBusy("locked"), StorageCorrupt("bad page")]
    assert [await buffer.get(key(1), NOW) for _ in range(3)] == [None, None, entry()]
    assert errors == [("get", StorageBusy), ("get", StorageCorrupt)]


async def test_a_look_up_given_up_is_reported(
    buffer: WriteBehind, errors: list[tuple[str, type[StorageError]]]
) -> None:
    buffer.report_slow()
    assert errors == [("get", StorageBusy)]


async def test_an_entry_that_no_store_can_hold_stops_nothing(door: Door) -> None:
    async with running(door) as buffer:
        buffer.put(entry(1, model="\ud800"))
        await eventually(lambda: buffer.put(entry(2)) and bool(door.batches))
    assert await stored(door, 2) == entry(2)


# The bound on what waits

WEIGHT = ROW_BYTES + 1000


@pytest.fixture
def small(door: Door) -> WriteBehind:
    """Room for two entries of this weight."""
    return WriteBehind(door, OnErrorToList([]), flush_s=FOREVER, max_pending_bytes=2 * WEIGHT)


def heavy(number: int) -> Entry:
    return entry(number, answer=b"x" * 900, words="w" * 100)


async def test_more_than_the_bound_is_refused_until_a_flush(small: WriteBehind) -> None:
    assert [small.put(heavy(n)) for n in range(3)] == [True, True, False]
    assert await small.get(key(2), NOW) is None
    await small.flush()
    assert [small.put(heavy(n)) for n in range(3, 6)] == [True, True, False]


async def test_a_deleted_waiting_entry_makes_room(small: WriteBehind) -> None:
    assert small.put(heavy(1))
    assert small.put(heavy(2))
    small.delete(key(1))
    assert small.put(heavy(3))


async def test_a_waiting_entry_may_be_replaced_at_the_bound(small: WriteBehind) -> None:
    assert small.put(heavy(1))
    assert small.put(heavy(2))
    assert small.put(heavy(2))
    assert not small.put(heavy(3))


async def test_what_is_being_written_counts_until_it_is(small: WriteBehind, door: Door) -> None:
    assert small.put(heavy(1))
    assert small.put(heavy(2))
    door.shut()
    flushing = asyncio.create_task(small.flush())
    await door.arrived.wait()
    assert not small.put(heavy(3))
    door.open.set()
    await flushing
    assert small.put(heavy(3))


async def test_a_busy_store_keeps_the_bound(small: WriteBehind, door: Door) -> None:
    assert small.put(heavy(1))
    assert small.put(heavy(2))
    door.failures = [StorageBusy("locked")]
    await small.flush()
    assert not small.put(heavy(3))
    await small.flush()
    assert small.put(heavy(3))
