"""Bytes from upstream to the client, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache.flight import Interrupted
from proxy.upstream.client import Outgoing, Upstream, UpstreamError, UpstreamResponse
from proxy.web.accesslog import Exchange
from proxy.web.headers import to_client


async def relay(
    request: web.Request,
    exchange: Exchange,
    status: int,
    reason: str | None,
    headers: CIMultiDict[str],
    chunks: AsyncIterator[bytes],
) -> web.StreamResponse:
    """Send a response whose body is still coming. If it breaks off, so does the client's connection: as without us."""
    response = web.StreamResponse(status=status, reason=reason, headers=headers)
    exchange.status = status
    try:
        await response.prepare(request)
        async for chunk in chunks:
            exchange.sent += len(chunk)
            await response.write(chunk)
    except (UpstreamError, Interrupted) as error:
        exchange.reason = type(error).__name__
        # Without the closing bytes of a chunked body the client sees that the answer is not whole.
        if request.transport is not None:
            request.transport.close()
    return response


async def pass_through(
    request: web.Request, exchange: Exchange, upstream: Upstream, outgoing: Outgoing, added: dict[str, str]
) -> tuple[web.StreamResponse, UpstreamResponse]:
    """Send a request upstream and its response back, with `added` header fields.

    Raises:
        UpstreamError: before anything was sent to the client.
    """
    async with upstream.send(outgoing) as response:
        headers = to_client(response.headers)
        for name, value in added.items():
            headers.add(name, value)
        relayed = await relay(request, exchange, response.status, response.reason, headers, response.chunks())
        return relayed, response
