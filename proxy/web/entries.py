"""Routes that show what is stored and take it out: entries, purge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from proxy import __version__
from proxy.cache.answer import decode_body
from proxy.cache.holdings import NotFound, Unfinished
from proxy.cache.policy import age_s, ttl_s
from proxy.cache.selection import BadSelection, Listing, Purging, read_listing, read_purging
from proxy.web.accesslog import Exchange
from proxy.web.clock import now_ms
from proxy.web.errors import error_response
from proxy.web.inspect import json_object, not_found
from proxy.web.services import Services
from storage.base import Entry, StorageError
from storage.listing import Listed, Which

_PURGED = "purged"
_SHOWN_WORDS = 500
"""Characters of the words that a list shows; a single entry is shown with all."""

_PURGES = web.AppKey("purges", set[asyncio.Task[int]])


async def purges(app: web.Application) -> AsyncIterator[None]:
    """Purges under way, which outlive their requests but not the application."""
    app[_PURGES] = set()
    yield
    for task in app[_PURGES]:
        task.cancel()
    await asyncio.gather(*app[_PURGES], return_exceptions=True)


async def listed(request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """A part of the list of entries, and where to go on."""
    try:
        asked = read_listing(request.query.items(), now_ms())
        page = await services.holdings.page(asked)
    except BadSelection as bad:
        return error_response(400, str(bad), "bad_selection")
    except StorageError:
        return _unavailable("the store does not answer; try again")
    now = now_ms()
    body = {"entries": [_in_list(one, now) for one in page.listed], "next": page.mark, "complete": page.mark is None}
    return web.json_response({"version": __version__, **body})


async def shown(request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """One entry, its answer included."""
    try:
        entry = await services.holdings.find(request.match_info["id"])
        if isinstance(entry, NotFound):
            return not_found(entry)
        known = Which(key_prefix=entry.key.hex())
        page = await services.holdings.page(Listing(known, limit=1, mark=0, newest_first=True))
    except StorageError:
        return _unavailable("the store does not answer; try again")
    one = page.listed[0] if page.listed else None
    answer, note = await asyncio.to_thread(_answer, entry)
    told = {
        **_in_full(entry, len(entry.answer), now_ms()),
        "hits": one.hits if one else None,
        "used": _used(one) if one else None,
        "answer": answer,
        **({"answer_note": note} if note else {}),
    }
    return web.json_response({"version": __version__, **told})


async def removed(request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Remove one entry."""
    holdings = services.holdings
    try:
        entry = await holdings.find(request.match_info["id"], in_memory=True)
        if isinstance(entry, NotFound):
            return not_found(entry)
        await holdings.remove([entry.key])
    except StorageError:
        return _unavailable("the store cannot be written now, so nothing was removed; try again")
    services.metrics.removed(_PURGED, 1)
    return web.json_response({"version": __version__, "id": entry.key.hex(), "removed": True})


async def purged(request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """Remove all entries that meet conditions, or tell what would go."""
    body = await json_object(request)
    if isinstance(body, web.Response):
        return body
    try:
        asked = read_purging(body, now_ms())
    except BadSelection as bad:
        return error_response(400, str(bad), "bad_selection")
    return await (_would_purge(services, asked) if asked.dry_run else _purge(request.app, services, asked))


async def _would_purge(services: Services, asked: Purging) -> web.Response:
    try:
        doomed = await services.holdings.would_purge(asked.which)
    except StorageError:
        return _unavailable("the store does not answer; try again")
    examples = [{"id": one.entry.key.hex(), "words": _words(one.entry)} for one in doomed.examples]
    told = {"would_remove": doomed.count, "bytes": doomed.size, "examples": examples}
    return web.json_response({"version": __version__, **told})


async def _purge(app: web.Application, services: Services, asked: Purging) -> web.Response:
    def gone(count: int) -> None:
        services.metrics.removed(_PURGED, count)

    # It goes on when whoever asked leaves: half a purge is nothing that anybody wants.
    task = asyncio.create_task(services.holdings.purge(asked.which, gone), name="nearhit-purge")
    app[_PURGES].add(task)
    task.add_done_callback(app[_PURGES].discard)
    task.add_done_callback(_retrieve)
    try:
        count = await asyncio.shield(task)
    except Unfinished as failure:
        return _unavailable(f"the store failed; {failure.removed} entries were removed and stay so; try again")
    return web.json_response({"version": __version__, "removed": count})


def _retrieve(task: asyncio.Task[int]) -> None:
    # Else asyncio reports an error that nobody waits for any more as never retrieved.
    if not task.cancelled():
        task.exception()


def _unavailable(message: str) -> web.Response:
    return error_response(503, message, "storage_unavailable", kind="unavailable_error")


def _in_list(one: Listed, now: int) -> dict[str, Any]:
    full = _in_full(one.entry, one.size, now)
    for name in ("space", "upstream", "usage_known", "grace_s"):
        del full[name]
    return {"mark": one.mark, **full, "words": _words(one.entry), "hits": one.hits, "used": _used(one)}


def _in_full(entry: Entry, size: int, now: int) -> dict[str, Any]:
    return {
        "id": entry.key.hex(),
        "model": entry.model,
        "endpoint": entry.endpoint,
        "namespace": entry.namespace.hex(),
        "space": entry.space.hex(),
        "upstream": entry.upstream,
        "fingerprint": entry.fingerprint.hex(),
        "words": entry.words,
        "near": entry.near,
        "sealed": entry.sealed,
        "stored": _time(entry.stored_ms),
        "age_s": age_s(entry, now),
        "ttl_s": ttl_s(entry, now),
        "grace_s": entry.grace_ms // 1000,
        "cost_ms": entry.cost_ms,
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "usage_known": entry.usage_known,
        "answer_bytes": size,
    }


def _words(entry: Entry) -> str | None:
    return None if entry.words is None else entry.words[:_SHOWN_WORDS]


def _used(one: Listed) -> str | None:
    return _time(one.used_ms) if one.hits else None


def _time(ms: int) -> str | None:
    """RFC 3339; None for what no calendar has, which a clock gone mad may have written."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return None


def _answer(entry: Entry) -> tuple[Any, str]:
    """The answer in the form of its endpoint, else None and why there is nothing to show."""
    if entry.sealed:
        return None, "the answer is sealed: only the request that it belongs to can open it"
    try:
        return decode_body(entry.answer), ""
    except (ValueError, RecursionError):
        return None, "the answer cannot be read"
