"""The contract of `storage.store.Store`. It knows no engine: each one passes all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Change, Delete, Entry, Put, Sketched, StorageError, StorageUnavailable, Used
from storage.store import Store
from tests.storage.engines import NOW, OpenStore, entry, key, room, sketch

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x00é漢🦙\u202e"), max_size=40)
TIME = st.integers(0, 2**62)
ENTRIES = st.builds(
    Entry,
    key=st.binary(min_size=32, max_size=32),
    key_version=INT64,
    namespace=st.binary(max_size=40),
    space=st.binary(min_size=32, max_size=32),
    upstream=TEXT,
    fingerprint=st.binary(max_size=40),
    endpoint=TEXT,
    model=TEXT,
    words=st.none() | TEXT,
    stored_ms=TIME,
    expires_ms=st.integers(2**62, 2**63 - 1),
    cost_ms=INT64,
    prompt_tokens=st.none() | INT64,
    completion_tokens=st.none() | INT64,
    usage_known=st.booleans(),
    answer=st.binary(max_size=200) | st.just(bytes(range(256)) * 200),
    near=st.booleans(),
)


async def kept(store: Store, numbers: Sequence[int], now_ms: int = NOW) -> set[int]:
    """The numbers whose entries are served at this time."""
    return {number for number in numbers if await store.get(key(number), now_ms) is not None}


# Reading and writing


async def test_an_unknown_key_is_none(store: Store) -> None:
    assert await store.get(key(1), NOW) is None


async def test_what_was_put_is_read_back(store: Store) -> None:
    await store.write([Put(entry(1)), Put(entry(2))])
    assert await store.get(key(1), NOW) == entry(1)
    assert await store.get(key(2), NOW) == entry(2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=ENTRIES)
async def test_every_field_comes_back_as_it_was(store: Store, stored: Entry) -> None:
    await store.write([Put(stored)])
    found = await store.get(stored.key, stored.expires_ms - 1)
    assert found == stored
    assert [type(getattr(found, f.name)) for f in fields(Entry)] == [
        type(getattr(stored, f.name)) for f in fields(Entry)
    ]


async def test_an_answer_of_many_pages_comes_back_whole(store: Store) -> None:
    large = entry(answer=bytes(range(256)) * 20_000)
    await store.write([Put(large)])
    assert await store.get(large.key, NOW) == large


async def test_a_second_put_replaces_the_first(store: Store) -> None:
    await store.write([Put(entry(answer=b"first"))])
    await store.write([Put(entry(answer=b"second", model="other"))])
    assert await store.get(key(1), NOW) == entry(answer=b"second", model="other")
    assert (await store.totals()).entries == 1


async def test_a_deleted_entry_is_gone_and_no_other(store: Store) -> None:
    await store.write([Put(entry(1)), Put(entry(2))])
    await store.write([Delete(key(1))])
    assert await kept(store, [1, 2]) == {2}


@pytest.mark.parametrize(
    "change",
    [Delete(key(9)), Used(key(9), 1, NOW), Sketched(key(9), sketch(1))],
    ids=["delete", "used", "sketched"],
)
async def test_a_change_to_an_unknown_key_does_nothing(store: Store, change: Change) -> None:
    await store.write([change])
    assert (await store.totals()).entries == 0


async def test_no_changes_are_no_error(store: Store) -> None:
    await store.write([])
    assert (await store.totals()).entries == 0


async def test_a_hit_changes_nothing_that_is_read(store: Store) -> None:
    await store.write([Put(entry()), Used(key(1), 3, NOW + 5)])
    assert await store.get(key(1), NOW) == entry()


# Order within a batch

A, B = entry(answer=b"a"), entry(answer=b"b")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([Put(A), Put(B)], B),
        ([Put(B), Put(A)], A),
        ([Put(A), Delete(A.key)], None),
        ([Delete(A.key), Put(A)], A),
        ([Put(A), Delete(A.key), Put(B)], B),
        ([Put(A), Put(B), Delete(A.key)], None),
        ([Used(A.key, 1, NOW), Put(A), Used(A.key, 1, NOW), Delete(A.key)], None),
    ],
)
@pytest.mark.parametrize("before", [None, entry(answer=b"before")], ids=["empty", "replacing"])
async def test_the_last_change_of_a_key_wins(
    store: Store, before: Entry | None, changes: list[Change], expected: Entry | None
) -> None:
    if before is not None:
        await store.write([Put(before)])
    await store.write(changes)
    assert await store.get(A.key, NOW) == expected


# Both entries are equally old; the one that a hit reached stays.
@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ([Put(entry(1)), Put(entry(2)), Used(key(1), 1, NOW + 1)], 1),
        ([Put(entry(1)), Used(key(1), 1, NOW + 1), Put(entry(2))], 1),
        # The replaced entry begins anew: its earlier hit no longer counts.
        ([Put(entry(1)), Used(key(1), 1, NOW + 9), Put(entry(1)), Put(entry(2)), Used(key(2), 1, NOW + 1)], 2),
        # Hits may be told out of order; the latest time counts.
        (
            [
                Put(entry(1)),
                Put(entry(2)),
                Used(key(1), 1, NOW + 9),
                Used(key(1), 1, NOW + 1),
                Used(key(2), 1, NOW + 5),
            ],
            1,
        ),
        ([Put(entry(1)), Put(entry(2)), Used(key(1), 1, NOW - 9), Used(key(2), 1, NOW + 1)], 2),
    ],
)
@pytest.mark.parametrize("batches", ["one", "many"])
async def test_hits_make_an_entry_worth_more(store: Store, changes: list[Change], stays: int, batches: str) -> None:
    for batch in [changes] if batches == "one" else [[change] for change in changes]:
        await store.write(batch)
    assert await store.trim(room(1, 2**60), 10) == 1
    assert await kept(store, [1, 2]) == {stays}


# All or nothing

UNFIT = [
    entry(9, key=b"short"),
    entry(9, space=b""),
    entry(9, answer="text"),
    entry(9, model=None),
    entry(9, cost_ms=2**63),
    entry(9, model="\ud800"),
]


@pytest.mark.parametrize("unfit", UNFIT, ids=["key", "space", "answer", "null", "too large", "surrogate"])
async def test_a_batch_with_an_unfit_entry_leaves_nothing(store: Store, unfit: Entry) -> None:
    await store.write([Put(entry(1))])
    with pytest.raises(StorageError):
        await store.write([Put(entry(1, answer=b"new")), Put(entry(2)), Delete(key(1)), Put(entry(3)), Put(unfit)])
    assert await store.get(key(1), NOW) == entry(1)
    assert await kept(store, [1, 2, 3]) == {1}


async def test_a_store_that_refused_a_batch_takes_the_next(store: Store) -> None:
    with pytest.raises(StorageError):
        await store.write([Put(entry(1)), Used(key(1), 2**63, NOW)])
    await store.write([Put(entry(2))])
    assert await kept(store, [1, 2]) == {2}


# Freshness


@pytest.mark.parametrize(("now_ms", "fresh"), [(NOW + 9, True), (NOW + 10, False), (NOW + 11, False), (NOW - 9, True)])
async def test_an_entry_is_fresh_until_the_time_it_expires(store: Store, now_ms: int, fresh: bool) -> None:
    await store.write([Put(entry(expires_ms=NOW + 10))])
    assert (await store.get(key(1), now_ms) is not None) is fresh


async def test_a_stale_entry_counts_until_it_is_swept(store: Store) -> None:
    await store.write([Put(entry(expires_ms=NOW + 10))])
    assert await store.get(key(1), NOW + 10) is None
    assert (await store.totals()).entries == 1


async def test_expiry_removes_the_stale_in_steps(store: Store) -> None:
    await store.write([Put(entry(n, expires_ms=NOW + n)) for n in range(1, 11)])
    assert [await store.expire(NOW + 7, 3) for _ in range(4)] == [3, 3, 1, 0]
    assert await kept(store, range(1, 11)) == {8, 9, 10}


async def test_expiry_agrees_with_reading_at_the_boundary(store: Store) -> None:
    await store.write([Put(entry(n, expires_ms=NOW + n)) for n in (1, 2)])
    served = await kept(store, [1, 2], NOW + 1)
    assert await store.expire(NOW + 1, 10) == 1
    assert await kept(store, [1, 2]) == served == {2}


# Bounds


async def test_trim_removes_the_least_worthy_down_to_the_bound(store: Store) -> None:
    await store.write([Put(entry(n, cost_ms=1000 * n)) for n in (3, 1, 4, 2, 5)])
    assert await store.trim(room(2, 2**60), 100) == 3
    assert await kept(store, range(1, 6)) == {4, 5}


async def test_trim_goes_in_steps(store: Store) -> None:
    await store.write([Put(entry(n, stored_ms=NOW + n, answer=b"answer")) for n in range(1, 11)])
    assert [await store.trim(room(3, 2**60), 4) for _ in range(3)] == [4, 3, 0]
    assert await kept(store, range(1, 11)) == {8, 9, 10}


async def test_trims_at_the_same_moment_remove_no_more_than_the_surplus(store: Store) -> None:
    await store.write([Put(entry(n)) for n in range(10)])
    assert sum(await asyncio.gather(*(store.trim(room(7, 2**60), 2) for _ in range(5)))) == 3
    assert (await store.totals()).entries == 7


async def test_trim_leaves_a_store_within_its_bounds_alone(store: Store) -> None:
    await store.write([Put(entry(n)) for n in (1, 2)])
    totals = await store.totals()
    assert await store.trim(room(2, 3 * totals.bytes), 10) == 0
    assert await store.totals() == totals


async def test_trim_by_bytes_removes_the_first_stored_of_equals(store: Store) -> None:
    await store.write([Put(entry(n, stored_ms=NOW + n, answer=b"x" * 500_000)) for n in range(40)])
    # On a file, a third of the room is kept for the log.
    bound = 13_000_000
    removed = 0
    while step := await store.trim(room(1000, bound), 3):
        assert step <= 3
        removed += step
    while await store.give_back(1_000_000):
        pass
    # A log that has grown is cut back by the next write, not at once.
    await store.write([Used(key(39), 1, NOW)])
    assert (await store.totals()).bytes <= bound
    assert 14 <= removed <= 26
    assert await kept(store, range(40)) == set(range(removed, 40))


async def test_trim_below_what_an_empty_store_takes_ends(store: Store) -> None:
    await store.write([Put(entry(n)) for n in range(5)])
    assert sum([await store.trim(room(1000, 0), 100) for _ in range(10)]) == 5
    assert await store.trim(room(1000, 0), 100) == 0


async def test_an_empty_store_has_nothing_to_remove(store: Store) -> None:
    assert await store.expire(NOW, 10) == 0
    assert await store.trim(room(0, 0), 10) == 0


# Facts


async def test_facts_are_kept_for_each_upstream_and_name(store: Store) -> None:
    await store.note("a", "fingerprint", "1", NOW)
    await store.note("a", "checks keys", "ja 🦙", NOW)
    await store.note("b", "fingerprint", "", NOW)
    pairs = [("a", "fingerprint"), ("a", "checks keys"), ("b", "fingerprint"), ("b", "checks keys")]
    assert [await store.fact(*pair) for pair in pairs] == ["1", "ja 🦙", "", None]


async def test_a_later_fact_replaces_the_earlier(store: Store) -> None:
    await store.note("a", "fingerprint", "1", NOW)
    await store.note("a", "fingerprint", "2", NOW + 1)
    assert await store.fact("a", "fingerprint") == "2"


# Inspection


async def test_totals_count_entries_and_grow_with_their_bytes(store: Store) -> None:
    empty = await store.totals()
    await store.write([Put(entry(n, answer=b"x" * 100_000)) for n in range(10)])
    full = await store.totals()
    assert (empty.entries, full.entries) == (0, 10)
    # What was just written is in the log, too.
    assert 1_000_000 <= full.bytes - empty.bytes <= 2_800_000


async def test_totals_shrink_when_entries_go(store: Store) -> None:
    await store.write([Put(entry(n, answer=b"x" * 2_000_000)) for n in range(10)])
    full = await store.totals()
    await store.write([Delete(key(n)) for n in range(9)])
    while await store.give_back(1_000_000):
        pass
    await store.write([Used(key(9), 1, NOW)])
    left = await store.totals()
    assert left.entries == 1
    assert full.bytes - left.bytes >= 12_000_000


async def test_a_store_in_use_is_not_lost(store: Store) -> None:
    await store.write([Put(entry())])
    assert not await store.lost()


# Many at once


async def test_concurrent_readers_never_see_half_an_entry(store: Store) -> None:
    def whole(number: int, version: int) -> Entry:
        return entry(number, model=str(version), answer=str(version).encode() * 5000)

    async def write(number: int) -> None:
        for version in range(10):
            await store.write([Delete(key(number)), Put(whole(number, version)), Put(whole(number + 100, version))])

    async def read(number: int) -> None:
        for _ in range(30):
            found = await store.get(key(number), NOW)
            assert found is None or found == whole(number, int(found.model))

    await store.write([Put(whole(n, 0)) for n in (0, 1, 2, 3, 100, 101, 102, 103)])
    await asyncio.gather(*(write(n) for n in range(4)), *(read(n) for n in (*range(4), *range(100, 104)) for _ in "ab"))


async def test_a_replaced_entry_is_never_missing_for_a_reader(store: Store) -> None:
    await store.write([Put(entry())])
    writing = asyncio.gather(*(store.write([Delete(key(1)), Put(entry())]) for _ in range(30)))
    while not writing.done():
        assert await store.get(key(1), NOW) == entry()
    await writing


async def test_all_methods_may_run_at_once(store: Store) -> None:
    async def one(n: int) -> None:
        await store.write([Put(entry(n, answer=b"x" * 3000, expires_ms=NOW + n))])
        await store.write([Used(key(n), 1, NOW + 1)])
        await store.get(key(n), NOW)
        await store.note("a", str(n), str(n), NOW)
        assert await store.fact("a", str(n)) == str(n)
        await store.expire(NOW + 10, 2)
        await store.trim(room(20, 2**60), 2)
        await store.totals()

    await asyncio.gather(*(one(n) for n in range(40)))
    assert await kept(store, range(40)) <= set(range(11, 40))
    assert (await store.totals()).entries == 20


async def test_a_long_write_of_ours_does_not_make_a_reader_fail(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.sqlite._BUSY_READER_S", 0.0)
    async with open_store() as store:
        writing = asyncio.gather(
            *(store.write([Put(entry(n, answer=b"x" * 4000)) for n in range(b, b + 50)]) for b in range(0, 500, 50))
        )
        while not writing.done():
            assert await store.get(key(1000), NOW) is None
            assert (await store.totals()).entries % 50 == 0
        await writing
        assert await store.problems() == []


# Leaving early


async def cancel_after(steps: int, work: Awaitable[Any]) -> None:
    """Run for so many turns of the loop, then cancel twice."""
    task = asyncio.ensure_future(work)
    for _ in range(steps):
        await asyncio.sleep(0)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with suppress(asyncio.CancelledError):
        await task


async def test_a_cancelled_write_leaves_no_open_transaction(store: Store) -> None:
    for steps in range(60):
        await cancel_after(steps, store.write([Put(entry(1, model=str(steps))), Put(entry(2, model=str(steps)))]))
        await store.write([Put(entry(3, model=str(steps)))])
        one, two = await store.get(key(1), NOW), await store.get(key(2), NOW)
        assert (one and one.model) == (two and two.model)
        assert await store.get(key(3), NOW) == entry(3, model=str(steps))
    assert await store.problems() == []


async def test_a_cancelled_write_does_not_harm_the_one_that_waits(store: Store) -> None:
    for steps in range(30):
        waiting = asyncio.ensure_future(asyncio.sleep(0, store.write))
        cancelled = asyncio.ensure_future(cancel_after(steps, store.write([Put(entry(1))])))
        write = await waiting
        await asyncio.gather(cancelled, write([Put(entry(2, model=str(steps)))]))
        assert await store.get(key(2), NOW) == entry(2, model=str(steps))


@pytest.mark.parametrize(
    "work",
    [
        lambda s: s.expire(NOW, 10),
        lambda s: s.trim(room(0, 0), 10),
        lambda s: s.note("a", "b", "c", NOW),
        lambda s: s.get(key(1), NOW),
        lambda s: s.candidates(b"s" * 32, [1], NOW, per_key=9, limit=9),
        lambda s: s.veto([b"pair"], NOW),
        lambda s: s.totals(),
        lambda s: s.problems(),
    ],
    ids=["expire", "trim", "note", "get", "candidates", "veto", "totals", "problems"],
)
async def test_any_method_may_be_cancelled(store: Store, work: Callable[[Store], Awaitable[Any]]) -> None:
    for steps in range(25):
        await store.write([Put(entry(n)) for n in range(5)])
        await cancel_after(steps, work(store))
    await store.write([Put(entry(7))])
    assert await store.get(key(7), NOW) == entry(7)


async def test_opening_may_be_cancelled(open_store: OpenStore) -> None:
    async def use() -> None:
        async with open_store() as store:
            await store.write([Put(entry())])

    for steps in range(0, 120, 4):
        await cancel_after(steps, use())
    async with open_store() as store:
        assert await store.problems() == []


# Closed


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.get(key(1), NOW),
        lambda s: s.write([Put(entry())]),
        lambda s: s.expire(NOW, 1),
        lambda s: s.trim(room(0, 0), 1),
        lambda s: s.fact("a", "b"),
        lambda s: s.note("a", "b", "c", NOW),
        lambda s: s.candidates(b"s" * 32, [1], NOW, per_key=9, limit=9),
        lambda s: s.unsketched(1, 9),
        lambda s: s.record_scheme(1, "a", NOW),
        lambda s: s.schemes(),
        lambda s: s.vetoed([b"pair"]),
        lambda s: s.veto([b"pair"], NOW),
        lambda s: s.find(b"prefix", 9),
        lambda s: s.totals(),
        lambda s: s.problems(),
    ],
    ids=[
        *("get", "write", "expire", "trim", "fact", "note", "candidates", "unsketched", "record_scheme", "schemes"),
        *("vetoed", "veto", "find", "totals", "problems"),
    ],
)
async def test_a_closed_store_is_unavailable(open_store: OpenStore, use: Callable[[Store], Awaitable[Any]]) -> None:
    async with open_store() as store:
        await store.write([Put(entry())])
    with pytest.raises(StorageUnavailable):
        await use(store)


async def test_a_store_that_closes_under_its_users_raises_only_storage_errors(open_store: OpenStore) -> None:
    async def use(store: Store, n: int) -> None:
        while True:
            await store.write([Put(entry(n))])
            await store.get(key(n), NOW)

    async with open_store() as store:
        users = [asyncio.create_task(use(store, n)) for n in range(6)]
        await asyncio.wait(users, timeout=0.05)
    ends = await asyncio.gather(*users, return_exceptions=True)
    assert [type(end) for end in ends] == [StorageUnavailable] * 6
    async with open_store() as store:
        assert await store.problems() == []
