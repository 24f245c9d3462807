"""What an entry is worth, seen by what goes first when there is no room."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Change, Delete, Put, Used
from storage.store import Store
from storage.worth import gain
from tests.storage.engines import NOW, entry, key, room

COST = st.integers(0, 10**9)
SIZE = st.integers(0, 2**30)


@given(COST, SIZE, st.integers(1, 10**6))
def test_more_uses_a_higher_cost_or_a_smaller_size_gain_more(cost_ms: int, size: int, uses: int) -> None:
    plain = gain(cost_ms, size, uses)
    assert gain(cost_ms, size, uses + 1) > plain
    assert gain(2 * max(cost_ms, 1), size, uses) > plain
    assert gain(cost_ms, size + 10_000, uses) < plain


@pytest.mark.parametrize("cost_ms", [-(2**63), -1, 0, 1, 2**63 - 1])
@pytest.mark.parametrize("size", [0, 1, 2**40])
@pytest.mark.parametrize("uses", [1, 2**62])
def test_it_is_a_positive_number_for_whatever_a_store_may_hold(cost_ms: int, size: int, uses: int) -> None:
    assert 0 < gain(cost_ms, size, uses) < math.inf


async def emptied(store: Store, numbers: range) -> list[int]:
    """In which order they go."""
    went: list[int] = []
    for left in reversed(range(len(numbers))):
        assert await store.trim(room(left, 2**60), 100) == 1
        there = await store.stored([key(number) for number in numbers])
        went += [number for number in numbers if key(number) not in there and number not in went]
    return went


async def test_what_was_asked_for_more_often_goes_later(store: Store) -> None:
    await store.write([Put(entry(n)) for n in range(5)])
    await store.write([Used(key(n), 1 + (7 * n) % 5, NOW) for n in range(5)])
    assert await emptied(store, range(5)) == [0, 3, 1, 4, 2]


async def test_what_took_longer_goes_later(store: Store) -> None:
    await store.write([Put(entry(n, cost_ms=1000 + (7 * n) % 5)) for n in range(5)])
    assert await emptied(store, range(5)) == [0, 3, 1, 4, 2]


async def test_what_is_larger_goes_sooner(store: Store) -> None:
    await store.write([Put(entry(n, answer=b"x" * (5000 - 500 * ((7 * n) % 5)))) for n in range(5)])
    assert await emptied(store, range(5)) == [0, 3, 1, 4, 2]


async def test_of_equals_the_first_to_come_is_the_first_to_go(store: Store) -> None:
    await store.write([Put(entry(n)) for n in (3, 0, 4, 1, 2)])
    assert await emptied(store, range(5)) == [3, 0, 4, 1, 2]


async def test_hits_of_long_ago_count_less_and_less(store: Store) -> None:
    await store.write([Put(entry(0)), Used(key(0), 20, NOW)], room(10, top_k=1))
    await store.write([Put(entry(n)) for n in range(1, 10)], room(10, top_k=0))
    for number in range(10, 400):
        await store.write([Put(entry(number)), Used(key(number), 1, NOW)], room(10, top_k=0))
        if not await store.stored([key(0)]):
            break
    else:
        pytest.fail("an entry that nobody asks for any more stays for ever")
    # It stayed far longer than those that were never asked for so often.
    assert number > 60


async def test_an_entry_that_is_used_again_and_again_stays(store: Store) -> None:
    await store.write([Put(entry(0)), Used(key(0), 5, NOW)], room(10, top_k=0))
    for number in range(1, 200):
        await store.write([Put(entry(number)), Used(key(0), 1, NOW)], room(10, top_k=0))
    assert await store.stored([key(0)])
    assert (await store.totals()).entries == 10


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hits=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=15),
    cut=st.integers(1, 15),
)
async def test_how_hits_are_told_does_not_matter(store: Store, hits: list[tuple[int, int]], cut: int) -> None:
    told: list[Change] = [Used(key(number), count, NOW) for number, count in hits]
    went = []
    for batches in ([told], [[one] for one in told], [told[::-1][:cut], told[::-1][cut:]]):
        await store.write([Delete(key(n)) for n in range(6)])
        await store.write([Put(entry(n)) for n in range(6)])
        for batch in batches:
            await store.write(batch)
        went.append(await emptied(store, range(6)))
    assert went[0] == went[1] == went[2]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(costs=st.lists(st.sampled_from([-(2**63), 0, 1, 2**31, 2**63 - 1]), min_size=3, max_size=6))
async def test_extreme_costs_and_counts_are_kept(store: Store, costs: list[int]) -> None:
    numbers = range(len(costs))
    await store.write([Delete(key(n)) for n in range(6)])
    await store.write([Put(entry(n, cost_ms=cost, answer=b"")) for n, cost in enumerate(costs)])
    await store.write([Used(key(n), 2**40, 4_102_444_800_000) for n in numbers])
    went = await emptied(store, numbers)
    assert [max(costs[n], 1) for n in went] == sorted(max(cost, 1) for cost in costs)
