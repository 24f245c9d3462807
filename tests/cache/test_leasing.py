"""A fetch that another process may do in our place: every order in which the two can come, and every way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proxy.cache.flight import Flight, Flown
from proxy.cache.leasing import Claim, Finished, LeasedFetch, LeaseTerms
from proxy.cache.policy import Drop
from proxy.cache.recorder import Unrecorded
from proxy.web.clock import counted_ms
from storage import lease_file, sqlite_leases
from storage.base import StorageError, StorageUnavailable
from storage.leases import Apart, Held, Taken
from storage.sqlite_leases import SqliteLeases, open_leases
from tests.conftest import eventually

KEY = b"k" * 32
A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


@dataclass
class Shared:
    """What two processes share: a server, and a file in which answers are found."""

    stored: bytes | None = None
    requests: int = 0
    gone: int = 0
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    flushes: bool = True

    @asynccontextmanager
    async def fetch(self) -> AsyncIterator[Finished]:
        self.requests += 1
        number = self.requests
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.gone += 1
            raise
        yield Finished({}, b"answer %d" % number)

    async def finished(self) -> Finished | None:
        return None if self.stored is None else Finished({}, self.stored)


@dataclass
class Process:
    """One of them; `pending` is what it has not written yet."""

    shared: Shared
    leases: SqliteLeases
    timeout_s: float = 0
    pending: bytes | None = None

    def leased(self, finished: Callable[[], Awaitable[Finished | None]] | None = None) -> LeasedFetch:
        terms = LeaseTerms(self.leases, self.flush, self.timeout_s)
        return LeasedFetch(terms, KEY, self.shared.fetch, finished or self.shared.finished)

    async def flush(self) -> bool:
        if self.shared.flushes:
            self.shared.stored, self.pending = self.pending, None
        return self.shared.flushes

    async def answer(self, drop: Drop | None = None) -> tuple[bytes, bool]:
        """Get it, and keep it unless it is dropped; the answer, and whether it is another's."""
        leased = self.leased()
        async with leased() as incoming:
            body = b"".join([chunk async for chunk in incoming.chunks()])
        if not leased.collapsed:
            if drop is None and not await leased.may_store():
                drop = Drop.LEASE_LOST
            if drop is None:
                self.pending = body
            await leased.landed(drop)
        return body, leased.collapsed


@pytest.fixture
def shared() -> Shared:
    return Shared()


@pytest.fixture
async def processes(tmp_path: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Process]]:
    # How long a busy machine takes decides no test.
    monkeypatch.setattr(sqlite_leases, "PATIENCE_S", 60.0)
    monkeypatch.setattr(lease_file, "_BUSY_S", 60.0)
    failures: list[StorageError] = []
    await asyncio.to_thread((tmp_path / "nearhit.db").touch)

    def leases() -> AbstractAsyncContextManager[SqliteLeases]:
        return open_leases(tmp_path / "nearhit.db", counted_ms, lambda _, e: failures.append(e), always=True)

    async with leases() as one, leases() as other, leases() as third:
        yield [Process(shared, each) for each in (one, other, third)]
    assert failures == []


async def leading(process: Process, drop: Drop | None = None) -> asyncio.Task[tuple[bytes, bool]]:
    """One whose request is under way."""
    before = process.shared.requests
    task = asyncio.create_task(process.answer(drop))
    await eventually(lambda: process.shared.requests > before)
    return task


async def waiting(process: Process) -> asyncio.Task[tuple[bytes, bool]]:
    """One that has found the lease held."""
    task = asyncio.create_task(process.answer())
    await asyncio.sleep(0.1)
    assert not task.done()
    return task


async def test_those_who_wait_get_the_stored_answer(processes: list[Process], shared: Shared) -> None:
    tasks = [await leading(processes[0]), await waiting(processes[1]), await waiting(processes[2])]
    shared.may_answer.set()
    assert await asyncio.gather(*tasks) == [(b"answer 1", False), (b"answer 1", True), (b"answer 1", True)]
    assert shared.requests == 1


async def test_who_comes_when_it_was_stored_a_moment_ago_finds_it(processes: list[Process], shared: Shared) -> None:
    # It has looked in the store before, and has waited for nobody.
    shared.may_answer.set()
    await processes[0].answer()
    assert await processes[1].answer() == (b"answer 1", True)
    # And it holds up nobody.
    assert isinstance((await processes[2].leases.take([KEY]))[0], Taken)


async def test_of_those_who_wait_one_takes_over_from_who_leaves(processes: list[Process], shared: Shared) -> None:
    shared.may_answer.set()
    leased = processes[0].leased()
    async with leased():
        tasks = [await waiting(processes[1]), await waiting(processes[2])]
        shared.may_answer.clear()
        await leased.landed(Drop.CLIENT_GONE)
        await eventually(lambda: shared.requests == 2)
        shared.may_answer.set()
        answers = await asyncio.gather(*tasks)
    assert sorted(answers) == [(b"answer 2", False), (b"answer 2", True)]


@pytest.mark.parametrize("drop", [Drop.STATUS, Drop.UPSTREAM_GONE, Drop.NOT_UNDERSTOOD])
async def test_after_one_that_is_not_kept_all_ask_at_once(processes: list[Process], shared: Shared, drop: Drop) -> None:
    leader = await leading(processes[0], drop)
    tasks = [await waiting(processes[1]), await waiting(processes[2])]
    shared.may_answer.set()
    await leader
    shared.may_answer.clear()
    await eventually(lambda: shared.requests == 3)
    shared.may_answer.set()
    assert {collapsed for _, collapsed in await asyncio.gather(*tasks)} == {False}


async def test_after_one_that_could_not_be_written_all_ask_at_once(processes: list[Process], shared: Shared) -> None:
    shared.flushes = False
    leader = await leading(processes[0])
    tasks = [await waiting(processes[1]), await waiting(processes[2])]
    shared.may_answer.set()
    await leader
    await asyncio.gather(*tasks)
    assert shared.requests == 3


async def test_who_has_waited_long_enough_asks_itself(processes: list[Process], shared: Shared) -> None:
    processes[1].timeout_s = 0.1
    leader = await leading(processes[0])
    follower = await leading(processes[1])
    shared.may_answer.set()
    assert [await leader, await follower] == [(b"answer 1", False), (b"answer 2", False)]


async def test_who_has_waited_long_enough_looks_once_more(processes: list[Process], shared: Shared) -> None:
    processes[1].timeout_s = 0.3
    leader = await leading(processes[0])
    follower = await waiting(processes[1])
    shared.stored = b"somebody's"
    assert await follower == (b"somebody's", True)
    shared.may_answer.set()
    await leader


async def test_who_leaves_while_it_waits_has_asked_for_nothing(processes: list[Process], shared: Shared) -> None:
    leader, follower = await leading(processes[0]), await waiting(processes[1])
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    shared.may_answer.set()
    await leader
    assert (shared.requests, shared.gone) == (1, 0)


async def test_a_store_that_fails_costs_nobody_an_answer(processes: list[Process], shared: Shared) -> None:
    async def failing() -> Finished | None:
        raise StorageUnavailable("away")

    shared.may_answer.set()
    leased = processes[0].leased(failing)
    async with leased() as incoming:
        assert [chunk async for chunk in incoming.chunks()] == [b"answer 1"]
    assert not leased.collapsed
    # It is still the one that asks.
    assert await processes[1].leases.take([KEY]) == [Held()]
    await leased.landed(Drop.STATUS)


async def test_leases_that_fail_cost_nobody_an_answer(processes: list[Process], shared: Shared) -> None:
    leader, follower = await leading(processes[0]), await waiting(processes[1])
    processes[1].leases.shared = False
    await eventually(lambda: shared.requests == 2)
    shared.may_answer.set()
    assert [await leader, await follower] == [(b"answer 1", False), (b"answer 2", False)]


async def test_an_upstream_that_fails_is_heard_of(processes: list[Process], shared: Shared) -> None:
    @asynccontextmanager
    async def unreachable() -> AsyncIterator[Finished]:
        raise ConnectionError("unreachable")
        yield

    terms = LeaseTerms(processes[0].leases, processes[0].flush, 0)
    leased = LeasedFetch(terms, KEY, unreachable, shared.finished)
    with pytest.raises(ConnectionError):
        async with leased():
            pass
    await leased.landed(Drop.UPSTREAM_GONE)
    assert not isinstance((await processes[1].leases.take([KEY]))[0], Held)


async def test_who_was_overtaken_must_not_store(processes: list[Process], shared: Shared) -> None:
    shared.may_answer.set()
    leased = processes[0].leased()
    async with leased():
        assert await leased.may_store()
        # As after a term in which it could not be renewed.
        processes[0].leases._until_ms.clear()
        assert not await leased.may_store()


async def test_a_flight_that_waits_ends_with_its_last_reader(processes: list[Process], shared: Shared) -> None:
    class Unsent:
        sent, departed, tainted = False, 0.0, False

        def wanted(self, *, wanted: bool) -> None:
            pass

        def ended(self, ending: str) -> None:
            raise AssertionError("it was never sent")

    leader = await leading(processes[0])
    leased = processes[1].leased()
    landed: list[Flown] = []

    async def land(flown: Flown) -> None:
        landed.append(flown)

    flight = Flight(Unrecorded(), stream=False, include_usage=False, drain=True, sending=Unsent())
    task = flight.depart(leased, land)
    with flight.reader():
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert landed[0].result is Drop.CLIENT_GONE
    shared.may_answer.set()
    await leader
    assert shared.requests == 1


# Several keys


def claim(process: Process, *keys: bytes, taken: Collection[Taken] | None = None) -> Claim:
    return Claim(LeaseTerms(process.leases, process.flush, process.timeout_s), keys, taken)


def finds(*keys: bytes) -> Callable[[], Awaitable[Collection[bytes]]]:
    async def look() -> Collection[bytes]:
        return keys

    return look


async def free(process: Process, *keys: bytes) -> list[bytes]:
    """Which of them it can take."""
    taken = [one for one in await process.leases.take(keys) if isinstance(one, Taken)]
    await process.leases.release(taken, shareable=True)
    return [one.key for one in taken]


async def test_what_is_found_is_let_go_and_the_rest_is_ours(processes: list[Process]) -> None:
    one, other, _ = processes
    mine = claim(one, A, B, C)
    assert await mine.settle(finds(B)) == [A, C]
    assert await free(other, A, B, C) == [B]
    assert await mine.may_store([C, B, A]) == [C, B, A]
    await mine.landed([], shareable=True)
    assert await free(other, A, B, C) == [A, B, C]


async def test_who_waits_for_one_holds_none(processes: list[Process]) -> None:
    one, other, third = processes
    first = claim(one, A)
    await first.settle(finds())
    waiting = asyncio.create_task(claim(other, A, B).settle(finds()))
    await asyncio.sleep(0.1)
    assert await free(third, B) == [B]
    assert not waiting.done()
    await first.landed([], shareable=True)
    assert await waiting == [A, B]
    assert await free(third, A, B) == []


async def test_two_that_want_what_the_other_has_both_get_their_turn(processes: list[Process]) -> None:
    one, other, _ = processes
    first, second = claim(one, A), claim(other, B)
    await asyncio.gather(first.settle(finds()), second.settle(finds()))
    waiting = [asyncio.create_task(claim(process, A, B).settle(finds())) for process in (one, other)]
    await asyncio.sleep(0.1)
    # Each finds one its own already, and waits for the other's.
    assert not any(task.done() for task in waiting)
    await asyncio.gather(first.landed([], shareable=True), second.landed([], shareable=True))
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert next(task.result() for task in done) == [A, B]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_was_not_stored_is_asked_for_at_once_and_what_was_is_looked_for(
    processes: list[Process], shared: Shared
) -> None:
    one, other, _ = processes
    mine = claim(one, A, B)
    await mine.settle(finds())
    await mine.landed([A], shareable=False)
    assert shared.flushes
    a, b = await other.leases.take([A, B])
    assert isinstance(a, Taken)
    assert b == Apart()


async def test_of_several_those_that_were_overtaken_must_not_be_stored(processes: list[Process]) -> None:
    one, _, _ = processes
    taken = [lease for lease in await one.leases.take([A, B]) if isinstance(lease, Taken)]
    mine = claim(one, A, B, C, taken=taken)
    await mine.settle(finds())
    # As after a term in which it could not be renewed.
    del one.leases._until_ms[taken[0]]
    assert await mine.may_store([A, B, C]) == [B, C]


async def test_a_claim_on_what_is_free_waits_for_nobody(processes: list[Process]) -> None:
    one, other, _ = processes
    await claim(one, A).settle(finds())
    assert await claim(other, A, taken=()).settle(finds()) == [A]
