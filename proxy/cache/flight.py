"""One upstream fetch for any number of readers, who may come while it is under way and leave at any time.

The fetch is a task of its own. Its bytes go into a log; every reader follows the log at its own pace, first what was
there when it came, then the live tail. The log holds the whole answer while that is recorded (bounded by the recorder);
beyond the bound nobody may join any more, and the fetch goes at the pace of the slowest reader.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from proxy.cache.answer import Recorded
from proxy.cache.dialects.call import Call
from proxy.cache.policy import Drop
from proxy.cache.ports import Fetch, Incoming, Sending
from proxy.cache.recorder import Recording
from proxy.cache.trust import UNTRACKED, Ending

AT_ONCE = 65_536
"""Bytes after which a reader comes back for more: whoever reads slowly is not taken for one who stands still."""
STANDSTILL_S = 10.0
"""How long one reader of an answer that is too large to be held may stand still, where others wait for more."""
TAIL_S = 2.0
"""How long an answer that is complete may take to close its body when nobody reads it any more."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status, reason phrase and header fields of the upstream's response."""

    status: int
    reason: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Flown:
    """How a fetch ended: what came of it, how long it took, and when the first token came (seconds)."""

    result: Recorded | Drop
    seconds: float
    ttft_seconds: float | None


Land = Callable[[Flown], Awaitable[None]]
"""Told once how the fetch ended; keeps the answer. Readers do not wait for it."""


class Interrupted(Exception):
    """The fetch was given up before its end, because nearhit stops."""


class Flight:
    """A fetch under way. `stream` says how its bytes come, `include_usage` that its stream tells usage in an event."""

    def __init__(
        self,
        recorder: Recording,
        *,
        stream: bool,
        include_usage: bool,
        drain: bool,
        sending: Sending = UNTRACKED,
        echoed: bytes = b"",
        overgrown: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """With `drain`, a fetch whose call was sent goes on to its end when nobody reads any more.

        `echoed`: see `Call`.
        """
        self.stream = stream
        self.include_usage = include_usage
        self.echoed = echoed
        self._recorder = recorder
        self._drain = drain
        self._sending = sending
        self._overgrown = overgrown
        self.keeps = False
        """Whether somebody reads along whose answers may be kept, whoever asked first."""
        self.successor: Flight | None = None
        """What was asked once more for those whom it failed."""
        self._head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self._log: list[bytes] = []
        self._forgotten = 0
        self._ended = False
        self._error: Exception | None = None
        self._flown: asyncio.Future[Flown] = asyncio.get_running_loop().create_future()
        self._waiting: list[asyncio.Future[None]] = []
        self._readers: set[Reader] = set()
        self._task: asyncio.Task[None] | None = None
        self._abandoned = False
        self._started = 0.0
        self._ttft_seconds: float | None = None

    @property
    def joinable(self) -> bool:
        """Whether a new reader would get the answer from its beginning."""
        return self._forgotten == 0 and not (self._recorder.full or self._abandoned or self._error)

    @property
    def refused(self) -> bool:
        """Whether the upstream is known to have failed: who comes now may have better luck."""
        return self._head.done() and self._error is None and self._head.result().status >= 500

    @property
    def failed(self) -> bool:
        """Whether nothing of an answer came, and no more will: all that a new reader can get is the error."""
        return not self._abandoned and self._head.done() and self._head.exception() is not None

    def serves(self, call: Call, *, usage_from_timings: bool) -> bool:
        """Whether a new reader with this call would get the whole answer, in its form.

        A stream that was not asked for its usage tells none, unless that can be derived from the server's timings.
        """
        tells_usage = not self.stream or self.include_usage or usage_from_timings
        return self.joinable and (tells_usage or not call.needs_usage)

    def depart(self, fetch: Fetch, land: Land) -> asyncio.Task[None]:
        """Start the fetch; the task ends after `land` has."""
        self._task = asyncio.create_task(self._fly(fetch, land), name="nearhit-fetch")
        return self._task

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Read along for the life of this block.

        When the last reader leaves early, the fetch is cancelled, or drained where that is wanted and it was sent.
        """
        reader = Reader(self)
        self._readers.add(reader)
        self._sending.wanted(wanted=True)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            self._sending.wanted(wanted=bool(self._readers))
            self._wake()
            drains = self._drain and self._sending.sent
            if not self._readers and not self._ended and not drains and self._task is not None:
                self._abandon(self._task)

    @property
    def error(self) -> Exception | None:
        """What the fetch raised, if it failed."""
        return self._error

    async def head(self) -> Head:
        """The upstream's status and header, as soon as they are known.

        Raises:
            Exception: what the fetch raised.
        """
        return self._head.result() if self._head.done() else await asyncio.shield(self._head)

    async def flown(self) -> Flown:
        """How the fetch ended, once it has."""
        return self._flown.result() if self._flown.done() else await asyncio.shield(self._flown)

    async def _fly(self, fetch: Fetch, land: Land) -> None:
        self._started = time.perf_counter()
        judged: Recorded | Drop | None = None
        result: Recorded | Drop = Drop.UPSTREAM_GONE
        try:
            async with fetch() as incoming:
                try:
                    result = judged = await self._received(incoming)
                finally:
                    # An answer that came from elsewhere says nothing of how a call ended that was not sent.
                    if self._sending.sent:
                        self._sending.ended(_ending(result))
        except asyncio.CancelledError:
            if judged is None:
                result = Drop.CLIENT_GONE
                self._fail(Interrupted("the request was given up before its end"))
                raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the readers' to hear
            self._fail(error)
        finally:
            self._ended = True
            self._wake()
            flown = Flown(result, self._seconds(), self._ttft_seconds)
            self._flown.set_result(flown)
            await land(flown)

    def _seconds(self) -> float:
        return time.perf_counter() - max(self._started, self._sending.departed)

    async def _received(self, incoming: Incoming) -> Recorded | Drop:
        """Publish what comes, and judge it."""
        try:
            self._recorder.begin(incoming.status, incoming.headers)
            self._head.set_result(Head(incoming.status, incoming.reason, incoming.headers))
            async for chunk in incoming.chunks():
                self._recorder.feed(chunk)
                if self._overgrown is not None and self._recorder.full:
                    overgrown, self._overgrown = self._overgrown, None
                    await overgrown()
                if self._ttft_seconds is None and self._recorder.spoke:
                    self._ttft_seconds = self._seconds()
                await self._publish(chunk)
            self._ended = True
            self._wake()
            # The readers send what they have before the answer is judged and stored.
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            # Nobody waits for the end of a body that has said all.
            if not self._recorder.complete:
                raise
        return self._recorder.finish()

    async def _publish(self, chunk: bytes) -> None:
        self._log.append(chunk)
        self._wake()
        while self._recorder.full and self._readers and self._log:
            read = min(len(self._log), min(reader.position for reader in self._readers) - self._forgotten)
            del self._log[:read]
            self._forgotten += read
            if self._log:
                await self._let_read()
        if self._recorder.full and not self._readers:
            self._forgotten += len(self._log)
            self._log.clear()

    async def _let_read(self) -> None:
        """Wait for readers to go on; who stands still while another waits for more is waited for no longer."""
        try:
            async with asyncio.timeout(STANDSTILL_S):
                await self._moved()
        except TimeoutError:
            end = self._forgotten + len(self._log)
            if any(reader.position >= end for reader in self._readers):
                for reader in [one for one in self._readers if one.position < end]:
                    reader.left_behind = True
                    self._readers.discard(reader)

    def _abandon(self, task: asyncio.Task[None]) -> None:
        if self._recorder.complete:
            # Clients hang up at the end mark; the rest of the body is a few bytes, and the connection can be kept.
            asyncio.get_running_loop().call_later(TAIL_S, self._cut_tail, task)
            return
        self._abandoned = True
        task.cancel()

    def _cut_tail(self, task: asyncio.Task[None]) -> None:
        # What comes after the end of the body is keeping the answer, however long that takes.
        if not self._ended:
            task.cancel()

    def _fail(self, error: Exception) -> None:
        self._error = error
        if not self._head.done():
            self._head.set_exception(error)
            self._head.exception()  # marks it as seen: there may be nobody left to read it

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _moved(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    async def _read(self, position: int) -> list[bytes]:
        while position - self._forgotten >= len(self._log):
            if self._error is not None:
                raise self._error
            if self._ended:
                return []
            await self._moved()
        start = end = position - self._forgotten
        size = 0
        while end < len(self._log) and size < AT_ONCE:
            size += len(self._log[end])
            end += 1
        return self._log[start:end]


def _ending(result: Recorded | Drop) -> Ending:
    if isinstance(result, Drop):
        return Ending.UNKNOWN
    return Ending.CUT if result.was_cut else Ending.WHOLE


class Reader:
    """One caller's place in a flight's log."""

    def __init__(self, flight: Flight) -> None:
        """Begin at the beginning."""
        self.flight = flight
        self.position = 0
        self.left_behind = False
        """Whether what it has not read yet is gone."""

    async def flown(self) -> Flown:
        """How the fetch ended, for one who reads nothing of it, and so holds nobody up.

        Of what is too large to be held nothing comes, so nobody waits for its end, or is given up for who does.
        """
        flight, self.position = self.flight, sys.maxsize
        flight._wake()  # noqa: SLF001 - a reader is part of its flight
        while not flight._flown.done() and not flight._recorder.full:  # noqa: SLF001
            await flight._moved()  # noqa: SLF001
        if flight._flown.done():  # noqa: SLF001
            return await flight.flown()
        return Flown(Drop.TOO_LARGE, flight._seconds(), flight._ttft_seconds)  # noqa: SLF001

    async def chunks(self) -> AsyncIterator[bytes]:
        """What there is, then what comes, to the end.

        Raises:
            Exception: what the fetch raised, after all that came before it.
        """
        flight = self.flight
        while not self.left_behind and (chunks := await flight._read(self.position)):  # noqa: SLF001 - it is part of it
            self.position += len(chunks)
            flight._wake()  # noqa: SLF001
            yield chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if self.left_behind:
            raise Interrupted("others were waiting for more of the answer")
