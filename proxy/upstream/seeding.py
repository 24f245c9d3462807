"""Has prefixes computed and measured while nobody calls: one thing at a time, and calls come first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.upstream.adapter import Probe
from proxy.upstream.client import UpstreamError
from proxy.upstream.lane import Preempted
from proxy.upstream.prefix import Hitch, Kept, Prefixing, Seeded
from proxy.upstream.prefix_table import Job, Work

log = logging.getLogger("nearhit.prefixes")


_AGAIN_S = 1.0


class Quiet(Protocol):
    """Where calls and seedings meet; see `proxy.upstream.lane.Lane`."""

    async def idle(self, for_s: float) -> None:
        """Wait until no call has been there for so many seconds."""
        ...

    def seeding(self, *, cancels: bool) -> AbstractAsyncContextManager[None]:
        """Room for a seeding; raises Preempted where a call came and the server can be interrupted."""
        ...


class Preempting(Protocol):
    """Hears of seedings that gave way."""

    def preempted(self) -> None:
        """A call came while a prefix was computed."""
        ...


@dataclass(frozen=True, slots=True)
class Pending:
    """Something to do, by whom, under what name to keep it, and after how many seconds without a call.

    `run` is the run of the server that was confirmed when it began. `unkept` says why no name is given after all.
    """

    job: Job
    prefixing: Prefixing
    file: str
    idle_s: float
    run: str = ""
    unkept: str = ""


@dataclass(frozen=True, slots=True)
class TooLong:
    """Seeding was given up after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What measuring told."""

    effect: bool | None


Outcome = Seeded | Hitch | TooLong | Preempted | Proof


class Agenda(Protocol):
    """What is to be done; see `proxy.upstream.prefix_cache.PrefixCache`."""

    @property
    def changed(self) -> asyncio.Event:
        """Set whenever there may be something new to do."""
        ...

    def pending(self) -> Pending | None:
        """What is most worth doing now; None for nothing."""
        ...

    def pause_s(self) -> float:
        """Seconds after which to ask again, if nothing changes."""
        ...

    async def prepared(self, pending: Pending) -> Pending | None:
        """How to do it, once nothing of what was done before can meddle with it; None: it is not to be done now."""
        ...

    async def done(self, pending: Pending, outcome: Outcome) -> None:
        """Take note of what came of it."""
        ...


@dataclass(slots=True)
class _Attempt:
    """What is being done, as it was prepared."""

    pending: Pending


class Seeder:
    """Does what is on an agenda."""

    def __init__(self, agenda: Agenda, quiet: Quiet, probe: Probe, observer: Preempting, *, timeout_s: float) -> None:
        """`probe` asks with nearhit's own credential and may take `timeout_s`, as computing one prefix may."""
        self._agenda = agenda
        self._quiet = quiet
        self._probe = probe
        self._observer = observer
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            self._agenda.changed.clear()
            pending = self._agenda.pending()
            if pending is None or not await self._is_idle(pending.idle_s):
                await self._changed(self._agenda.pause_s())
                continue
            async with self._turn:
                # Which is most worth doing may be another by now, or it may be done.
                again = self._agenda.pending()
                if again is not None and again.idle_s <= pending.idle_s:
                    await self._do(again)

    async def now(self, pending: Pending) -> Outcome:
        """Do one thing without waiting for the server to have been idle for long; what came of it."""
        async with self._turn:
            return await self._do(pending)

    async def _do(self, pending: Pending) -> Outcome:
        pending.job.entry.seeding = True
        try:
            attempt = _Attempt(pending)
            outcome = await self._attempt(attempt)
            await self._agenda.done(attempt.pending, outcome)
        finally:
            pending.job.entry.seeding = False
        return outcome

    async def _attempt(self, attempt: _Attempt) -> Outcome:
        began = time.monotonic()
        try:
            async with self._quiet.seeding(cancels=attempt.pending.prefixing.cancels):
                began = time.monotonic()
                prepared = await self._agenda.prepared(attempt.pending)
                if prepared is None:
                    return Hitch.UNREACHABLE
                attempt.pending = prepared
                async with asyncio.timeout(self._timeout_s):
                    outcome = await self._ask(attempt.pending)
        except Preempted as preempted:
            self._observer.preempted()
            return preempted
        except TimeoutError:
            return TooLong(self._timeout_s)
        except UpstreamError:
            return Hitch.UNREACHABLE
        except Exception as error:  # noqa: BLE001 - whatever a server answers must not end all seeding
            log.warning("seeding failed (%s)", type(error).__name__)
            return Hitch.REFUSED
        # The probe's own limit may be the one that was met first.
        given_up = outcome is Hitch.BUSY and time.monotonic() - began > 0.9 * self._timeout_s
        return TooLong(self._timeout_s) if given_up else outcome

    async def _ask(self, pending: Pending) -> Outcome:
        entry, prefixing = pending.job.entry, pending.prefixing
        if pending.job.work is Work.SEED:
            return await prefixing.seed(self._probe, entry.lead, pending.file)
        return Proof(await prefixing.prove(self._probe, entry.lead, Kept(entry.file, entry.tokens)))

    async def _is_idle(self, for_s: float) -> bool:
        """Wait until nobody has called for so long; False where something changed first."""
        changed = await _first(self._agenda.changed.wait, lambda: self._quiet.idle(for_s))
        return not changed

    async def _changed(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._agenda.changed.wait()
        except TimeoutError:
            pass


async def _first(one: Callable[[], Awaitable[object]], other: Callable[[], Awaitable[object]]) -> bool:
    """Wait for either; whether it was `one`. The other is cancelled."""

    async def wait(for_it: Callable[[], Awaitable[object]]) -> None:
        await for_it()

    tasks = [asyncio.create_task(wait(for_it), name="nearhit-seeding-wait") for for_it in (one, other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def background(run: Callable[[], Coroutine[Any, Any, None]], name: str) -> AsyncIterator[None]:
    """Run a task for the life of this block; where it fails in a way that nobody foresaw, it begins again."""
    task = asyncio.create_task(_kept_up(run, name), name=name)
    try:
        yield
    finally:
        # What fails while it is being cancelled would begin again.
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_AGAIN_S)


async def _kept_up(run: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    told = set[str]()
    while True:
        try:
            return await run()
        except Exception as error:
            level = logging.DEBUG if type(error).__name__ in told else logging.CRITICAL
            log.log(level, "%s failed and begins again", name, exc_info=error)
            told.add(type(error).__name__)
            await asyncio.sleep(_AGAIN_S)
