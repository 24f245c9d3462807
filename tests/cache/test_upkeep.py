"""Upkeep on a real store: what it removes when, who does it, and what it does when the clock or the store fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.cache.upkeep import Clocks, Upkeep
from storage.base import Put, Room, StorageBusy, StorageError
from storage.sqlite import open_sqlite
from storage.store import Store
from tests.conftest import eventually
from tests.storage.engines import NOW, entry, key, room

SETTLE_MS = 600_000
HOUR = 3_600_000
DAY = 24 * HOUR


@dataclass
class Machine:
    """A clock that can be set, and a counter that cannot."""

    now: int = NOW
    counted: int = 1000

    def pass_by(self, ms: int) -> None:
        self.now += ms
        self.counted += ms

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.now, lambda: self.counted)


class Sweeping:
    """An upkeep that sweeps when told to."""

    def __init__(self, store: Store, machine: Machine, bounds: Room, clocks: Clocks | None = None) -> None:
        self.removed: Counter[str] = Counter()
        self.failures: list[tuple[str, type[StorageError]]] = []
        self._machine = machine
        self.upkeep = Upkeep(
            store,
            bounds,
            clocks=clocks or machine.clocks(),
            evicted=self._evicted,
            failed=lambda operation, error: self.failures.append((operation, type(error))),
            every_s=0.001,
            settle_s=SETTLE_MS / 1000,
        )

    async def sweep(self) -> dict[str, int]:
        before = Counter(self.removed)
        await self.upkeep.sweep()
        return dict(self.removed - before)

    async def settle(self) -> None:
        await self.upkeep.sweep()
        self._machine.pass_by(SETTLE_MS)

    def _evicted(self, reason: str, count: int) -> None:
        self.removed[reason] += count


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nearhit.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(path) as opened:
        yield opened
        assert await opened.problems() == []


@pytest.fixture
def machine() -> Machine:
    return Machine()


async def fresh(store: Store, numbers: Sequence[int], now_ms: int) -> list[int]:
    return [number for number in numbers if await store.get(key(number), now_ms) is not None]


async def test_what_has_expired_goes_once_the_clock_is_steady(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(n, expires_ms=NOW + n)) for n in range(500)])
    sweeping = Sweeping(store, machine, room())
    machine.pass_by(450)
    assert await sweeping.sweep() == {}
    assert (await store.totals()).entries == 500
    machine.pass_by(SETTLE_MS)
    assert await sweeping.sweep() == {"expired": 500}
    assert (await store.totals()).entries == 0


async def test_the_grace_is_kept(store: Store, machine: Machine) -> None:
    ends = NOW + SETTLE_MS
    await store.write([Put(entry(1, expires_ms=ends, grace_ms=1000)), Put(entry(2, expires_ms=ends))])
    sweeping = Sweeping(store, machine, room())
    await sweeping.settle()
    assert await sweeping.sweep() == {"expired": 1}
    assert set(await store.stored([key(1), key(2)])) == {key(1)}
    machine.pass_by(1000)
    assert await sweeping.sweep() == {"expired": 1}


async def test_a_clock_that_jumped_forward_removes_nothing_until_it_settled(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(n)) for n in range(5)])
    sweeping = Sweeping(store, machine, room())
    await sweeping.settle()
    assert await sweeping.sweep() == {}
    machine.now += 400 * DAY
    for _ in range(5):
        assert await sweeping.sweep() == {}
        machine.pass_by(SETTLE_MS // 6)
        assert await fresh(store, range(5), machine.now) == []
    # Somebody sets it right: nothing was lost.
    machine.now -= 400 * DAY
    assert await sweeping.sweep() == {}
    assert await fresh(store, range(5), machine.now) == [0, 1, 2, 3, 4]
    machine.pass_by(SETTLE_MS)
    assert await sweeping.sweep() == {}
    assert await fresh(store, range(5), machine.now) == [0, 1, 2, 3, 4]


async def test_a_clock_that_stays_where_it_jumped_to_is_believed(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(n)) for n in range(5)])
    sweeping = Sweeping(store, machine, room())
    await sweeping.settle()
    machine.now += 400 * DAY
    await sweeping.settle()
    assert await sweeping.sweep() == {"expired": 5}


async def test_a_clock_that_jumps_in_the_middle_of_a_sweep_removes_nothing_more(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(n, expires_ms=NOW + (0 if n < 300 else 10 * HOUR))) for n in range(600)])
    looked = 0

    def now_ms() -> int:
        nonlocal looked
        looked += 1
        # It jumps while the sweep is under way: after that look which found it steady.
        return machine.now + (400 * DAY if looked > 2 else 0)

    sweeping = Sweeping(store, machine, room(), Clocks(now_ms, lambda: machine.counted))
    await sweeping.settle()
    assert await sweeping.sweep() == {"expired": 300}
    assert (await store.totals()).entries == 300


async def test_a_clock_that_jumped_back_removes_nothing_and_loses_nothing(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(1, expires_ms=NOW + SETTLE_MS + 1000))])
    sweeping = Sweeping(store, machine, room())
    await sweeping.settle()
    machine.now -= 400 * DAY
    assert await sweeping.sweep() == {}
    assert await fresh(store, [1], machine.now) == [1]


async def test_a_machine_that_slept_sweeps_at_once(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(n)) for n in range(5)])
    sweeping = Sweeping(store, machine, room())
    await sweeping.settle()
    machine.pass_by(30 * DAY)
    assert await sweeping.sweep() == {"expired": 5}


async def test_bounds_hold_whatever_the_clock_does(store: Store, machine: Machine) -> None:
    await store.write([Put(entry(n)) for n in range(500)])
    assert await Sweeping(store, machine, room(40)).sweep() == {"bound": 460}
    assert (await store.totals()).entries == 40


async def test_space_is_given_back(store: Store, machine: Machine, path: Path) -> None:
    await store.write([Put(entry(n, answer=b"x" * 50_000)) for n in range(400)])
    large = (await asyncio.to_thread(path.stat)).st_size
    machine.pass_by(10 * HOUR)
    sweeping = Sweeping(store, machine, room())
    await sweeping.settle()
    assert await sweeping.sweep() == {"expired": 400}
    assert large > 20_000_000
    assert (await asyncio.to_thread(path.stat)).st_size < 500_000


async def test_who_does_not_lead_removes_nothing(store: Store, machine: Machine, path: Path) -> None:
    await store.write([Put(entry(n)) for n in range(50)])
    machine.pass_by(10 * HOUR)
    second = Sweeping(store, machine, room(10))
    async with open_sqlite(path) as leader:
        assert await leader.leads()
        await second.settle()
        assert await second.sweep() == {}
        assert (await store.totals()).entries == 50
    # Its clock has been watched all the time: it begins at once.
    assert await second.sweep() == {"expired": 50}


async def test_of_two_only_one_sweeps(store: Store, machine: Machine, path: Path) -> None:
    await store.write([Put(entry(n)) for n in range(500)])
    async with open_sqlite(path) as other:
        sweepings = [Sweeping(store, machine, room(100)), Sweeping(other, machine, room(100))]
        removed = await asyncio.gather(*(sweeping.sweep() for sweeping in sweepings))
    assert sorted(removed, key=len) == [{}, {"bound": 400}]


class Failing:
    """A real store of which one operation fails on demand."""

    def __init__(self, store: Store, operation: str, error: StorageError) -> None:
        self.error: StorageError | None = error
        self._operation = operation
        self.store = store

    async def leads(self) -> bool:
        self._fail("leads")
        return await self.store.leads()

    async def expire(self, now_ms: int, limit: int) -> int:
        self._fail("expire")
        return await self.store.expire(now_ms, limit)

    async def trim(self, bounds: Room, limit: int) -> int:
        self._fail("trim")
        return await self.store.trim(bounds, limit)

    async def give_back(self, limit: int) -> int:
        self._fail("give_back")
        return await self.store.give_back(limit)

    def _fail(self, operation: str) -> None:
        if operation == self._operation and self.error is not None:
            raise self.error


@pytest.mark.parametrize("operation", ["leads", "expire", "trim", "give_back"])
async def test_an_error_is_told_and_the_next_sweep_goes_on(store: Store, machine: Machine, operation: str) -> None:
    await store.write([Put(entry(n)) for n in range(20)])
    machine.pass_by(10 * HOUR)
    failing = Failing(store, operation, StorageBusy("locked"))
    failures: list[tuple[str, type[StorageError]]] = []
    upkeep = Upkeep(
        failing,
        room(),
        clocks=machine.clocks(),
        evicted=lambda reason, count: None,
        failed=lambda what, error: failures.append((what, type(error))),
        every_s=0.001,
        settle_s=0.0,
    )
    await upkeep.sweep()
    assert failures == [("upkeep", StorageBusy)]
    failing.error = None
    await upkeep.sweep()
    assert failures == [("upkeep", StorageBusy)]
    assert (await store.totals()).entries == 0


async def test_it_goes_on_by_itself(store: Store, machine: Machine) -> None:
    sweeping = Sweeping(store, machine, room(10))
    task = asyncio.create_task(sweeping.upkeep.run())
    for start in (0, 100):
        before = sweeping.removed["bound"]
        await store.write([Put(entry(n)) for n in range(start, start + 100)])
        await eventually(lambda before=before: sweeping.removed["bound"] >= before + 90)  # type: ignore[misc]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await store.totals()).entries == 10
