"""The composition root: routes, and the life of the services."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from proxy.cache.dialects import DIALECTS, EMBEDDINGS
from proxy.settings import Settings
from proxy.web import admin, entries, inspect, models, prefixes, transfer
from proxy.web.account import accounted, for_clients
from proxy.web.batch import BatchTurn
from proxy.web.handlers import cacheable
from proxy.web.passing import everything_else
from proxy.web.relay import ABSENT
from proxy.web.services import SERVICES, running
from proxy.web.stopping import STOPPING, Stopping
from proxy.web.turn import Turn


def make_app(settings: Settings) -> web.Application:
    """An application that serves one upstream with these settings."""

    async def services(app: web.Application) -> AsyncIterator[None]:
        async with running(settings) as app[SERVICES]:
            yield

    app = web.Application(client_max_size=settings.limits.max_request_bytes)
    app.cleanup_ctx.append(services)
    app.cleanup_ctx.append(entries.purges)
    app.cleanup_ctx.append(transfer.exporting)
    app.on_response_prepare.append(_leave_as_sent)
    app[STOPPING] = Stopping()
    for dialect in DIALECTS:
        serve = cacheable(dialect, BatchTurn if dialect is EMBEDDINGS else Turn)
        for path in dialect.paths:
            app.router.add_post(path, accounted(for_clients(serve)))
    app.router.add_get("/metrics", accounted(admin.metrics))
    app.router.add_get("/-/healthy", accounted(admin.healthy))
    app.router.add_get("/-/ready", accounted(admin.ready))
    app.router.add_get("/-/stats", accounted(admin.guarded(admin.stats)))
    app.router.add_get("/-/doctor", accounted(admin.guarded(inspect.doctor)))
    app.router.add_post("/-/explain", accounted(admin.guarded_or_client(inspect.explain)))
    app.router.add_post("/-/feedback", accounted(admin.guarded_or_client(inspect.feedback)))
    app.router.add_get("/-/entries", accounted(admin.guarded(entries.listed, shows_text=True)))
    app.router.add_get("/-/entries/{id}", accounted(admin.guarded(entries.shown, shows_text=True)))
    app.router.add_delete("/-/entries/{id}", accounted(admin.guarded(entries.removed, shows_text=True)))
    app.router.add_post("/-/purge", accounted(admin.guarded(entries.purged, shows_text=True)))
    app.router.add_get("/-/export", accounted(admin.guarded(transfer.exported, shows_text=True)), allow_head=False)
    app.router.add_post("/-/import", accounted(admin.guarded(transfer.imported, shows_text=True)))
    app.router.add_route("*", "/-/{path:(?s:.*)}", accounted(admin.guarded(admin.unknown)))
    for prefix in ("/v1/models", "/models"):
        app.router.add_get(prefix, accounted(for_clients(models.listed)))
        app.router.add_get(prefix + "/{model:.+}", accounted(for_clients(models.shown)))
    for path in (prefixes.ROOT, prefixes.ROOT + "/{path:(?s:.*)}"):
        app.router.add_route("*", path, accounted(for_clients(prefixes.served, or_token=True)))
    app.router.add_route("*", "/{path:(?s:.*)}", accounted(for_clients(everything_else), websockets=True))
    return app


async def _leave_as_sent(request: web.Request, response: web.StreamResponse) -> None:
    """Take out what aiohttp adds to an answer that only passes through and came without it."""
    if not isinstance(response, web.Response) and ABSENT in request:
        for name in request[ABSENT]:
            response.headers.pop(name, None)
