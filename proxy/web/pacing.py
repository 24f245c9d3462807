"""Replays that come at the pace of a model, for clients that are written for one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from proxy.cache.answer import Wire, decode_body
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.pieces import pieces
from proxy.web.accesslog import Exchange
from proxy.web.stopping import STOPPING, Stopping

_TICK_S = 0.005
"""The shortest wait: at a high pace, several events go together."""
_EARLY_S = 0.001
"""How much too early a timer may wake us: some count whole milliseconds."""
_END = b"\n\n"

Wait = Callable[[float], Awaitable[bool]]
"""Waits for some seconds; True where there is no more time."""


@dataclass(frozen=True, slots=True)
class InPieces:
    """An answer rendered as a stream of small events, and how many pieces of text it has: about its tokens."""

    wire: Wire
    tokens: int


async def rendered_in_pieces(dialect: Dialect, answer: bytes, *, include_usage: bool) -> InPieces:
    """A stored answer as a stream whose events say about a token each.

    Raises:
        NotUnderstood: it cannot be given as a stream.
    """
    # An event for each token takes some 15 us to make: a long answer would hold up others.
    return await asyncio.to_thread(_rendered, dialect, answer, include_usage)


def _rendered(dialect: Dialect, answer: bytes, include_usage: bool) -> InPieces:
    tokens = 0

    def counted(text: str) -> Sequence[str]:
        nonlocal tokens
        cut = pieces(text)
        tokens += len(cut)
        return cut

    wire = dialect.stream(decode_body(answer), include_usage=include_usage, pieces=counted)
    return InPieces(wire, tokens)


def behind(body: bytes, at: int, events: int) -> int:
    """Where so many further events of a stream end, read from `at` on; each ends with an empty line."""
    for _ in range(events):
        end = body.find(_END, at)
        at = len(body) if end < 0 else end + len(_END)
    return at


@dataclass(frozen=True, slots=True)
class Schedule:
    """When which of so many events is due, spread evenly over so many seconds; the first at once."""

    events: int
    seconds: float

    def due(self, elapsed_s: float) -> int:
        """How many are due by then."""
        reached = elapsed_s + _EARLY_S
        if reached >= self.seconds:
            return self.events
        return min(self.events, int(reached / self.seconds * self.events) + 1)

    def wait_s(self, sent: int, elapsed_s: float) -> float:
        """How long to wait for the next, when so many were sent by then."""
        return max(_TICK_S, sent / self.events * self.seconds - elapsed_s)


async def paced(
    request: web.Request,
    exchange: Exchange,
    headers: Mapping[str, str],
    body: bytes,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Wait | None = None,
) -> web.StreamResponse:
    """Send a rendered stream, its events spread over so many seconds. What is left when nearhit stops goes at once.

    `clock` (seconds) and `wait` are for tests; the usual `wait` ends early when nearhit stops. A client that leaves
    ends it by cancelling the task, as everywhere.
    """
    response = web.StreamResponse(headers=headers)
    exchange.status = response.status
    await response.prepare(request)
    schedule = Schedule(body.count(_END), seconds)
    wait = wait or _until(request.app[STOPPING])
    started, sent, at, hurry = clock(), 0, 0, False
    while sent < schedule.events:
        elapsed = clock() - started
        due = schedule.events if hurry else schedule.due(elapsed)
        # A wake-up that came late finds several due.
        if due > sent:
            start, at = at, behind(body, at, due - sent)
            sent = due
            exchange.sent += at - start
            await response.write(body[start:at])
        else:
            hurry = await wait(schedule.wait_s(sent, elapsed))
    return response


def _until(stopping: Stopping) -> Wait:
    async def wait(seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stopping.wait()
        return stopping.told

    return wait
