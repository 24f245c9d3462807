"""Requests to cacheable endpoints."""

from __future__ import annotations

import asyncio

from aiohttp import web

from proxy.cache import directives
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Interrupted
from proxy.cache.policy import Outcome
from proxy.upstream.client import UpstreamError
from proxy.web.accesslog import Exchange
from proxy.web.account import Served
from proxy.web.errors import error_response, upstream_failure
from proxy.web.services import Services
from proxy.web.turn import Turn


def cacheable(dialect: Dialect, turn: type[Turn] = Turn) -> Served:
    """The handler of a dialect's endpoints; `turn` answers one request."""

    async def handle(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
        body: bytes | web.Response
        if request.content.is_eof():
            # It came together with its head, as small bodies do: nothing to wait for.
            body = request.content.read_nowait()
            if len(body) > request.client_max_size:
                return _too_large()
        else:
            body = await read_body(request, services.settings.limits.request_timeout_s)
            if isinstance(body, web.Response):
                return body
        try:
            return await turn(request, services, dialect, exchange, body).answer()
        except (UpstreamError, Interrupted) as error:
            return _failed(exchange, error)
        finally:
            if type(exchange.outcome) is Outcome:
                services.metrics.tally.requests[dialect.endpoint, exchange.outcome] += 1

    return handle


def _failed(exchange: Exchange, error: UpstreamError | Interrupted) -> web.Response:
    exchange.reason = type(error).__name__
    response = upstream_failure(error)
    response.headers["X-Cache"] = exchange.outcome
    forwarded = "bypass" if exchange.outcome is Outcome.BYPASS else "miss"
    response.headers["Cache-Status"] = directives.status_forwarded(forwarded)
    return response


async def read_body(request: web.Request, timeout_s: float) -> bytes | web.Response:
    """The whole body, or what to say of one that is too large, too slow or broken."""
    try:
        if (request.content_length or 0) > request.client_max_size:
            return _too_large()
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        return _too_large()
    except TimeoutError:
        return error_response(408, "the request did not arrive within limits.request_timeout_s", "request_timeout")
    except web.RequestPayloadError:
        return error_response(400, "the request body is broken", "broken_body")


def _too_large() -> web.Response:
    return error_response(413, "the request is larger than limits.max_request_bytes", "request_too_large")
