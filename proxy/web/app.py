"""The composition root: routes, the one middleware, and the life of the services."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.cache.dialects import DIALECTS
from proxy.cache.flight import Interrupted
from proxy.config import Settings
from proxy.upstream.client import UpstreamError
from proxy.web import admin
from proxy.web.accesslog import Exchange
from proxy.web.errors import error_response, upstream_failure
from proxy.web.handlers import EXCHANGE, cacheable, everything_else
from proxy.web.relay import ABSENT
from proxy.web.services import SERVICES, running

log = logging.getLogger("nearhit")

CLIENT_CLOSED = 499
"""What the access log shows for a client that left before its answer; nginx's number."""


def make_app(settings: Settings) -> web.Application:
    """An application that serves one upstream with these settings."""

    async def services(app: web.Application) -> AsyncIterator[None]:
        async with running(settings) as app[SERVICES]:
            yield

    app = web.Application(middlewares=[account], client_max_size=settings.limits.max_request_bytes)
    app.cleanup_ctx.append(services)
    app.on_response_prepare.append(_leave_as_sent)
    for dialect in DIALECTS:
        for path in dialect.paths:
            app.router.add_post(path, cacheable(dialect))
    app.router.add_get("/metrics", admin.metrics)
    app.router.add_get("/-/healthy", admin.healthy)
    app.router.add_get("/-/ready", admin.ready)
    app.router.add_get("/-/stats", admin.guarded(admin.stats))
    app.router.add_route("*", "/-/{path:(?s:.*)}", admin.guarded(admin.unknown))
    app.router.add_route("*", "/{path:(?s:.*)}", everything_else)
    return app


@web.middleware
async def account(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what went wrong into an answer, and note the request in the access log."""
    services = request.app[SERVICES]
    started = time.perf_counter()
    exchange = request[EXCHANGE] = Exchange(request.method, request.path, request.remote or "-", started)
    try:
        response = await _answered(handler, request, exchange)
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


async def _answered(handler: Handler, request: web.Request, exchange: Exchange) -> web.StreamResponse:
    try:
        return await handler(request)
    except (UpstreamError, Interrupted) as error:
        exchange.reason = type(error).__name__
        return upstream_failure(error)
    except web.HTTPException as error:
        return error_response(error.status, error.reason, "http_error")


async def _leave_as_sent(request: web.Request, response: web.StreamResponse) -> None:
    """Take out what aiohttp adds to an answer that only passes through and came without it."""
    for name in request.get(ABSENT, ()):
        response.headers.pop(name, None)
