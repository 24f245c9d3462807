"""Bytes from upstream to the client, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache.flight import Interrupted
from proxy.upstream.client import UpstreamError, UpstreamGarbled
from proxy.web.accesslog import Exchange

ABSENT = web.RequestKey("absent", list[str])
"""Header fields that the upstream's response did not have."""

_ADDED = ("Content-Type", "Date", "Server")
"""What aiohttp adds to every response."""


async def relay(
    request: web.Request,
    exchange: Exchange,
    status: int,
    reason: str | None,
    headers: CIMultiDict[str],
    chunks: AsyncIterator[bytes],
) -> web.StreamResponse:
    """Send a response whose body is still coming. If it breaks off, so does the client's connection: as without us."""
    request[ABSENT] = [name for name in _ADDED if name not in headers]
    response = web.StreamResponse(status=status, reason=reason, headers=headers)
    exchange.status = status
    try:
        await response.prepare(request)
    except ValueError as error:
        raise UpstreamGarbled("a header field that cannot be sent on") from error
    try:
        async for chunk in chunks:
            exchange.sent += len(chunk)
            await response.write(chunk)
    except (UpstreamError, Interrupted) as error:
        exchange.reason = type(error).__name__
        # Without the closing bytes of a chunked body the client sees that the answer is not whole.
        if request.transport is not None:
            request.transport.close()
    return response


def target_of(request: web.Request) -> str:
    """Path and query as they go on the wire."""
    target = request.raw_path
    # A proxy may be sent the whole URL (RFC 9112 section 3.2.2).
    return target if target.startswith("/") else request.rel_url.raw_path_qs
