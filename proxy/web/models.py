"""`/v1/models` where nearhit has several upstreams or names of its own: one list of all of them."""

from __future__ import annotations

import json
import time
from typing import Any

from aiohttp import web

from proxy.upstream.adapter import Probe, Reply
from proxy.upstream.routing import Routing
from proxy.web.accesslog import Exchange
from proxy.web.backend import Backend
from proxy.web.clients import CLIENT, credential_for
from proxy.web.errors import error_response
from proxy.web.passing import everything_else
from proxy.web.services import Services

_TIMEOUT_S = 5.0
_OWNER = "nearhit"


async def listed(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
    """The first upstream's models as it lists them to this caller, those known of the others, and names for models.

    Nobody's key is shown to an upstream that it was not meant for, and nobody waits for one that is slow.
    """
    if services.backends.routing.trivial:
        return await everything_else(request, services, exchange)
    first = services.backends.first
    reply = await Probe(first.upstream, credential_for(request, first), _TIMEOUT_S).get("/v1/models")
    told = _data(reply)
    refused = not _may_know(request, first) and reply is not None and reply.status in (401, 403)
    listed: dict[str, Any] = {} if refused else {name: _own(name) for name in _names(services)}
    for model in told:
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            listed.setdefault(model["id"], model)
    for one in services.backends:
        if (one is not first or not told) and _may_know(request, one):
            for name in one.tracker.current.models:
                listed.setdefault(name, {"id": name, "object": "model", "created": 0, "owned_by": one.name})
    if not listed:
        return _refused(reply)
    return web.json_response({"object": "list", "data": list(listed.values())})


def _may_know(request: web.Request, one: Backend) -> bool:
    # What nearhit's own key, or one that it was lent, was shown is not for everybody.
    public = not one.settings.api_key and not one.tracker.current.locked
    return public or CLIENT in request or one.gate.open or one.gate.knows(request.headers)


async def shown(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
    """One model: a name of the operator's, or what the upstream that serves it says."""
    routing = services.backends.routing
    name = request.match_info["model"]
    if routing.trivial or name not in _names(services):
        return await everything_else(request, services, exchange)
    return web.json_response(_own(name))


def _names(services: Services) -> list[str]:
    """The names that lead to a model now: those of folders whose model no upstream has do not."""
    routing: Routing = services.backends.routing
    led = (name for name in routing.folders if services.backends.of_model(name)[1] is not None)
    return list(dict.fromkeys([*routing.names, *led]))


def _own(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": _OWNER}


def _data(reply: Reply | None) -> list[Any]:
    body = reply.json if reply is not None and reply.status == 200 else None
    data = body.get("data") if isinstance(body, dict) else None
    return data if isinstance(data, list) else []


def _refused(reply: Reply | None) -> web.Response:
    """What to say where nothing is known: the error that the first upstream gave, if it gave one."""
    if reply is not None and reply.status >= 400 and reply.json is not None:
        return web.Response(status=reply.status, text=json.dumps(reply.json), content_type="application/json")
    message = "no LLM server lists its models: are they running, and are upstream.url and upstreams right?"
    return error_response(502, message, "upstream_unreachable", kind="server_error")
