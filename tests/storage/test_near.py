"""The contract of `storage.base.Sketches`, `Vetoes` and `Finding`. It knows no engine: each one passes all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from storage.base import Candidate, Change, Delete, Entry, Put, Sketch, Sketched, StorageUnavailable, Unsketched, Used
from storage.store import Store
from tests.storage.engines import NOW, entry, key, near, room, sketch

SPACE = b"s" * 32


async def found(store: Store, *keys: int, **bounds: Any) -> list[tuple[int, int]]:
    """The numbers of the candidates for these band keys, and how many each shares."""
    asked = {"space": SPACE, "now_ms": NOW, "per_key": 1000, "limit": 1000, **bounds}
    candidates = await store.candidates(keys=keys, **asked)
    return [(int.from_bytes(candidate.key, "big"), candidate.shared) for candidate in candidates]


# Candidates


async def test_an_entry_is_found_by_any_of_its_keys(store: Store) -> None:
    await store.write([Put(near(1, words="Wörter 🦙"), sketch(5, -6, 7, skeleton="worter"))])
    for keys, shared in [([5], 1), ([-6, 99], 1), ([7, -6, 5], 3)]:
        candidates = await store.candidates(SPACE, keys, NOW, per_key=10, limit=10)
        assert candidates == [Candidate(key(1), "Wörter 🦙", "worter", shared)]
    assert await found(store, 6, -5) == []
    assert await found(store) == []


async def test_keys_may_be_any_64_bits(store: Store) -> None:
    extremes = (-(2**63), 2**63 - 1, 0, -1, 2**53 + 1)
    await store.write([Put(near(1), sketch(*extremes, scheme=-(2**63)))])
    assert await found(store, *extremes) == [(1, 5)]
    assert await found(store, 2**53) == []
    assert await store.unsketched(-(2**63), 10) == []


async def test_a_key_that_is_told_twice_counts_once(store: Store) -> None:
    await store.write([Put(near(1), sketch(5, 5, 6))])
    assert await found(store, 5, 5) == [(1, 1)]


async def test_those_that_share_most_come_first_then_the_latest(store: Store) -> None:
    await store.write([Put(near(1), sketch(1, 2)), Put(near(2), sketch(1)), Put(near(3), sketch(1, 2))])
    await store.write([Put(near(4), sketch(1, 2, 3)), Put(near(5), sketch(2))])
    assert await found(store, 1, 2, 3) == [(4, 3), (3, 2), (1, 2), (5, 1), (2, 1)]
    assert await found(store, 1, 2, 3, limit=2) == [(4, 3), (3, 2)]
    assert await found(store, 1, 2, 3, limit=0) == []


async def test_a_replaced_entry_is_the_latest(store: Store) -> None:
    await store.write([Put(near(1), sketch(1)), Put(near(2), sketch(1)), Put(near(1), sketch(1))])
    assert await found(store, 1) == [(1, 1), (2, 1)]
    await store.write([Put(near(2), sketch(1))])
    assert await found(store, 1) == [(2, 1), (1, 1)]


async def test_only_the_latest_of_a_key_are_looked_at(store: Store) -> None:
    await store.write([Put(near(n), sketch(1, 100 + n)) for n in range(20)])
    assert await found(store, 1, per_key=3) == [(19, 1), (18, 1), (17, 1)]
    assert await found(store, 1, 104, 118, per_key=2) == [(18, 2), (19, 1), (4, 1)]
    assert await found(store, 1, per_key=1) == [(19, 1)]


@pytest.mark.parametrize(
    "other",
    [
        near(1, space=b"t" * 32),
        near(1, expires_ms=NOW),
        near(1, near=False),
        near(1, words=None),
        entry(1),
    ],
    ids=["space", "stale", "exact", "wordless", "neither"],
)
async def test_what_may_not_be_served_is_no_candidate(store: Store, other: Entry) -> None:
    await store.write([Put(other, sketch(1, 2)), Put(near(2), sketch(1))])
    assert await found(store, 1, 2) == [(2, 1)]
    await store.write([Sketched(key(1), sketch(1, 2))])
    assert await found(store, 1, 2) == [(2, 1)]


async def test_an_entry_is_a_candidate_until_it_expires(store: Store) -> None:
    await store.write([Put(near(1, expires_ms=NOW + 10), sketch(1))])
    assert await found(store, 1, now_ms=NOW + 9) == [(1, 1)]
    assert await found(store, 1, now_ms=NOW + 10) == []


async def test_very_many_keys_may_be_asked_for_and_stored(store: Store) -> None:
    await store.write([Put(near(1), sketch(*range(5000)))])
    assert await found(store, *range(4000, 7000)) == [(1, 1000)]


async def test_a_batch_of_any_size_is_sketched(store: Store) -> None:
    await store.write([Put(near(n), sketch(n % 2)) for n in range(1200)])
    assert len(await found(store, 0, per_key=2000, limit=2000)) == 600
    await store.write([Delete(key(n)) for n in range(0, 1200, 2)])
    assert await found(store, 0) == []
    assert len(await found(store, 1, per_key=2000, limit=2000)) == 600


# What removes an entry removes its keys, so that whoever gets its place is not found by them.


@pytest.mark.parametrize(
    "how",
    [
        lambda store: store.write([Delete(key(1))]),
        lambda store: store.write([Put(near(1))]),
        lambda store: store.write([Put(entry(1))]),
        lambda store: store.write([Put(near(1), sketch(9))]),
        lambda store: store.write([Sketched(key(1), sketch(9))]),
        lambda store: store.write([Sketched(key(1), sketch())]),
        lambda store: store.expire(NOW + 3_600_000, 10),
        lambda store: store.trim(room(0, 2**60), 10),
    ],
    ids=["delete", "replace", "exact", "replace sketched", "sketched", "no keys", "expire", "trim"],
)
async def test_keys_go_with_their_sketch(store: Store, how: Any) -> None:
    await store.write([Put(near(1), sketch(1, 2))])
    await how(store)
    assert await store.problems() == []
    await store.write([Put(near(2), sketch(2)), Put(near(3), sketch(3))])
    assert await found(store, 1, 2) == [(2, 1)]


# Sketched

OLD, NEW = sketch(1, scheme=1, skeleton="old"), sketch(2, scheme=2, skeleton="new")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([Put(near(1), OLD)], OLD),
        ([Put(near(1), OLD), Sketched(key(1), NEW)], NEW),
        ([Put(near(1)), Sketched(key(1), NEW)], NEW),
        ([Sketched(key(1), NEW), Sketched(key(1), OLD)], OLD),
        ([Sketched(key(1), NEW), Put(near(1), OLD)], OLD),
        ([Sketched(key(1), NEW), Put(near(1))], None),
        ([Sketched(key(1), NEW), Used(key(1), 1, NOW)], NEW),
        ([Put(near(1), OLD), Delete(key(1)), Sketched(key(1), NEW)], None),
        ([Sketched(key(1), NEW), Delete(key(1)), Put(near(1), OLD)], OLD),
        ([Delete(key(1)), Put(entry(1)), Sketched(key(1), NEW)], None),
    ],
)
@pytest.mark.parametrize("batches", ["one", "many"])
async def test_the_last_sketch_of_a_key_wins(
    store: Store, changes: list[Change], expected: Sketch | None, batches: str
) -> None:
    await store.write([Put(near(1), sketch(1, 2, 3, scheme=3))])
    for batch in [changes] if batches == "one" else [[change] for change in changes]:
        await store.write(batch)
    candidates = await store.candidates(SPACE, [1, 2, 3], NOW, per_key=10, limit=10)
    assert [c.skeleton for c in candidates] == ([] if expected is None else [expected.skeleton])
    assert await found(store, 3) == []


async def test_a_new_sketch_changes_nothing_else(store: Store) -> None:
    await store.write([Put(near(1), OLD), Put(near(2), OLD), Used(key(1), 3, NOW + 5)])
    await store.write([Sketched(key(1), sketch(1, scheme=2))])
    assert await store.get(key(1), NOW) == near(1)
    assert await found(store, 1) == [(2, 1), (1, 1)]
    assert await store.trim(room(1, 2**60), 10) == 1
    assert await store.get(key(1), NOW) == near(1)


async def test_a_sketch_of_what_is_gone_brings_nothing_back(store: Store) -> None:
    await store.write([Put(near(1), OLD)])
    await store.write([Delete(key(1))])
    await store.write([Sketched(key(1), NEW)])
    assert (await store.totals()).entries == 0
    assert await found(store, 1, 2) == []


@pytest.mark.parametrize(
    "unfit",
    [sketch(2**63), sketch(-(2**63) - 1), sketch(1, scheme=2**63), sketch(1, skeleton="\ud800")],
    ids=["large key", "small key", "scheme", "surrogate"],
)
async def test_a_batch_with_an_unfit_sketch_leaves_nothing(store: Store, unfit: Sketch) -> None:
    await store.write([Put(near(1), OLD)])
    with pytest.raises(StorageUnavailable):
        await store.write([Put(near(1), NEW), Put(near(2), NEW), Put(near(3), unfit)])
    with pytest.raises(StorageUnavailable):
        await store.write([Put(near(2), NEW), Sketched(key(1), unfit)])
    assert await found(store, 1, 2) == [(1, 1)]
    assert await store.problems() == []


# What is still to be sketched


async def unsketched(store: Store, scheme: int, limit: int = 100) -> set[int]:
    return {int.from_bytes(waiting.key, "big") for waiting in await store.unsketched(scheme, limit)}


async def test_an_entry_without_a_sketch_waits_for_one(store: Store) -> None:
    await store.write(
        [Put(near(1, words="one", space=b"t" * 32)), Put(entry(2, words="two")), Put(near(3, words=None))]
    )
    assert await store.unsketched(1, 10) == [Unsketched(key(1), b"t" * 32, "one")]
    await store.write([Sketched(key(1), sketch())])
    assert await store.unsketched(1, 10) == []


async def test_a_sketch_of_another_scheme_is_made_anew(store: Store) -> None:
    schemes = {1: -(2**63), 2: -1, 3: 0, 4: 5, 5: 2**63 - 1}
    await store.write([Put(near(n), sketch(n, scheme=scheme)) for n, scheme in schemes.items()] + [Put(near(6))])
    for n, scheme in schemes.items():
        assert await unsketched(store, scheme) == {1, 2, 3, 4, 5, 6} - {n}
    assert len(await unsketched(store, 7, limit=4)) == 4


async def test_sketching_in_steps_ends(store: Store) -> None:
    await store.write([Put(near(n), sketch(1) if n % 2 else None) for n in range(25)])
    steps = 0
    while waiting := await store.unsketched(2, 10):
        await store.write([Sketched(one.key, sketch(2, scheme=2)) for one in waiting])
        steps += 1
    assert steps == 3
    assert (len(await found(store, 1)), len(await found(store, 2))) == (0, 25)


# Schemes


async def test_schemes_are_noted_for_people(store: Store) -> None:
    assert await store.schemes() == {}
    for number, description in [(2**63 - 1, "first"), (-4, "zweites 🦙"), (-4, "zweites 🦙"), (2**63 - 1, "better")]:
        await store.record_scheme(number, description, NOW)
    assert await store.schemes() == {2**63 - 1: "better", -4: "zweites 🦙"}


# Vetoes


async def test_a_vetoed_pair_stays_so(store: Store) -> None:
    assert not await store.vetoed([b"a", b"b"])
    await store.veto([b"a", b"c" * 32], NOW)
    await store.veto([b"a"], NOW + 1)
    asked: Sequence[Sequence[bytes]] = [[b"a"], [b"b", b"a"], [b"b"], [], [b"c" * 31], [b"c" * 32]]
    assert [await store.vetoed(pairs) for pairs in asked] == [True, True, False, False, False, True]
    await store.veto([], NOW)


async def test_a_veto_among_very_many_pairs_is_seen(store: Store) -> None:
    pairs = [b"%d" % n for n in range(1500)]
    assert not await store.vetoed(pairs)
    await store.veto(pairs[1400:1401], NOW)
    assert await store.vetoed(pairs)
    await store.veto(pairs, NOW)
    assert await store.vetoed(pairs[:1])


async def test_vetoes_outlive_the_entries(store: Store) -> None:
    await store.write([Put(near(1), sketch(1))])
    await store.veto([b"a"], NOW)
    await store.trim(room(0, 2**60), 10)
    assert await store.vetoed([b"a"])


# Finding by the beginning of a key


def named(name: bytes, **fields: Any) -> Entry:
    return entry(1, key=name.ljust(32, b"\x00"), **fields)


async def test_entries_are_found_by_the_beginning_of_their_key(store: Store) -> None:
    stale, other = named(b"abcd2", expires_ms=NOW), named(b"abcd9", near=True, words="w")
    await store.write([Put(e) for e in (other, named(b"abce"), named(b"abcc\xff\xff"), stale)])
    assert await store.find(b"abcd", 10) == [stale, other]
    assert await store.find(b"abcd", 1) == [stale]
    assert await store.find(b"abcd9", 10) == [other]
    assert await store.find(other.key, 10) == [other]
    assert await store.find(other.key + b"\x00", 10) == []
    assert await store.find(b"abcf", 10) == []


async def test_the_highest_keys_are_found(store: Store) -> None:
    last = entry(1, key=b"\xff" * 32)
    await store.write([Put(last), Put(entry(2, key=b"\xff" * 3 + b"\xfe" * 29))])
    assert await store.find(b"\xff" * 4, 10) == [last]


@pytest.mark.parametrize("prefix", [b"", b"abc"])
async def test_a_prefix_that_is_too_short_is_refused(store: Store, prefix: bytes) -> None:
    with pytest.raises(ValueError, match="4 bytes"):
        await store.find(prefix, 10)


# Many at once


async def test_a_reader_sees_each_sketch_whole(store: Store) -> None:
    async def write(number: int) -> None:
        for version in range(10):
            made = sketch(*range(100 * version, 100 * version + 18), skeleton=str(version))
            change = Sketched(key(number), made) if version % 2 else Put(near(number), made)
            await store.write([change])

    async def read() -> None:
        for _ in range(40):
            for candidate in await store.candidates(SPACE, range(1000), NOW, per_key=10, limit=10):
                assert candidate.shared == 18

    await asyncio.gather(*(write(n) for n in range(3)), read(), read())
    assert sorted(await found(store, 900)) == [(0, 1), (1, 1), (2, 1)]
