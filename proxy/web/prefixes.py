"""`/v1/cache`: the upstreams' prefix caches, in the shapes that RockchipLlama documents, on every kind of upstream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from proxy import __version__
from proxy.upstream.prefix import Hitch
from proxy.upstream.prefix_cache import Created, PrefixCache
from proxy.upstream.prefix_record import encode_name
from proxy.upstream.prefix_table import Source, State
from proxy.upstream.prefix_terms import NotRunning, PrefixRefused
from proxy.upstream.prefix_view import Row
from proxy.web.access import TOKEN_HEADER
from proxy.web.accesslog import Exchange
from proxy.web.admin import why_not_admin
from proxy.web.backend import Backend
from proxy.web.errors import RETRY_AFTER_S
from proxy.web.prefix_request import MOST_BYTES, BadPrefix, Wanted, read_wanted
from proxy.web.services import Services

ROOT = "/v1/cache"

_MIB = 1024 * 1024
_SHOWING = frozenset({"GET", "HEAD"})
_FOR_NOW = frozenset({Hitch.BUSY, Hitch.UNREACHABLE})
_SINGLE_FIRST = ("size_mb", "created_at", "modified_at", "prompt_length", "source")

_Serve = Callable[[web.Request, Services, list[str]], Awaitable[web.StreamResponse]]


async def served(request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Every method on `/v1/cache` and below it.

    The last part of a path is a cache's name, which has no slash, unless the whole path is a model that is known.
    """
    try:
        parts = _parts(request)
    except UnicodeDecodeError:
        return _refused(400, "the path is not valid UTF-8", "bad_path")
    allowed = _allowed(len(parts))
    if request.method not in allowed:
        names = ", ".join(allowed)
        message = f"{request.method} means nothing here; {names} do"
        return _refused(405, message, "method_not_allowed", headers={"Allow": names})
    if request.method in _SHOWING:
        return _shown(request, services, parts)
    why = _why_not_admin(request, services)
    if why is not None:
        return _refused(403, why, "admin_refused", kind="permission_error")
    return await (_create if request.method == "POST" else _remove)(request, services, parts)


def _parts(request: web.Request) -> list[str]:
    """The parts of the path below the root; a slash that is percent-encoded belongs to a part."""
    # The root itself may be spelled with percent signs.
    raw = "/".join(request.rel_url.raw_path.split("/")[ROOT.count("/") + 1 :]).strip("/")
    return [unquote(part, errors="strict") for part in raw.split("/")] if raw else []


def _allowed(parts: int) -> list[str]:
    """The methods for a path of so many parts below the root."""
    return [*(["DELETE"] if parts > 1 else []), "GET", "HEAD", "POST"]


def _why_not_admin(request: web.Request, services: Services) -> str | None:
    # What a prefix begins with can be tried out, and names may tell something.
    return why_not_admin(request, services, shows_text=True)


def _shown(request: web.Request, services: Services, parts: list[str]) -> web.Response:
    """All prefixes, a model's, or one."""
    why = _why_not_admin(request, services)
    if why is not None and (TOKEN_HEADER in request.headers or not services.backends.shared):
        return _refused(403, why, "admin_refused", kind="permission_error")

    def told(one: Backend, row: Row) -> dict[str, Any]:
        return _row(one, row, _path(services, row) if why is None else "")

    whole = "/".join(parts)
    if not parts:
        found: dict[str, list[dict[str, Any]]] = {}
        for one, row in _rows(services):
            found.setdefault(row.model, []).append(told(one, row))
        return _told(object="list", data=found, timestamp=_now())
    if len(parts) == 1 or _is_model(services, whole):
        rows = [told(one, row) for one, row in _of_model(services, whole)]
        return _told(object="list", model=whole, data=rows, count=len(rows), timestamp=_now())
    model, name = "/".join(parts[:-1]), parts[-1]
    for one, row in _of_model(services, model):
        if row.name == name:
            return _single(model, told(one, row))
    return _not_found(name, model)


async def _create(request: web.Request, services: Services, parts: list[str]) -> web.Response:
    """Have a prefix computed now; the answer comes when it is done. No model: whatever the first upstream runs."""
    backend, model = _addressed(services, "/".join(parts))
    prefixes = backend.prefixes
    if prefixes is None:
        return _off()
    wanted = await _wanted(request, services.settings.limits.request_timeout_s)
    if isinstance(wanted, web.Response):
        return wanted
    try:
        async with asyncio.timeout(services.settings.prefixes.seed_timeout_s):
            created = await prefixes.create(wanted.name, wanted.lead, model)
    except NotRunning as error:
        return _not_running(backend, error)
    except PrefixRefused as error:
        return _refused(400, str(error), "prefix_refused")
    except TimeoutError:
        return _later(wanted.name, "it took longer than prefixes.seed_timeout_s")
    return await _creation(prefixes, created)


async def _creation(prefixes: PrefixCache, created: Created) -> web.Response:
    row, hitch = created.row, created.hitch
    if hitch in _FOR_NOW:
        return _later(row.name, row.reason or hitch.value)
    if hitch is not None:
        # What was refused is not in the list afterwards, and not tried again.
        await prefixes.remove(row.name, row.model)
        return _refused(400, f"{row.name!r} was not seeded: {row.reason or hitch.value}", "prefix_refused")
    return _told(
        object="cache.created",
        model=row.model,
        cache_name=row.name,
        size_mb=_mb(row),
        ttft_ms=round(created.seconds * 1000, 1),
        prompt_length=row.chars,
        timestamp=_now(),
        message=_said(row),
        tokens=row.tokens,
        state=row.state,
    )


async def _remove(_request: web.Request, services: Services, parts: list[str]) -> web.Response:
    """Delete a prefix, on every upstream that has one of this name for the model."""
    model, name = "/".join(parts[:-1]), parts[-1]
    if all(one.prefixes is None for one in services.backends):
        return _off()
    found = [(one.prefixes, row) for one, row in _of_model(services, model) if row.name == name]
    gone = [row for cache, row in found if cache is not None and await cache.remove(row.name, row.model)]
    if not gone:
        return _not_found(name, model)
    again = any(row.source == Source.CONFIG for row in gone)
    note = "it is configured, so it is seeded anew: take it out of prefixes.seeds to be rid of it"
    return _told(
        object="cache.deleted",
        model=model,
        cache_name=name,
        deleted=True,
        timestamp=_now(),
        **({"message": note} if again else {}),
    )


async def _wanted(request: web.Request, timeout_s: float) -> Wanted | web.Response:
    try:
        async with asyncio.timeout(timeout_s):
            raw = await _read(request)
    except TimeoutError:
        return _refused(408, "the request did not arrive within limits.request_timeout_s", "request_timeout")
    if raw is None:
        return _refused(413, f"a prompt may have {MOST_BYTES} bytes", "request_too_large")
    try:
        return read_wanted(raw)
    except BadPrefix as bad:
        return _refused(400, str(bad), "bad_prefix")


async def _read(request: web.Request) -> bytes | None:
    """The body; None for one that is too large, which is not read to its end."""
    if (request.content_length or 0) > MOST_BYTES:
        return None
    raw = bytearray()
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > MOST_BYTES:
            return None
    return bytes(raw)


# What there is


def _rows(services: Services) -> list[tuple[Backend, Row]]:
    return [(one, row) for one in services.backends if one.prefixes is not None for row in one.prefixes.listing()]


def _of_model(services: Services, model: str) -> list[tuple[Backend, Row]]:
    """A model's prefixes under any of its names, those of the upstream that serves it first."""
    serving, friendly = _addressed(services, model)
    found = [
        (one, row) for one, row in _rows(services) if row.model == model or (one is serving and row.model == friendly)
    ]
    return sorted(found, key=lambda pair: pair[0] is not serving)


def _addressed(services: Services, model: str) -> tuple[Backend, str]:
    """The upstream that serves a model, and the name that its prefixes go by there; no model: any of the first's."""
    if not model:
        return services.backends.first, ""
    backend, real = services.backends.of_model(model)
    return backend, services.backends.friendly(backend, real or model)


def _is_model(services: Services, name: str) -> bool:
    routing = services.backends.routing
    listed = (model for one in services.backends for model in one.shown.models)
    kept = (row.model for _, row in _rows(services))
    return name in routing.names or name in routing.folders or name in listed or name in kept


# How it is told


def _row(one: Backend, row: Row, path: str) -> dict[str, Any]:
    """RockchipLlama's fields first; times are in seconds since 1970, null for never."""
    return {
        "cache_name": row.name,
        "model_name": row.model,
        "path": path,
        "size_mb": _mb(row),
        "created_at": row.created_at or None,
        "modified_at": row.modified_at or None,
        "prompt_length": row.chars,
        "source": row.source,
        "tokens": row.tokens,
        "state": row.state,
        "reason": row.reason,
        "effective": row.effective,
        "restores": row.restores,
        "tokens_reused": row.tokens_reused,
        "used_at": row.used_at or None,
        "bytes": row.bytes,
        "upstream": one.name,
    }


def _single(model: str, row: Mapping[str, Any]) -> web.Response:
    first = {name: row[name] for name in _SINGLE_FIRST}
    rest = {name: value for name, value in row.items() if name not in first and name != "cache_name"}
    return _told(object="cache", model=model, cache_name=row["cache_name"], **first, timestamp=_now(), **rest)


def _path(services: Services, row: Row) -> str:
    """Where its record is on this machine; empty where there is none."""
    if not (row.created_at and row.model):
        return ""
    return str(services.settings.data / "prefixes" / encode_name(row.model) / f"{encode_name(row.name)}.json")


def _mb(row: Row) -> float:
    return round(row.bytes / _MIB, 5)


def _said(row: Row) -> str:
    """What came of a prefix, in a line."""
    size = f"{row.tokens} tokens" if row.tokens else f"{row.chars} characters"
    kept = f"kept by the server ({_mb(row):.2f} MB)" if row.state == State.SEEDED else f"it is {row.state}"
    reason = f"; {row.reason}" if row.reason else ""
    return f"Prefix of {size} computed; {kept}{reason}"


def _now() -> int:
    return int(time.time())


def _told(**fields: Any) -> web.Response:
    # The command line knows by the version that it is nearhit who answers, not a server with routes of the same name.
    return web.json_response({**fields, "version": __version__})


def _not_found(name: str, model: str) -> web.Response:
    return _refused(404, f"Cache {name!r} not found for model {model!r}", "cache_not_found")


def _not_running(backend: Backend, error: NotRunning) -> web.Response:
    identity = backend.tracker.current
    if identity.confirmed:
        return _refused(400, str(error), "model_not_loaded")
    message = f"{error}; {identity.trouble}" if identity.trouble else str(error)
    return _unavailable(message, "upstream_unavailable")


def _later(name: str, why: str) -> web.Response:
    return _unavailable(
        f"{name!r} is not seeded yet: {why}; it is tried again when the server is idle", "upstream_busy"
    )


def _off() -> web.Response:
    message = "prefixes.mode is off: nearhit leaves the server's prefix cache alone"
    return _refused(503, message, "prefixes_off", kind="unavailable_error")


def _unavailable(message: str, code: str) -> web.Response:
    retry = {"Retry-After": RETRY_AFTER_S}
    return _refused(503, message, code, kind="unavailable_error", headers=retry)


def _refused(
    status: int,
    message: str,
    code: str,
    *,
    kind: str = "invalid_request_error",
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """An error in the shape of OpenAI and, with `detail`, in RockchipLlama's."""
    body = json.dumps({"error": {"message": message, "type": kind, "code": code}, "detail": message})
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)
