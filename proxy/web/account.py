"""Around every handler: what went wrong becomes an answer, and the request is noted in the access log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from proxy.cache.flight import Interrupted
from proxy.upstream.client import UpstreamError
from proxy.web.accesslog import Exchange
from proxy.web.errors import error_response, upstream_failure
from proxy.web.services import SERVICES, Services

CLIENT_CLOSED = 499
"""What the access log shows for a client that left before its answer; nginx's number."""

Served = Callable[[web.Request, Services, Exchange], Awaitable[web.StreamResponse]]
"""A handler that tells in the exchange what became of the request."""


def accounted(serve: Served) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler. It is no middleware, because those cost every hit a chain of calls."""

    async def handle(request: web.Request) -> web.StreamResponse:
        services = request.app[SERVICES]
        started = time.perf_counter()
        exchange = Exchange(request.method, request.raw_path, request.remote or "-")
        try:
            response = await serve(request, services, exchange)
        except (UpstreamError, Interrupted, web.HTTPException) as error:
            response = _failed(error)
            exchange.status, exchange.reason = response.status, type(error).__name__
            return response
        except asyncio.CancelledError:
            exchange.status = CLIENT_CLOSED
            raise
        except Exception:
            exchange.status = 500
            raise
        else:
            exchange.status = response.status
            if isinstance(response, web.Response) and isinstance(response.body, bytes):
                exchange.sent = len(response.body)
            return response
        finally:
            if services.settings.log.access:
                exchange.seconds = time.perf_counter() - started
                services.access.add(exchange)

    return handle


def _failed(error: UpstreamError | Interrupted | web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPException):
        return error_response(error.status, error.reason, "http_error")
    return upstream_failure(error)
