"""nearhit's own routes: health, readiness, statistics, metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from proxy import __version__
from proxy.upstream.sharing import Caller, shown_credential
from proxy.web.access import Policy, is_cross_site, refusal
from proxy.web.accesslog import Exchange
from proxy.web.account import Served, known_client, within_limits
from proxy.web.backend import Backend
from proxy.web.clients import CLIENT, Client, Clients, shown_key
from proxy.web.doctor import changing_systems
from proxy.web.errors import error_response
from proxy.web.services import Services
from storage.base import StorageError, Totals

_TOTALS_TIMEOUT_S = 2.0


def why_not_admin(request: web.Request, services: Services, *, shows_text: bool) -> str | None:
    """Why this request may not use an admin route, or None where it may; see `proxy.web.access.refusal`."""
    policy = Policy(services.settings.admin.token, services.local_token)
    client = _client(request, services)
    return refusal(
        policy,
        request.headers,
        request.remote,
        shows_text=shows_text,
        shared=services.backends.shared,
        has_right=client is not None and client.is_admin,
    )


def guarded(serve: Served, *, shows_text: bool = False) -> Served:
    """The handler, for those who may use admin routes."""

    async def handle(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
        why = why_not_admin(request, services, shows_text=shows_text)
        if why is not None:
            return error_response(403, why, "admin_refused", kind="permission_error")
        return await serve(request, services, exchange)

    return handle


ServedTo = Callable[[web.Request, Services, Caller | None], Awaitable[web.StreamResponse]]
"""A handler that is told for whom it acts: a caller inside its namespace, or None for an admin."""


def guarded_or_client(serve: ServedTo) -> Served:
    """The handler, for admins, and for clients of their own inside their namespace."""

    async def handle(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
        why = why_not_admin(request, services, shows_text=True)
        if why is None:
            client = _client(request, services)
            if client is not None:
                request[CLIENT] = client
            return await serve(request, services, None)
        shared = services.backends.shared
        own = not shared and not is_cross_site(request.headers) and shown_credential(request.headers)
        if not own:
            return error_response(403, why, "admin_refused", kind="permission_error")
        if services.clients is not None:
            return await _serve_client(serve, request, services, exchange, services.clients)
        caller = await _accepted(request, services)
        if caller is None:
            return error_response(403, "the upstream does not accept this key", "key_refused", kind="permission_error")
        return await serve(request, services, caller)

    return handle


def _client(request: web.Request, services: Services) -> Client | None:
    """The named client whose key is shown, if any."""
    return services.clients.of(shown_key(request.headers)) if services.clients is not None else None


async def _serve_client(
    serve: ServedTo, request: web.Request, services: Services, exchange: Exchange, clients: Clients
) -> web.StreamResponse:
    client = known_client(request, clients, exchange)
    if isinstance(client, web.Response):
        return client
    return await within_limits(clients, client, lambda: serve(request, services, client.caller), request, exchange)


async def _accepted(request: web.Request, services: Services) -> Caller | None:
    """What a client may do at the first upstream that accepts its key; a key's namespace is the same at all.

    Of several upstreams, only those are asked that the client has shown its key to before.
    """
    for one in services.backends:
        is_known = len(services.backends) == 1 or one.gate.knows(request.headers)
        if is_known and not one.gate.shared and (caller := await one.admit(request.headers)).may_read:
            return caller
    return None


async def healthy(_request: web.Request, _services: Services, _exchange: Exchange) -> web.StreamResponse:
    """The process is up."""
    return web.json_response({"status": "ok", "version": __version__})


async def ready(_request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Whether the start is over; trouble that comes later shows in the body, for answers still flow."""
    limit_passed = time.monotonic() - services.started > services.settings.upstream.connect_timeout_s
    looked = all(one.tracker.looked.is_set() for one in services.backends) or limit_passed
    seeded = {one.name: one.prefixes.readiness() for one in services.backends if one.prefixes is not None}
    is_ready = looked and all(done for done, _ in seeded.values())
    waiting = [reason for done, reason in seeded.values() if not done]
    current = services.backends.first.tracker.current
    body = {
        "status": "ready" if is_ready else "starting",
        "reason": "" if is_ready else "; ".join(waiting) if looked else "waiting for the first look at the upstream",
        "upstream": {"standing": current.standing, "trouble": _trouble(services.backends.first)},
        "upstreams": {one.name: _standing(one) for one in services.backends},
        # Why, with names of files, is for those with admin access.
        "storage": {"standing": "closed" if services.store.trouble else "open"},
    }
    return web.json_response(body, status=200 if is_ready else 503)


def _standing(one: Backend) -> dict[str, Any]:
    identity = one.tracker.current
    prefixes = [one.prefixes.readiness()[1]] if one.prefixes is not None else []
    # Which files, and what is wrong with them, is for those with admin access.
    unread = [f"{len(one.seed_problems)} of prefixes.seeds cannot be read"] if one.seed_problems else []
    told = "; ".join([text for text in prefixes if text] + unread)
    return {"standing": identity.standing, "trouble": _trouble(one), "prefixes": told}


def _trouble(one: Backend) -> str:
    return one.tracker.current.trouble or one.gate.trouble


async def stats(_request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Counters as JSON."""
    totals, near = await _totals(services), services.near
    body: dict[str, Any] = {
        "version": __version__,
        "uptime_s": round(time.monotonic() - services.started, 1),
        "cache.enabled": services.settings.cache.mode != "off",
        "cache.size": totals.entries if totals else None,
        "cache.bytes": totals.bytes if totals else None,
        "cache.max_entries": services.room.max_entries,
        "cache.max_bytes": services.room.max_bytes,
        "cache.trouble": services.store.trouble,
        **services.metrics.summary(),
        "in_flight": services.in_flight,
        "upstream": _upstream(services.backends.first),
        "upstreams": [_upstream(one) for one in services.backends],
        "sharing": _sharing(services),
        "near": {"state": services.near_state, "scheme": f"{near.matcher.scheme & (1 << 64) - 1:016x}" if near else ""},
        "warnings": [f"{finding.what}; {finding.advice}" for finding in await changing_systems(services)],
    }
    return web.json_response(body)


async def metrics(_request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """What Prometheus scrapes."""
    totals = await _totals(services)
    if totals is not None:
        services.metrics.entries.set(totals.entries)
        services.metrics.bytes.set(totals.bytes)
    services.metrics.inflight.set(services.in_flight)
    services.metrics.storage_up.set(not services.store.trouble)
    for one in services.backends:
        services.metrics.upstream_up.labels(one.name).set(one.tracker.current.confirmed)
        services.metrics.prefixes.queue_depth.labels(one.name).set(one.lane.waiting)
    return web.Response(body=await services.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def unknown(_request: web.Request, _services: Services, _exchange: Exchange) -> web.StreamResponse:
    """A path under /-/ that does not exist: it is ours, so it never goes upstream."""
    return error_response(
        404,
        "no such route; /-/stats, /-/entries, /-/export, /-/import, /-/explain, /-/feedback, /-/purge, /-/doctor, "
        "/-/healthy and /-/ready exist",
        "not_found",
    )


def _upstream(one: Backend) -> dict[str, Any]:
    identity = one.tracker.current
    return {
        "name": one.name,
        "url": one.upstream.origin,
        "kind": one.tracker.adapter.kind.value,
        "standing": identity.standing.value,
        "trouble": _trouble(one),
        "fingerprint": (identity.fingerprint or b"").hex()[:16],
        "models": list(identity.models),
        "prefixes": dict(Counter(row.state for row in one.prefixes.listing())) if one.prefixes is not None else {},
        "queue": {"working": one.lane.working, "waiting": one.lane.waiting, "places": one.lane.max_concurrency},
    }


def _sharing(services: Services) -> dict[str, Any]:
    gate, clients = services.backends.first.gate, services.clients
    common = {"setting": gate.sharing.value, "upstream_checks_keys": gate.verdict.value}
    if clients is None:
        return {**common, "namespaces": "shared" if services.backends.shared else "per-credential"}
    told = [
        {"name": one.name, "namespace": one.namespace.hex(), "in_flight": clients.in_flight(one)} for one in clients
    ]
    return {**common, "namespaces": "clients", "clients": told}


async def _totals(services: Services) -> Totals | None:
    try:
        async with asyncio.timeout(_TOTALS_TIMEOUT_S):
            return await services.store.totals()
    except (StorageError, TimeoutError):
        return None
