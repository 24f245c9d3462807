"""The queue in front of a server that works on few calls at a time: fair across clients, bounded, seeds last.

Everything happens in one event loop and no state changes across an `await`: a place is handed from call to call by
the one who leaves, so that no wake-up can be lost.

    LaneBusy                no place; says when to come again
    |-- LaneFull            too many wait already
    `-- LaneTimeout         waited for too long
    Preempted               a seeding was stopped, because a call came
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_NEWEST = 0.2
"""Weight of the newest figure in the moving average of how long places are held."""
_LONGEST_S = 3600


class LaneBusy(Exception):
    """No place could be had. `retry_after_s` estimates when one can, in whole seconds, at least 1."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        """`message` is for the client to read."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LaneFull(LaneBusy):
    """As many calls wait as may."""


class LaneTimeout(LaneBusy):
    """The call waited for as long as it may."""


class Preempted(Exception):
    """A call came, so the seeding was cancelled: it is to be tried again later."""


@dataclass(frozen=True, slots=True)
class Place:
    """How a call came to its place, in seconds. `waited_for_seeding_s` is part of `waited_s`.

    `met_seeding`: a seeding was under way when the call came, even if it waits for that inside the server and not here.
    """

    waited_s: float
    waited_for_seeding_s: float
    met_seeding: bool


@dataclass(eq=False, slots=True)
class _Waiter:
    """A call that waits. `answer` is None once it has a place, else why it gets none."""

    client: bytes
    since: float
    met_seeding: bool
    answer: asyncio.Future[LaneBusy | None]
    for_seeding_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Seeding:
    """The seeding under way: a cancel scope round its block, made as `asyncio.timeout` makes its own."""

    task: asyncio.Task[object]
    cancels: bool
    preempted: bool = False
    _before: int = field(init=False)
    _ours_alone: bool | None = None

    def __post_init__(self) -> None:
        self._before = self.task.cancelling()

    def preempt(self) -> None:
        if self.cancels and not self.preempted:
            self.preempted = True
            self.task.cancel()

    def take_back(self) -> bool:
        """Take our cancellation back; whether there was one, and the task was cancelled by nobody else."""
        if self.preempted and self._ours_alone is None:
            self._ours_alone = self.task.uncancel() <= self._before
        return bool(self._ours_alone)


class _FairQueue:
    """Who waits: clients take turns, and the calls of one client keep their order."""

    def __init__(self) -> None:
        self._turns: OrderedDict[bytes, OrderedDict[_Waiter, None]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Waiter]:
        return (waiter for waiters in self._turns.values() for waiter in waiters)

    def push(self, waiter: _Waiter) -> None:
        self._turns.setdefault(waiter.client, OrderedDict())[waiter] = None
        self._length += 1

    def pop(self) -> _Waiter:
        """The first call of the client whose turn it is; its next one waits for all others' turns."""
        client, waiters = next(iter(self._turns.items()))
        waiter = next(iter(waiters))
        self.discard(waiter)
        if client in self._turns:
            self._turns.move_to_end(client)
        return waiter

    def discard(self, waiter: _Waiter) -> None:
        waiters = self._turns.get(waiter.client)
        if waiters is None or waiter not in waiters:
            return
        del waiters[waiter]
        self._length -= 1
        if not waiters:
            del self._turns[waiter.client]

    def greediest(self, client: bytes) -> _Waiter | None:
        """The newest call of whoever has most waiting; None if this client would then have as many."""
        most = max(self._turns.values(), key=len, default=OrderedDict[_Waiter, None]())
        return next(reversed(most)) if len(most) > len(self._turns.get(client, ())) + 1 else None


class Lane:
    """Places at one upstream."""

    def __init__(
        self,
        max_concurrency: int = 0,
        *,
        max_waiting: int = 100,
        timeout_s: float | None = None,
        observe: Callable[[Place], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_concurrency` calls at a time, 0: the server queues by itself, and calls are only counted.

        Of the others `max_waiting` wait, each for up to `timeout_s` (None: for as long as it takes). `observe` is told
        of every place that was taken. `clock` counts seconds.
        """
        self._limit = _not_negative(max_concurrency)
        self._max_waiting = _not_negative(max_waiting)
        self._timeout_s = timeout_s
        self._observe = observe
        self._clock = clock
        self._queue = _FairQueue()
        self._working = 0
        self._seeding: _Seeding | None = None
        self._ended = clock()
        self._held_s: float | None = None
        self._no_calls = asyncio.Event()
        self._quiet = asyncio.Event()
        self._advance()

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return len(self._queue)

    @property
    def working(self) -> int:
        """Calls that have a place."""
        return self._working

    @property
    def seeding_now(self) -> bool:
        """Whether a seeding is under way."""
        return self._seeding is not None

    @property
    def max_concurrency(self) -> int:
        """Calls at a time; 0: any number."""
        return self._limit

    def limit(self, max_concurrency: int) -> None:
        """Change the number of calls at a time; those that have a place keep it."""
        self._limit = _not_negative(max_concurrency)
        self._advance()

    def idle_for(self, now: float) -> float:
        """Seconds since the last call left (or since the lane was made), by its clock; 0 while one works or waits."""
        return 0.0 if self._working or self._queue else max(0.0, now - self._ended)

    async def idle(self, for_s: float) -> None:
        """Wait until no call has worked or waited for that long. Seedings do not count."""
        while self._working or self._queue or self.idle_for(self._clock()) < for_s:
            await self._no_calls.wait()
            await asyncio.sleep(for_s - self.idle_for(self._clock()))

    @asynccontextmanager
    async def place(self, client: bytes) -> AsyncIterator[Place]:
        """A place for one call of this client.

        Raises LaneFull, LaneTimeout. A full queue refuses the newest call of whoever has most waiting.
        """
        arrived, met = self._clock(), self._seeding is not None
        waiter = None if self._open() and not self._queue else await self._wait(client)
        if waiter is None:
            self._working += 1
            self._advance()
        began = self._clock()
        place = Place(began - arrived, waiter.for_seeding_s if waiter else 0.0, met)
        try:
            self._observe(place)
            yield place
        finally:
            self._learn(self._clock() - began)
            self._leave()

    @asynccontextmanager
    async def seeding(self, *, cancels: bool) -> AsyncIterator[None]:
        """Room for one seeding: waits until no call works or waits.

        Where the server `cancels`, a call that comes has the block cancelled and begins when it was left: raises
        Preempted. Elsewhere calls wait for its end; without a limit they do so inside the server.
        """
        while self._working or self._queue or self._seeding:
            await self._quiet.wait()
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._seeding = seeding = _Seeding(task, cancels)
        self._advance()
        try:
            yield
        except asyncio.CancelledError as error:
            if seeding.take_back():
                raise Preempted("a call came") from error
            raise
        finally:
            seeding.take_back()
            self._end_seeding()

    async def _wait(self, client: bytes) -> _Waiter:
        """Wait for a place, which is then counted as taken."""
        loop = asyncio.get_running_loop()
        self._make_room(client)
        waiter = _Waiter(client, self._clock(), self._seeding is not None, loop.create_future())
        self._queue.push(waiter)
        self._advance()
        if self._seeding:
            self._seeding.preempt()
        timer = loop.call_later(self._timeout_s, self._time_out, waiter) if self._timeout_s is not None else None
        try:
            refused = await waiter.answer
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise
        finally:
            if timer:
                timer.cancel()
        if refused:
            raise refused
        return waiter

    def _make_room(self, client: bytes) -> None:
        if self._limit == 0 or len(self._queue) < self._max_waiting:
            return
        full = LaneFull("too many calls wait for this model; try again later", self._retry_after_s())
        greedy = self._queue.greediest(client)
        if greedy is None:
            raise full
        self._refuse(greedy, full)

    def _time_out(self, waiter: _Waiter) -> None:
        if not waiter.answer.done():
            self._refuse(waiter, LaneTimeout("the model is busy with other calls", self._retry_after_s()))
            self._ended = self._clock()
            self._advance()

    def _refuse(self, waiter: _Waiter, why: LaneBusy) -> None:
        self._queue.discard(waiter)
        if not waiter.answer.done():
            waiter.answer.set_result(why)

    def _give_up(self, waiter: _Waiter) -> None:
        """The call went away: its place, if it was just given one, is for the next."""
        self._queue.discard(waiter)
        if waiter.answer.cancelled() or waiter.answer.result() is not None:
            self._ended = self._clock()
            self._advance()
        else:
            self._leave()

    def _leave(self) -> None:
        self._working -= 1
        self._ended = self._clock()
        self._advance()

    def _end_seeding(self) -> None:
        self._seeding = None
        now = self._clock()
        for waiter in self._queue:
            # Nobody waited when the seeding began, so all of the waiting until now was for it.
            waiter.for_seeding_s = now - waiter.since
        self._advance()

    def _open(self) -> bool:
        """Whether one more call may work now."""
        if self._seeding and (self._limit or self._seeding.cancels):
            return False
        return self._limit == 0 or self._working < self._limit

    def _advance(self) -> None:
        """Hand out the places that are free; called after every change."""
        while self._queue and self._open():
            waiter = self._queue.pop()
            # One that was cancelled has not run since: it finds itself out of the queue.
            if not waiter.answer.done():
                self._working += 1
                waiter.answer.set_result(None)
        _set(self._no_calls, not (self._working or self._queue))
        _set(self._quiet, not (self._working or self._queue or self._seeding))

    def _learn(self, held_s: float) -> None:
        self._held_s = held_s if self._held_s is None else self._held_s + _NEWEST * (held_s - self._held_s)

    def _retry_after_s(self) -> int:
        each_s = (self._held_s or 0.0) / max(self._limit, 1)
        return max(1, min(_LONGEST_S, math.ceil(each_s * (len(self._queue) + 1))))


def _not_negative(number: int) -> int:
    if number < 0:
        raise ValueError(f"expected 0 or more, got {number}")
    return number


def _set(event: asyncio.Event, on: bool) -> None:
    if on:
        event.set()
    else:
        event.clear()
