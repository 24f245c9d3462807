"""nearhit's own routes: health, readiness, statistics, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from proxy import __version__
from proxy.upstream.sharing import Caller, shown_credential
from proxy.web.access import Policy, is_cross_site, refusal
from proxy.web.accesslog import Exchange
from proxy.web.account import Served
from proxy.web.doctor import changing_systems
from proxy.web.errors import error_response
from proxy.web.services import Services
from storage.base import StorageError, Totals

_TOTALS_TIMEOUT_S = 2.0


def guarded(serve: Served, *, shows_text: bool = False) -> Served:
    """The handler, for those who may use admin routes."""

    async def handle(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
        policy = Policy(services.settings.admin.token, services.local_token)
        why = refusal(policy, request.headers, request.remote, shows_text=shows_text, shared=services.gate.shared)
        if why is not None:
            return error_response(403, why, "admin_refused", kind="permission_error")
        return await serve(request, services, exchange)

    return handle


ServedTo = Callable[[web.Request, Services, Caller | None], Awaitable[web.StreamResponse]]
"""A handler that is told for whom it acts: a caller inside its namespace, or None for an admin."""


def guarded_or_client(serve: ServedTo) -> Served:
    """The handler, for admins, and for clients of their own inside their namespace."""

    async def handle(request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
        policy = Policy(services.settings.admin.token, services.local_token)
        shared = services.gate.shared
        why = refusal(policy, request.headers, request.remote, shows_text=True, shared=shared)
        if why is None:
            return await serve(request, services, None)
        own = not shared and not is_cross_site(request.headers) and shown_credential(request.headers)
        if not own:
            return error_response(403, why, "admin_refused", kind="permission_error")
        capabilities = services.tracker.adapter.capabilities
        caller = await services.gate.admit(request.headers, capabilities, away=services.tracker.current.away)
        if not caller.may_read:
            return error_response(403, "the upstream does not accept this key", "key_refused", kind="permission_error")
        return await serve(request, services, caller)

    return handle


async def healthy(_request: web.Request, _services: Services, _exchange: Exchange) -> web.StreamResponse:
    """The process is up."""
    return web.json_response({"status": "ok", "version": __version__})


async def ready(_request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Whether the start is over; trouble that comes later shows in the body, for answers still flow."""
    limit_passed = time.monotonic() - services.started > services.settings.upstream.connect_timeout_s
    is_ready = services.tracker.looked.is_set() or limit_passed
    body = {
        "status": "ready" if is_ready else "starting",
        "reason": "" if is_ready else "waiting for the first look at the upstream",
        "upstream": {"standing": services.tracker.current.standing, "trouble": services.tracker.current.trouble},
        # Why, with names of files, is for those with admin access.
        "storage": {"standing": "closed" if services.store.trouble else "open"},
    }
    return web.json_response(body, status=200 if is_ready else 503)


async def stats(_request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Counters as JSON."""
    totals, near = await _totals(services), services.answers.near
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
        "in_flight": services.answers.in_flight,
        **_upstream(services),
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
    services.metrics.inflight.set(services.answers.in_flight)
    services.metrics.storage_up.set(not services.store.trouble)
    services.metrics.upstream_up.set(services.tracker.current.confirmed)
    return web.Response(body=await services.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def unknown(_request: web.Request, _services: Services, _exchange: Exchange) -> web.StreamResponse:
    """A path under /-/ that does not exist: it is ours, so it never goes upstream."""
    return error_response(
        404,
        "no such route; /-/stats, /-/entries, /-/export, /-/import, /-/explain, /-/feedback, /-/purge, /-/doctor, "
        "/-/healthy and /-/ready exist",
        "not_found",
    )


def _upstream(services: Services) -> dict[str, Any]:
    identity = services.tracker.current
    return {
        "upstream": {
            "url": services.upstream.origin,
            "kind": services.tracker.adapter.kind.value,
            "standing": identity.standing.value,
            "trouble": identity.trouble,
            "fingerprint": (identity.fingerprint or b"").hex()[:16],
            "models": list(identity.models),
        },
        "sharing": {
            "setting": services.gate.sharing.value,
            "namespaces": "shared" if services.gate.shared else "per-credential",
            "upstream_checks_keys": services.gate.verdict.value,
        },
    }


async def _totals(services: Services) -> Totals | None:
    try:
        async with asyncio.timeout(_TOTALS_TIMEOUT_S):
            return await services.store.totals()
    except (StorageError, TimeoutError):
        return None
