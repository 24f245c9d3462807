"""Candidates are found before they are written, and vetoes hold when in doubt."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Candidate, Delete, Put, Sketched, StorageBusy, StorageCorrupt, StorageError, StorageFull
from storage.waiting import BAND_BYTES, ROW_BYTES
from storage.write_behind import BATCH, WriteBehind
from tests.storage.door import Door, OnErrorToList
from tests.storage.engines import FOREVER, NOW, key, near, room, sketch
from tests.storage.test_near_model import BANDS, CHANGES, SPACES, Model

SPACE = b"s" * 32


async def ask(buffer: WriteBehind, *keys: int, per_key: int = 100, limit: int = 100) -> list[Candidate]:
    return await buffer.candidates(SPACE, keys, NOW, per_key=per_key, limit=limit)


async def found(buffer: WriteBehind, *keys: int, per_key: int = 100, limit: int = 100) -> list[tuple[int, int]]:
    """The numbers of the candidates for these band keys, and how many each shares."""
    candidates = await ask(buffer, *keys, per_key=per_key, limit=limit)
    return [(int.from_bytes(candidate.key, "big"), candidate.shared) for candidate in candidates]


# What is found before it is written


async def test_a_put_is_found_before_while_and_after_it_is_written(buffer: WriteBehind, door: Door) -> None:
    assert buffer.put(near(1), sketch(5, 6, skeleton="one"))
    expected = [Candidate(key(1), "words 1", "one", 2)]
    assert await ask(buffer, 5, 6, 7) == expected
    assert await door.store.candidates(SPACE, [5], NOW, per_key=9, limit=9) == []
    door.shut()
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    asking = asyncio.create_task(ask(buffer, 5, 6))
    await asyncio.sleep(0)
    door.open.set()
    assert await asking == expected
    await flushing
    assert await ask(buffer, 5, 6) == expected


async def test_a_flush_stores_the_sketch(buffer: WriteBehind, door: Door) -> None:
    buffer.put(near(1), sketch(5))
    buffer.put(near(2))
    await buffer.flush()
    assert [c.key for c in await door.store.candidates(SPACE, [5], NOW, per_key=9, limit=9)] == [key(1)]
    assert [waiting.key for waiting in await door.store.unsketched(1, 9)] == [key(2)]


async def test_what_waits_and_what_is_stored_are_ranked_together(buffer: WriteBehind) -> None:
    for number, keys in enumerate([(1, 2, 3), (1,), (1, 2), (1,)]):
        buffer.put(near(number), sketch(*keys))
    await buffer.flush()
    for number, keys in enumerate([(1, 2, 3), (1,), (1, 2), (1,)], 4):
        buffer.put(near(number), sketch(*keys))
    assert await found(buffer, 1, 2, 3) == [(4, 3), (0, 3), (6, 2), (2, 2), (7, 1), (5, 1), (3, 1), (1, 1)]
    assert await found(buffer, 1, 2, 3, limit=3) == [(4, 3), (0, 3), (6, 2)]


async def test_only_the_latest_that_wait_for_a_key_are_looked_at(buffer: WriteBehind) -> None:
    for number in range(20):
        buffer.put(near(number), sketch(1, 100 + number))
    assert await found(buffer, 1, 104, per_key=2) == [(19, 1), (18, 1), (4, 1)]


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"near": False}, (1,)),
        ({"words": None}, (1,)),
        ({"space": b"t" * 32}, (1,)),
        ({"expires_ms": NOW}, (1,)),
        ({}, (2,)),
    ],
    ids=["exact", "wordless", "space", "stale", "other keys"],
)
async def test_what_waits_and_may_not_be_served_is_not_found(
    buffer: WriteBehind, fields: dict[str, object], keys: tuple[int, ...]
) -> None:
    buffer.put(near(1), sketch(1))
    await buffer.flush()
    buffer.put(near(1, **fields), sketch(*keys))
    assert await found(buffer, 1) == []
    await buffer.flush()
    assert await found(buffer, 1) == []


async def test_a_delete_hides_what_is_stored_and_what_waits(buffer: WriteBehind) -> None:
    buffer.put(near(1), sketch(1))
    await buffer.flush()
    buffer.put(near(2), sketch(1))
    buffer.delete(key(1))
    buffer.delete(key(2))
    assert await found(buffer, 1) == []
    buffer.put(near(1), sketch(1))
    assert await found(buffer, 1) == [(1, 1)]


@pytest.mark.parametrize("change", ["delete", "replace"])
async def test_a_change_that_is_being_written_hides_what_is_stored(
    buffer: WriteBehind, door: Door, change: str
) -> None:
    buffer.put(near(1), sketch(1))
    await buffer.flush()
    if change == "delete":
        buffer.delete(key(1))
    else:
        buffer.put(near(1), sketch(2))
    door.shut()
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    asking = asyncio.create_task(ask(buffer, 1))
    await asyncio.sleep(0)
    door.open.set()
    assert await asking == []
    await flushing
    assert await ask(buffer, 1) == []


class Slow(Door):
    """Answers by what was stored when it was asked, once it may."""

    async def candidates(self, *arguments: object, **bounds: object) -> list[Candidate]:
        answer = await self.store.candidates(*arguments, **bounds)  # type: ignore[arg-type]
        await self._pass()
        return answer


@pytest.mark.parametrize("change", ["put", "delete", "replace", "twice"])
async def test_what_is_written_while_the_store_is_asked_is_not_missed(door: Door, change: str) -> None:
    slow = Slow(door.store)
    buffer = WriteBehind(door, OnErrorToList([]), flush_s=FOREVER, max_pending_bytes=10_000_000)
    buffer._entries = slow
    await door.store.write([Put(near(1), sketch(1))])
    slow.shut()
    if change == "put":
        buffer.put(near(2), sketch(1, 2))
    elif change == "delete":
        buffer.delete(key(1))
    else:
        buffer.put(near(1), sketch(3))
    asking = asyncio.create_task(found(buffer, 1, 2))
    await slow.arrived.wait()
    buffer._entries = door
    await buffer.flush()
    if change == "twice":
        buffer.put(near(1), sketch(1, 2))
        await buffer.flush()
    slow.open.set()
    assert await asking == {"put": [(2, 2), (1, 1)], "delete": [], "replace": [], "twice": [(1, 2)]}[change]


async def test_more_than_a_batch_is_found_while_it_is_written(buffer: WriteBehind, door: Door) -> None:
    for number in range(BATCH + 10):
        buffer.put(near(number), sketch(number, -1))
    door.shut()
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    door.read_failures = [StorageBusy("locked")] * 3
    asking = [asyncio.create_task(found(buffer, number, per_key=5)) for number in (0, BATCH, BATCH + 9)]
    await asyncio.sleep(0)
    door.open.set()
    assert await asyncio.gather(*asking) == [[(0, 1)], [(BATCH, 1)], [(BATCH + 9, 1)]]
    await flushing
    assert await found(buffer, -1, per_key=2) == [(BATCH + 9, 1), (BATCH + 8, 1)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(CHANGES | st.sampled_from(["flush", "busy"]), max_size=20),
    keys=st.lists(BANDS, max_size=6),
    space=st.sampled_from(SPACES),
)
async def test_when_a_change_is_written_makes_no_difference(
    buffer: WriteBehind, door: Door, steps: list[object], keys: list[int], space: bytes
) -> None:
    await buffer.flush()
    await door.store.trim(room(0, 2**60), 1000)
    model = Model()
    for step in steps:
        match step:
            case Put(entry, made):
                model.change(step)
                buffer.put(entry, made)
            case Delete(one):
                model.change(step)
                buffer.delete(one)
            case "flush":
                await buffer.flush()
            case "busy":
                door.failures = [StorageBusy("locked")]
                await buffer.flush()
                door.failures = []
        candidates = await buffer.candidates(space, keys, NOW, per_key=100, limit=100)
        assert candidates == model.candidates(space, keys, NOW, 100, 100)
    await buffer.flush()
    assert await door.store.problems() == []


# Failures


@pytest.mark.parametrize("kind", [StorageBusy, StorageCorrupt])
async def test_a_store_that_fails_leaves_what_waits(
    buffer: WriteBehind, door: Door, errors: list[tuple[str, type[StorageError]]], kind: type[StorageError]
) -> None:
    buffer.put(near(1), sketch(1))
    await buffer.flush()
    buffer.put(near(2), sketch(1))
    door.read_failures = [kind("no")]
    assert await found(buffer, 1) == [(2, 1)]
    assert errors == [("candidates", kind)]
    assert await found(buffer, 1) == [(2, 1), (1, 1)]


async def test_what_a_busy_store_gave_back_is_found(buffer: WriteBehind, door: Door) -> None:
    door.failures = [StorageBusy("locked")] * 2
    buffer.put(near(1), sketch(1))
    buffer.put(near(2), sketch(1))
    door.shut()
    flushing = asyncio.create_task(buffer.flush())
    await door.arrived.wait()
    buffer.put(near(3), sketch(1))
    buffer.put(near(1), sketch(2))
    door.open.set()
    await flushing
    assert await found(buffer, 1) == [(3, 1), (2, 1)]
    assert await found(buffer, 2) == [(1, 1)]


async def test_what_could_not_be_written_is_found_no_more(buffer: WriteBehind, door: Door) -> None:
    door.failures = [StorageFull("no room")]
    buffer.put(near(1), sketch(1))
    await buffer.flush()
    assert await found(buffer, 1) == []


async def test_a_look_up_that_is_cancelled_leaves_nothing_behind(buffer: WriteBehind, door: Door) -> None:
    door.shut()
    asking = asyncio.create_task(ask(buffer, 1))
    await door.arrived.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not buffer._asking


async def test_a_sketch_that_was_made_anew_goes_past_the_buffer(buffer: WriteBehind, door: Door) -> None:
    buffer.put(near(1), sketch(1))
    buffer.put(near(2), sketch(1))
    await buffer.flush()
    buffer.delete(key(1))
    await door.write([Sketched(key(1), sketch(2)), Sketched(key(2), sketch(2))])
    assert await found(buffer, 2) == [(2, 1)]
    await buffer.flush()
    assert await found(buffer, 1, 2) == [(2, 1)]


# Vetoes


async def test_a_veto_is_told_and_holds_when_in_doubt(
    buffer: WriteBehind, door: Door, errors: list[tuple[str, type[StorageError]]]
) -> None:
    await door.store.veto([b"a"], NOW)
    assert await buffer.vetoed([b"b", b"a"])
    assert not await buffer.vetoed([b"b"])
    door.read_failures = [StorageBusy("locked")]
    assert await buffer.vetoed([b"b"])
    assert errors == [("vetoed", StorageBusy)]


# The bound on what waits


async def test_a_sketch_has_its_weight(door: Door) -> None:
    heavy = ROW_BYTES + len(near(1).answer) + len("words 1") + 100 + 2 * BAND_BYTES
    small = WriteBehind(door, OnErrorToList([]), flush_s=FOREVER, max_pending_bytes=2 * heavy)
    made = sketch(1, 2, skeleton="x" * 100)
    assert [small.put(near(n), made) for n in (1, 2, 3)] == [True, True, False]
    assert await found(small, 1) == [(2, 1), (1, 1)]
    small.delete(key(1))
    assert small.put(near(3), made)
    assert small.put(near(3), made)
    assert not small.put(near(4), made)
