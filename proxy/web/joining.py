"""How a caller gets the answer that another caller's request brings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from proxy.cache.answer import Recorded, Wire
from proxy.cache.asking import Fetching
from proxy.cache.dialects.call import Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Flight, Reader
from proxy.cache.policy import Drop
from proxy.cache.recorder import unusable
from proxy.cache.refit import Refit
from proxy.upstream.client import UpstreamError

PERSONAL = frozenset({401, 402, 403, 404, 429})
"""What an upstream says to one caller and not to another."""
FAILURES = frozenset({500, 502, 503, 504})
"""What stale answers stand in for (RFC 5861 section 4)."""


@dataclass(frozen=True, slots=True)
class Along:
    """Byte for byte as it comes, made over where its form differs in usage alone."""

    refit: Refit | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """The finished answer in a form of its own."""

    wire: Wire


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed, with a status of the upstream or none, and something else is to be tried."""

    status: int | None


class Alone(Enum):
    """Not at all: the caller asks for itself."""

    NOT_SHAREABLE = auto()
    TOO_LONG = auto()


Way = Along | Made | Failed | Alone


async def way_of(
    reader: Reader,
    call: Call,
    dialect: Dialect,
    converted: Callable[[Call, Recorded | Drop], Wire | None],
    *,
    survives: bool,
) -> Way:
    """How this call gets the answer that `reader` follows; waits for its head, or its end where the form differs.

    With `survives`, a failure is not the caller's end.

    Raises:
        UpstreamError: the request failed without an answer.
    """
    flight = reader.flight
    head = await flight.head()
    status = head.status
    if status in PERSONAL or 300 <= status < 400:
        # Where a redirection leads may be one caller's own, and says nothing without it.
        return Alone.NOT_SHAREABLE
    if status in FAILURES and survives:
        return Failed(status)
    if status >= 300:
        return Along()
    # What an answer repeats of its own call is not another caller's to see.
    live = flight.stream and call.stream and flight.echoed == call.echoed
    if live and (not dialect.usage_on_request or flight.include_usage == call.include_usage):
        return Along()
    if unusable(status, head.headers) is not None:
        # What is encoded is passed on as it is, or not at all.
        return Alone.NOT_SHAREABLE
    if live:
        return Along(Refit(wants_usage=call.include_usage))
    flown = await reader.flown()
    if flight.error is not None:
        raise flight.error
    wire = converted(call, flown.result)
    return Alone.NOT_SHAREABLE if wire is None else Made(wire)


async def came_from_elsewhere(fetching: Fetching) -> bool:
    """Whether another process fetched it; waits for that where it may be."""
    if fetching.leased is None:
        return False
    with suppress(UpstreamError):
        await fetching.flight.head()
    return fetching.leased.collapsed


async def failure_of(flight: Flight) -> Failed | None:
    """How a fetch failed before anything of an answer came; None where it did not."""
    try:
        head = await flight.head()
    except UpstreamError:
        return Failed(None)
    return Failed(head.status) if head.status in FAILURES else None
