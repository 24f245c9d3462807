"""One request on its way upstream: its turn in the queue, its prefix restored, sent again while the server is busy."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from multidict import CIMultiDictProxy

from proxy.upstream.busy import MAX_BODY, Backoff, asked_delay, says_busy
from proxy.upstream.client import Outgoing, UpstreamBusy, UpstreamResponse
from proxy.upstream.evidence import Tail
from proxy.upstream.lane import LaneBusy
from proxy.web.backend import Backend, Boarding
from proxy.web.journey import Journey
from proxy.web.leads import LeadIn

_RNG = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Arriving:
    """A response that is read along; `first` was read of its body already."""

    status: int
    reason: str
    headers: CIMultiDictProxy[str]
    _response: UpstreamResponse
    _tail: Tail
    _first: bytes = b""

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        if self._first:
            yield self._first
        async for chunk in self._response.chunks():
            self._tail.feed(chunk)
            yield chunk


@asynccontextmanager
async def exchange(
    backend: Backend, outgoing: Outgoing, client: bytes, journey: Journey, lead_in: LeadIn, *, learns: bool
) -> AsyncIterator[Arriving]:
    """Send a call for an answer when it is its turn.

    `client` tells callers apart for fairness. `lead_in` finds the lead in the body, which is bytes;
    with `learns`, it may be remembered.

    Raises:
        UpstreamBusy: its turn did not come in time, or too many wait.
        UpstreamError: see `Upstream.send`.
    """
    tail = Tail()
    boarding: Boarding | None = None
    try:
        async with backend.lane.place(client):
            boarding = await backend.board(outgoing, lead_in, learns=learns)
            async with _answered(backend, boarding.outgoing, journey, tail) as arriving:
                yield arriving
    except LaneBusy as error:
        raise backend.refused(error) from error
    finally:
        # An answer that was broken off has taken a slot, too.
        if boarding is not None:
            backend.landed(boarding, tail)


@asynccontextmanager
async def _answered(backend: Backend, outgoing: Outgoing, journey: Journey, tail: Tail) -> AsyncIterator[Arriving]:
    backoff = Backoff(backend.settings.busy_retry_s, _RNG)
    # A server may take its time to say that it is busy.
    until = time.monotonic() + backend.settings.busy_retry_s
    while True:
        journey.depart()
        async with backend.upstream.send(outgoing) as response:
            first = await _beginning(response) if response.status == 503 else b""
            delay = None
            if says_busy(response.status, first) and time.monotonic() < until:
                delay = backoff.next_delay(asked_delay(response.headers.get("Retry-After"), datetime.now(UTC)))
            if delay is None:
                yield Arriving(response.status, response.reason, response.headers, response, tail, first)
                return
        journey.turned_away()
        if journey.deserted:
            # It is drained only once the server has begun.
            raise UpstreamBusy("nobody waits for it any more", 1)
        await asyncio.sleep(delay)


async def _beginning(response: UpstreamResponse) -> bytes:
    """The body of an error, or as much of it as could say anything."""
    content = b""
    async for chunk in response.chunks():
        content += chunk
        if len(content) > MAX_BODY:
            break
    return content
