"""Around every handler: whose request it is, what went wrong becomes an answer, and the access log is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from proxy.cache.flight import Interrupted
from proxy.upstream.client import UpstreamError
from proxy.web.access import TOKEN_HEADER
from proxy.web.accesslog import Exchange, outline
from proxy.web.clients import CLIENT, Client, Clients, is_preflight, shown_key, stands_in
from proxy.web.errors import error_response, upstream_failure
from proxy.web.limits import Limit, Limited
from proxy.web.relay import target_of
from proxy.web.services import SERVICES, Services
from proxy.web.websocket import asks_for_websocket, no_websocket

CLIENT_CLOSED = 499
"""What the access log shows for a client that left before its answer; nginx's number."""

_REFUSED = "REFUSED"
"""The outcome of a request that was not served because of whose it is."""

Served = Callable[[web.Request, Services, Exchange], Awaitable[web.StreamResponse]]
"""A handler that tells in the exchange what became of the request."""


def accounted(serve: Served, *, websockets: bool = False) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler; it refuses WebSockets itself where `serve` knows none.

    It is no middleware, because those cost every hit a chain of calls.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        services = request.app[SERVICES]
        started = time.perf_counter()
        # Never the whole URL, in which a name and a password may stand.
        exchange = Exchange(request.method, target_of(request), request.remote or "-")
        if services.clients is not None and (key := shown_key(request.headers)) and stands_in(key, request.raw_path):
            exchange.target = "/"
        try:
            if "Upgrade" in request.headers and not websockets and asks_for_websocket(request):
                response: web.StreamResponse = no_websocket()
            else:
                response = await serve(request, services, exchange)
        except (UpstreamError, Interrupted, web.HTTPException) as error:
            response = _failed(error)
            exchange.status, exchange.reason = response.status, type(error).__name__
            return response
        except (asyncio.CancelledError, ConnectionError):
            # Cancelled, or hit by it while something was being sent.
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


def for_clients(serve: Served, *, or_token: bool = False) -> Served:
    """The handler; where clients are named, for their requests alone.

    The key comes first: before the body is read, and before upstream or cache are asked. With `or_token`, whoever shows
    an admin token needs none, and the handler checks that token.
    """

    def handle(request: web.Request, services: Services, exchange: Exchange) -> Awaitable[web.StreamResponse]:
        clients = services.clients
        if clients is None or (or_token and TOKEN_HEADER in request.headers):
            return serve(request, services, exchange)
        return of_a_client(request, services, exchange, clients)

    async def of_a_client(
        request: web.Request, services: Services, exchange: Exchange, clients: Clients
    ) -> web.StreamResponse:
        if is_preflight(request):
            exchange.target = _outline(request)
            return await serve(request, services, exchange)
        client = known_client(request, clients, exchange)
        if isinstance(client, web.Response):
            return client
        return await within_limits(clients, client, lambda: serve(request, services, exchange), request, exchange)

    return handle


def known_client(request: web.Request, clients: Clients, exchange: Exchange) -> Client | web.Response:
    """Whose request this is, or what to say of one that is nobody's."""
    key = shown_key(request.headers)
    client = clients.of(key)
    if client is None:
        clients.stranger()
        exchange.target = _outline(request)
        exchange.outcome, exchange.reason = _REFUSED, "invalid_api_key"
        message = "send the API key of a client that is named here, as Authorization: Bearer KEY or as X-Api-Key: KEY"
        return error_response(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    exchange.client = client.name
    if stands_in(key, request.raw_path):
        # It would go upstream and into logs.
        exchange.target, exchange.outcome, exchange.reason = "/", _REFUSED, "key_in_url"
        message = "the API key stands in the URL: send it in its header field only"
        return error_response(400, message, "key_in_url")
    return client


def _outline(request: web.Request) -> str:
    patterns = {resource.canonical for resource in request.app.router.resources()}
    matched = request.match_info.route.resource
    return outline(request.path, matched.canonical if matched is not None else "/{path}", patterns)


async def within_limits(
    clients: Clients,
    client: Client,
    serve: Callable[[], Awaitable[web.StreamResponse]],
    request: web.Request,
    exchange: Exchange,
) -> web.StreamResponse:
    """Serve a client's request within its limits; its place is free again when the answer has been sent or left."""
    limited = clients.enter(client)
    if limited is not None:
        exchange.outcome, exchange.reason = _REFUSED, limited.limit
        return _too_many(limited)
    request[CLIENT] = client
    try:
        return await serve()
    finally:
        clients.leave(client, exchange.outcome)


def _too_many(limited: Limited) -> web.Response:
    message = {
        Limit.CONCURRENCY: "as many requests of this client are being served as it may have at a time",
        Limit.RATE: "this client has sent as many requests as it may in a minute",
    }[limited.limit]
    retry = {"Retry-After": str(limited.retry_after_s)}
    return error_response(429, message, "rate_limit_exceeded", kind="rate_limit_error", headers=retry)


def _failed(error: UpstreamError | Interrupted | web.HTTPException) -> web.Response:
    if isinstance(error, web.HTTPException):
        return error_response(error.status, error.reason, "http_error")
    return upstream_failure(error)
