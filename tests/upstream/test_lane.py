"""Calls to a server that works on few at a time: order, bounds, leaving early, and seedings that give way."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.upstream.lane import Lane, LaneBusy, LaneFull, LaneTimeout, Place, Preempted
from tests.conftest import eventually

A, B, C = b"a", b"b", b"c"
LONG_S = 60.0
"""Ends a test that hangs."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Call:
    """A call in a task of its own; works until it is told to end."""

    def __init__(self, lane: Lane, client: bytes, served: list[Call] | None = None) -> None:
        self.client = client
        self.place: Place | None = None
        self._lane = lane
        self._served = served
        self._over = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._lane.place(self.client) as self.place:
            if self._served is not None:
                self._served.append(self)
            await self._over.wait()

    async def end(self) -> None:
        self._over.set()
        await asyncio.wait_for(self.task, LONG_S)

    async def leave(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


class Seed:
    """A seeding in a task of its own."""

    def __init__(self, lane: Lane, *, cancels: bool, slow_to_leave: bool = False) -> None:
        self.began = asyncio.Event()
        self.may_leave = asyncio.Event()
        self._over = asyncio.Event()
        self._slow = slow_to_leave
        self.task = asyncio.create_task(self._run(lane, cancels))

    async def _run(self, lane: Lane, cancels: bool) -> None:
        async with lane.seeding(cancels=cancels):
            self.began.set()
            try:
                await self._over.wait()
            finally:
                if self._slow:
                    await self.may_leave.wait()

    async def end(self) -> None:
        self._over.set()
        await asyncio.wait_for(self.task, LONG_S)


async def turn() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def taken(lane: Lane) -> AsyncIterator[None]:
    async with lane.place(b"first"):
        yield


async def test_places_are_limited_and_handed_on() -> None:
    lane = Lane(2)
    calls = [Call(lane, A) for _ in range(3)]
    await turn()
    assert (lane.working, lane.waiting) == (2, 1)
    assert calls[2].place is None
    await calls[0].end()
    await turn()
    assert (lane.working, lane.waiting) == (2, 0)
    await calls[1].end()
    await calls[2].end()
    assert (lane.working, lane.waiting) == (0, 0)


async def test_without_a_limit_calls_are_only_counted() -> None:
    lane = Lane(0, max_waiting=0)
    calls = [Call(lane, A) for _ in range(50)]
    await turn()
    assert (lane.working, lane.waiting) == (50, 0)
    for call in calls:
        await call.end()


async def test_clients_take_turns() -> None:
    lane, served = Lane(1), list[Call]()
    async with taken(lane):
        calls = [Call(lane, client, served) for client in (A, A, A, A, B, C, B)]
        await turn()
    for number in range(len(calls)):
        await eventually(lambda number=number: len(served) > number)  # type: ignore[misc]
        await served[number].end()
    assert [call.client for call in served] == [A, B, C, A, B, A, A]
    assert [call for call in served if call.client == A] == calls[:4]


async def test_a_chatty_client_cannot_keep_others_out_of_a_full_queue() -> None:
    lane = Lane(1, max_waiting=3)
    async with taken(lane):
        chatty = [Call(lane, A) for _ in range(3)]
        await turn()
        with pytest.raises(LaneFull):
            async with lane.place(A):
                pass
        other = Call(lane, B)
        await turn()
        with pytest.raises(LaneFull):
            await chatty[2].task
        assert lane.waiting == 3
        with pytest.raises(LaneFull):
            async with lane.place(B):
                pass
    for call in (chatty[0], other, chatty[1]):
        await call.end()


async def test_waiting_too_long_ends_with_the_time_to_come_again() -> None:
    clock = Clock()
    lane = Lane(1, timeout_s=0.001, clock=clock)
    async with taken(lane):
        clock.now += 7.0
    async with taken(lane):
        with pytest.raises(LaneTimeout) as caught:
            async with lane.place(A):
                pass
        assert caught.value.retry_after_s >= 7
        assert lane.waiting == 0
    assert lane.working == 0


async def test_the_estimate_grows_with_the_queue_and_is_at_least_a_second() -> None:
    clock = Clock()
    lane = Lane(1, max_waiting=2, clock=clock)

    async def refused() -> LaneBusy:
        async with taken(lane):
            calls = [Call(lane, client) for client in (A, B)]
            await turn()
            with pytest.raises(LaneFull) as caught:
                async with lane.place(C):
                    pass
        for call in calls:
            await call.end()
        return caught.value

    assert (await refused()).retry_after_s == 1
    async with taken(lane):
        clock.now += 1000.0
    assert (await refused()).retry_after_s > 300


async def test_leaving_the_queue_leaves_no_trace() -> None:
    lane, served = Lane(1), list[Call]()
    async with taken(lane):
        calls = [Call(lane, A, served) for _ in range(3)]
        await turn()
        await calls[1].leave()
        assert lane.waiting == 2
    await calls[0].end()
    await calls[2].end()
    assert served == [calls[0], calls[2]]


async def test_a_call_that_goes_away_just_as_it_gets_a_place_hands_it_on() -> None:
    lane = Lane(1)
    async with taken(lane):
        first, second = Call(lane, A), Call(lane, B)
        await turn()
    first.task.cancel()
    assert (lane.working, lane.waiting) == (1, 1)
    await eventually(lambda: second.place is not None)
    assert first.task.cancelled()
    await second.end()
    assert lane.working == 0


async def test_a_call_that_goes_away_just_as_it_is_refused() -> None:
    lane = Lane(1, max_waiting=2)
    async with taken(lane):
        chatty = [Call(lane, A) for _ in range(2)]
        await turn()
        other = Call(lane, B)
        asyncio.get_running_loop().call_soon(chatty[1].task.cancel)
        await turn()
        assert chatty[1].task.cancelled()
        assert lane.waiting == 2
    await chatty[0].end()
    await other.end()


async def test_the_limit_may_change_while_calls_wait() -> None:
    lane = Lane(1)
    calls = [Call(lane, A) for _ in range(4)]
    await turn()
    lane.limit(2)
    await turn()
    assert lane.working == 2
    lane.limit(1)
    await calls[0].end()
    await turn()
    assert (lane.working, lane.waiting) == (1, 2)
    lane.limit(0)
    await turn()
    assert (lane.working, lane.waiting) == (3, 0)
    for call in calls[1:]:
        await call.end()
    with pytest.raises(ValueError, match="0 or more"):
        lane.limit(-1)


async def test_what_was_waited_is_told() -> None:
    clock, told = Clock(), list[Place]()
    lane = Lane(1, clock=clock, observe=told.append)
    async with taken(lane):
        call = Call(lane, A)
        await turn()
        clock.now += 3.0
    await call.end()
    assert told == [Place(0.0, 0.0, met_seeding=False), Place(3.0, 0.0, met_seeding=False)]


async def test_an_observer_that_fails_costs_no_place() -> None:
    def fail(_: Place) -> None:
        raise RuntimeError("observer")

    lane = Lane(1, observe=fail)
    with pytest.raises(RuntimeError):
        async with lane.place(A):
            pass
    assert lane.working == 0


async def test_idle_counts_calls_and_not_seedings() -> None:
    clock = Clock()
    lane = Lane(1, clock=clock)
    clock.now += 5.0
    assert lane.idle_for(clock.now) == 5.0
    async with taken(lane):
        clock.now += 9.0
        assert lane.idle_for(clock.now) == 0.0
    async with lane.seeding(cancels=True):
        clock.now += 2.0
    assert lane.idle_for(clock.now) == 2.0


async def test_waiting_for_idleness_outlasts_calls() -> None:
    lane = Lane(1)
    call = Call(lane, A)
    await turn()
    idle = asyncio.create_task(lane.idle(0.02))
    later = asyncio.create_task(lane.idle(0.0))
    await asyncio.sleep(0.05)
    assert not idle.done()
    assert not later.done()
    await call.end()
    await idle
    await later
    assert lane.idle_for(time.monotonic()) >= 0.02


async def test_a_seeding_begins_when_no_call_works_or_waits() -> None:
    lane = Lane(1)
    first, second = Call(lane, A), Call(lane, A)
    await turn()
    seed = Seed(lane, cancels=True)
    await first.end()
    await turn()
    assert not seed.began.is_set()
    await second.end()
    await seed.began.wait()
    await seed.end()


async def test_seedings_follow_one_another() -> None:
    lane = Lane(4)
    seeds = [Seed(lane, cancels=False) for _ in range(3)]
    for seed in seeds:
        await eventually(lambda seed=seed: seed.began.is_set())  # type: ignore[misc]
        assert sum(other.began.is_set() and not other.task.done() for other in seeds) == 1
        await seed.end()


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_a_call_has_a_seeding_cancelled_and_begins_once_it_was_left(limit: int) -> None:
    clock = Clock()
    lane = Lane(limit, clock=clock)
    seed = Seed(lane, cancels=True, slow_to_leave=True)
    await seed.began.wait()
    clock.now += 1.0
    calls = [Call(lane, client) for client in (A, B)[: limit or 2]]
    await turn()
    assert (lane.working, lane.waiting) == (0, len(calls))
    clock.now += 2.0
    seed.may_leave.set()
    with pytest.raises(Preempted):
        await seed.task
    for call in calls:
        await call.end()
        assert call.place == Place(2.0, 2.0, met_seeding=True)


async def test_a_call_waits_for_a_seeding_that_cannot_be_cancelled() -> None:
    clock = Clock()
    lane = Lane(1, clock=clock)
    seed = Seed(lane, cancels=False)
    await seed.began.wait()
    clock.now += 10.0
    first, second = Call(lane, A), Call(lane, B)
    await turn()
    assert first.place is None
    clock.now += 4.0
    await seed.end()
    await turn()
    clock.now += 1.0
    await first.end()
    await second.end()
    assert first.place == Place(4.0, 4.0, met_seeding=True)
    assert second.place == Place(5.0, 4.0, met_seeding=True)


async def test_where_the_server_queues_a_call_goes_beside_such_a_seeding() -> None:
    lane = Lane(0)
    seed = Seed(lane, cancels=False)
    await seed.began.wait()
    async with lane.place(A) as place:
        assert place.met_seeding
        assert place.waited_for_seeding_s == 0.0
        await seed.end()
    async with lane.place(A) as place:
        assert not place.met_seeding


async def test_a_call_that_leaves_while_it_waits_for_a_seeding() -> None:
    lane = Lane(1)
    seed = Seed(lane, cancels=False)
    await seed.began.wait()
    call = Call(lane, A)
    await turn()
    await call.leave()
    await seed.end()
    assert (lane.working, lane.waiting) == (0, 0)
    async with lane.seeding(cancels=True):
        assert lane.seeding_now


async def test_whoever_cancels_the_seeder_itself_still_does() -> None:
    lane = Lane(1)
    seed = Seed(lane, cancels=True, slow_to_leave=True)
    await seed.began.wait()
    call = Call(lane, A)
    await turn()
    seed.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await seed.task
    await call.end()
    blocker = Call(lane, A)
    await turn()
    waiting = Seed(lane, cancels=True)
    await turn()
    waiting.task.cancel()
    await blocker.end()
    await turn()
    assert waiting.task.cancelled()
    assert not lane.seeding_now


async def test_a_preempted_task_goes_on_uncancelled() -> None:
    lane = Lane(1)
    results: list[str] = []

    async def seeder() -> None:
        for _ in range(2):
            try:
                async with asyncio.timeout(LONG_S), lane.seeding(cancels=True):
                    await asyncio.Event().wait()
            except Preempted:
                results.append("preempted")
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        async with asyncio.timeout(LONG_S):
            await asyncio.sleep(0)
        results.append("went on")

    task = asyncio.create_task(seeder())
    for number in range(2):
        await eventually(lambda: lane.seeding_now)
        async with lane.place(A):
            assert results == ["preempted"] * (number + 1)
    await task
    assert results == ["preempted", "preempted", "went on"]


async def test_a_seeding_that_fails_or_ends_while_it_is_cancelled() -> None:
    lane = Lane(1)

    async def seeder(what: Callable[[], None]) -> None:
        async with lane.seeding(cancels=True):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                what()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    def fail() -> None:
        raise OSError("connection lost")

    for what, error in ((fail, OSError), (lambda: None, None)):
        task = asyncio.create_task(seeder(what))
        await eventually(lambda: lane.seeding_now)
        async with lane.place(A):
            pass
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert type(outcome) is (error or type(None))


class _Watch:
    """What is under way, as those see it who are under way."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.calls = 0
        self.seeds = 0
        self.most = lane.max_concurrency
        self.exclusive = True

    def check(self) -> None:
        assert self.seeds <= 1
        if self.exclusive:
            assert self.calls <= self.most
            assert not (self.calls and self.seeds)


async def _call(watch: _Watch, rng: random.Random) -> None:
    try:
        async with watch.lane.place(rng.choice([A, B, C])):
            watch.calls += 1
            watch.check()
            try:
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
                    watch.check()
            finally:
                watch.calls -= 1
    except LaneBusy:
        pass


async def _seed(watch: _Watch, rng: random.Random, cancels: bool) -> None:
    try:
        async with watch.lane.seeding(cancels=cancels):
            watch.seeds += 1
            watch.check()
            try:
                for _ in range(rng.randrange(12)):
                    await asyncio.sleep(0)
                    watch.check()
            finally:
                try:
                    await asyncio.sleep(0)
                finally:
                    watch.seeds -= 1
    except Preempted:
        assert cancels
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def _storm(seed: int) -> None:
    rng = random.Random(seed)
    unlimited = rng.random() < 0.2
    lane = Lane(
        0 if unlimited else rng.randint(1, 3),
        max_waiting=rng.choice([1, 3, 100]),
        timeout_s=rng.choice([None, 0.0, 0.0005]),
    )
    watch = _Watch(lane)
    watch.exclusive = not unlimited
    tasks: list[asyncio.Task[None]] = []
    for _ in range(rng.randint(5, 60)):
        dice = rng.random()
        if dice < 0.6:
            tasks.append(asyncio.create_task(_call(watch, rng)))
        elif dice < 0.75:
            tasks.append(asyncio.create_task(_seed(watch, rng, cancels=rng.random() < 0.6)))
        elif dice < 0.9 and tasks:
            rng.choice(tasks).cancel()
        elif not unlimited:
            lane.limit(rng.randint(1, 3))
            watch.most = 3
        for _ in range(rng.choice([0, 0, 1, 3])):
            await asyncio.sleep(0)
    async with asyncio.timeout(LONG_S):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
    assert (lane.working, lane.waiting, lane.seeding_now) == (0, 0, False)
    async with asyncio.timeout(LONG_S):
        async with lane.seeding(cancels=True):
            pass
        async with lane.place(A):
            pass
        await lane.idle(0.0)


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_nobody_is_forgotten_whatever_happens(seed: int) -> None:
    """Calls, seedings, cancellations, time limits and changed limits in any order: no place is lost or given twice."""
    asyncio.run(_storm(seed))
