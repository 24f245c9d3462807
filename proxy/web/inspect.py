"""Routes that tell why: explain, feedback, doctor."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, assert_never

from aiohttp import web
from multidict import CIMultiDict

from proxy import __version__
from proxy.cache import directives
from proxy.cache.asking import Asking, Look, Replay
from proxy.cache.controls import FIELD, narrowed, own_field, read_controls, within
from proxy.cache.dialects import DIALECTS, EMBEDDINGS, Call, Dialect, NotCacheable
from proxy.cache.dialects.embeddings import Batch, batch_of
from proxy.cache.explain import told_candidates, told_parts, told_spans, told_words
from proxy.cache.feedback import Removed
from proxy.cache.holdings import NotFound
from proxy.cache.likely import SENT_ALONG, likely_endpoint
from proxy.cache.parts import parts_of
from proxy.cache.policy import Bypass, Drop, Keep, Miss, Outcome, age_s, ttl_s
from proxy.upstream.sharing import Caller
from proxy.web.accesslog import Exchange
from proxy.web.backend import Backend
from proxy.web.batch import told_batch
from proxy.web.clients import CLIENT, Client
from proxy.web.doctor import findings
from proxy.web.errors import error_response
from proxy.web.headers import shown_id
from proxy.web.scope import Scope
from proxy.web.services import Services
from storage.base import StorageError

_STATUS = {NotFound.NO_ID: 400, NotFound.UNKNOWN: 404, NotFound.AMBIGUOUS: 409}
_LOOK_TIMEOUT_S = 5.0


async def doctor(_request: web.Request, services: Services, _exchange: Exchange) -> web.StreamResponse:
    """What is wrong or could be better, with advice."""
    return web.json_response({"version": __version__, "findings": [asdict(f) for f in await findings(services)]})


async def feedback(request: web.Request, services: Services, caller: Caller | None) -> web.StreamResponse:
    """Take a wrong answer out; `caller` bounds it to a namespace, None is an admin."""
    client = request.get(CLIENT)
    if caller is not None and client is not None and not client.may_store:
        message = "this client may change nothing in the cache: somebody with that right must say it"
        return error_response(403, message, "read_only", kind="permission_error")
    asked = await json_object(request)
    if isinstance(asked, web.Response):
        return asked
    shown, verdict = asked.get("id"), asked.get("verdict")
    if not isinstance(shown, str) or verdict != "wrong":
        message = 'send {"id": "...", "verdict": "wrong"} with the id from X-Nearhit-Entry'
        return error_response(400, message, "bad_feedback")
    controls = read_controls(asked[FIELD]) if own_field(asked) else None
    if controls is None and own_field(asked):
        return error_response(400, "the fields of cache cannot be understood", "bad_feedback")
    namespace = None if caller is None else within(caller.namespace, controls)
    try:
        result = await services.feedback.wrong(shown, namespace, services.near)
    except StorageError:
        return error_response(503, "the store cannot be written now; try again", "storage_unavailable")
    if isinstance(result, NotFound):
        return not_found(result)
    return _removed(services, result)


def not_found(why: NotFound) -> web.Response:
    """What to say about an id that leads to no entry."""
    return error_response(_STATUS[why], why.value, "entry_not_found")


def _removed(services: Services, removed: Removed) -> web.Response:
    services.metrics.wrong_by_feedback.inc()
    told = {"id": shown_id(removed.entry.key), "removed": True, "pairs_never_again": removed.pairs}
    return web.json_response({"version": __version__, **told})


async def explain(request: web.Request, services: Services, caller: Caller | None) -> web.StreamResponse:
    """Say what would happen to the request in the body, and why. Nothing is served, fetched or counted."""
    raw = await request.read()
    named, _, query = request.query.get("endpoint", "").partition("?")
    dialect = _dialect(named or likely_endpoint(raw, request.headers))
    if dialect is None:
        known = ", ".join(d.endpoint for d in DIALECTS)
        return error_response(400, f"?endpoint= must be one of {known}", "unknown_endpoint")
    headers, assumed = _as_sent(dialect, request.headers)
    backend, raw = services.backends.of_body(raw)
    call = services.reader.read(dialect, query, headers, raw, hashlib.sha256(raw).digest())
    guessed = [] if named else [f"it is for {dialect.paths[0]}"]
    common = {"version": __version__, "endpoint": dialect.endpoint, "assumed": [*guessed, *assumed]}
    if isinstance(call, NotCacheable):
        if call.reason in (Bypass.NOT_JSON, Bypass.NOT_UNDERSTOOD) and not _is_json_object(raw):
            return error_response(400, "the body is not a JSON object", "not_json")
        return web.json_response({**common, "outcome": Outcome.BYPASS, "reason": call.reason})
    is_client = caller is not None
    client = request.get(CLIENT)
    caller = client.caller if client is not None else await backend.admit(request.headers, dialect.paths[0])
    if is_client and (backend.gate.shared or not caller.may_read):
        message = "the upstream of this model does not accept this key"
        return error_response(403, message, "key_refused", kind="permission_error")
    scope = services.scopes.of(call, request.headers, backend.trust)
    asking = _asking(backend, scope, caller, call, client)
    try:
        async with asyncio.timeout(_LOOK_TIMEOUT_S):
            if dialect is EMBEDDINGS:
                return web.json_response({**common, **await _told_items(backend, scope, batch_of(call, raw), asking)})
            look = await backend.answers.look(dialect, call, asking)
    except TimeoutError:
        return error_response(503, "the store did not answer in time; try again", "storage_unavailable")
    told = await _told(services, backend, scope, call, look if asking.may_store else replace(look, keep=Drop.READ_ONLY))
    parts = parts_of(dialect, query, headers, json.loads(raw))
    if not told["near"].get("candidates"):
        find = services.recent.nearest_elsewhere
        namespace = within(caller.namespace, call.controls)
        told["nearest_call_elsewhere"] = told_spans(await asyncio.to_thread(find, call, namespace, parts))
    told["key"]["parts"] = told_parts(parts)
    return web.json_response({**common, **told})


async def _told_items(backend: Backend, scope: Scope, batch: Batch | NotCacheable, asking: Asking) -> dict[str, Any]:
    if isinstance(batch, NotCacheable):
        return {"outcome": Outcome.BYPASS, "reason": batch.reason}
    look = await backend.batches.look(batch, asking)
    if scope.mode == "off":
        look = replace(look, bypass=Bypass.MODE_OFF)
    return told_batch(batch, look if asking.may_store else replace(look, keep=Drop.READ_ONLY))


async def _told(services: Services, backend: Backend, scope: Scope, call: Call, look: Look) -> dict[str, Any]:
    outcome, reason, entry = _outcome(scope, look)
    identity = backend.tracker.current
    near: dict[str, Any] = {"mode": scope.mode, "state": services.near_state}
    if scope.near is not None:
        near |= {"threshold": scope.near.threshold, "shadow": scope.near.shadow}
    if look.nearest is not None and services.near is not None and call.words is not None:
        near["found_by"] = look.nearest.step
        near["candidates"] = await told_candidates(call.words, look.nearest, services.near)
    return {
        "outcome": outcome,
        "reason": reason,
        "entry": entry,
        "key": {
            "digest": shown_id(look.key),
            "space": shown_id(look.space),
            "upstream": backend.upstream.origin,
            "fingerprint": (identity.fingerprint or b"").hex()[:16],
        },
        "words": await told_words(call.words, services.near),
        "near": near,
        "would_store": _stores(look.keep, call),
    }


def _outcome(scope: Scope, look: Look) -> tuple[str, str, dict[str, Any] | None]:
    if scope.mode == "off":
        return Outcome.BYPASS, Bypass.MODE_OFF, None
    match look.found:
        case Replay(ready, now_ms, near) as found:
            entry = ready.entry
            told = {
                "id": shown_id(entry.key),
                "age_s": age_s(entry, now_ms),
                "ttl_s": ttl_s(entry, now_ms),
                "saved_ms": entry.cost_ms,
            }
            if found.stale:
                return Outcome.STALE, "stale", told
            if near is None:
                return Outcome.HIT, "equal", told
            return Outcome.NEAR, near.verdict.rule, {**told, "score": round(near.score, 4)}
        case Miss() as miss:
            return (Outcome.JOINED, "in-flight", None) if look.in_flight else (Outcome.MISS, miss, None)
        case Bypass() as bypass:
            return Outcome.BYPASS, bypass, None
        case _:
            assert_never(look.found)


def _stores(keep: Keep | Drop, call: Call) -> dict[str, Any]:
    match keep:
        case Keep(ttl_ms, grace_ms):
            grace = {"grace_s": grace_ms // 1000} if grace_ms else {}
            return {
                "ttl_s": ttl_ms // 1000,
                **grace,
                "volatile": call.volatile,
                "for_other_words": call.words is not None,
            }
        case Drop():
            return {"reason": keep, "volatile": call.volatile}
        case _:
            assert_never(keep)


def _asking(backend: Backend, scope: Scope, caller: Caller, call: Call, client: Client | None) -> Asking:
    asked = narrowed(directives.NONE, call.controls)
    if client is not None and not client.uses_cache:
        asked = replace(asked, no_store=True)

    def fetch() -> Any:
        raise AssertionError("explaining fetches nothing")

    return Asking(
        directives=asked,
        near=scope.near,
        ttl_ms=scope.ttl_ms,
        namespace=within(caller.namespace, call.controls),
        may_read=caller.may_read,
        may_lead=caller.may_lead,
        may_store=client is None or client.may_store,
        # Nobody's: explaining is no "try again".
        repeat=secrets.token_bytes(32),
        identities=backend.tracker,
        fetch=fetch,
        usage_from_timings=False,
        drain=False,
        trust=backend.trust,
    )


def _is_json_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _dialect(named: str) -> Dialect | None:
    """The dialect of an endpoint's name, or of a path."""
    return next((dialect for dialect in DIALECTS if dialect.endpoint == named or named in dialect.paths), None)


def _as_sent(dialect: Dialect, headers: Mapping[str, str]) -> tuple[Mapping[str, str], list[str]]:
    """The header fields with those that clients of this dialect always send, and which were missing."""
    missing = {name: value for name, value in SENT_ALONG.get(dialect.endpoint, {}).items() if name not in headers}
    if not missing:
        return headers, []
    complete = CIMultiDict(headers)
    complete.update(missing)
    return complete, [f"it comes with {name}: {value}" for name, value in missing.items()]


async def json_object(request: web.Request) -> dict[str, Any] | web.Response:
    """The object in the body, or what to say where there is none."""
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):
        return error_response(400, "the body is not JSON", "not_json")
    return body if isinstance(body, dict) else error_response(400, "the body is not a JSON object", "not_json")
