"""Requests that are passed on as they come: to which upstream, and whether they wait for their turn."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import quote, unquote

from aiohttp import web

from proxy.upstream.client import Outgoing, UpstreamResponse
from proxy.upstream.lane import LaneBusy
from proxy.web.accesslog import Exchange
from proxy.web.backend import Backend
from proxy.web.clients import CLIENT, as_nearhit, is_nobodys
from proxy.web.errors import error_response
from proxy.web.handlers import read_body
from proxy.web.headers import to_client, to_upstream
from proxy.web.journey import Journey
from proxy.web.prefixes import ROOT
from proxy.web.relay import relay, target_of
from proxy.web.services import Services
from proxy.web.websocket import SWITCHING, asks_for_websocket, bridged, is_answered_here, no_websocket, with_upgrade

_LOAD = "/load"
_CHANGES_MODEL = (_LOAD, "/unload")
_LIGHT = frozenset(
    {
        "tokenize",
        "detokenize",
        "apply-template",
        "count_tokens",
        "input_tokens",
        "control",
        "props",
        "lora-adapters",
    }
)
"""The last parts of paths to which posting something makes no model work."""
_MODEL_PATH = re.compile(r"(/v1/models/)([^?]+)")
_MODEL_IN_QUERY = re.compile(r"(?<=[?&]model=)[^&]*")


async def everything_else(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
    """Whatever nearhit does not cache goes upstream untouched and comes back untouched.

    Where there are several upstreams or names for models, the model that it names decides, and its name is put right.

    Raises:
        UpstreamError: before anything was sent to the client.
    """
    if is_answered_here(request) and asks_for_websocket(request):
        return no_websocket()
    if _is_ours_decoded(request):
        message = "nearhit answers /v1/cache itself: spell it with plain slashes"
        return error_response(400, message, "bad_path")
    came = await _whole_body(request, services)
    if isinstance(came, web.Response):
        return came
    backend, target, body = _addressed(request, services, came)
    if services.clients is not None:
        if request.method == "TRACE":
            # The server would show whoever asks what it was sent: nearhit's own key.
            return error_response(405, "TRACE is not passed on", "method_not_allowed")
        if is_nobodys(request, backend):
            # Nobody has been asked for a key: what the URL says beside its path may be one.
            target = target.partition("?")[0]
    dropped = frozenset({"content-length"}) if body != came else frozenset[str]()
    content = body if body is not None else request.content.iter_any() if request.body_exists else None
    headers = as_nearhit(request, backend, to_upstream(request.headers, drop=dropped))
    outgoing = Outgoing(request.method, target, headers, content or None)
    if _occupies(request.method, target) and (backend.drains or backend.has_queue):
        return await _at_its_pace(request, exchange, backend, outgoing)
    if asks_for_websocket(request):
        outgoing = replace(outgoing, headers=with_upgrade(outgoing.headers))
    async with _sent(request, backend, outgoing, backend.journey()) as response:
        if response.status == SWITCHING:
            return await bridged(request, exchange, response, services.settings.limits.shutdown_s)
        answered = to_client(response.headers)
        return await relay(request, exchange, response.status, response.reason, answered, response.chunks())


def _is_ours_decoded(request: web.Request) -> bool:
    # Routes here keep an encoded slash apart; servers that decode it would take the path for their own of that name.
    return f"{unquote(request.rel_url.raw_path)}/".startswith(f"{ROOT}/")


async def _at_its_pace(
    request: web.Request, exchange: Exchange, backend: Backend, outgoing: Outgoing
) -> web.StreamResponse:
    """For servers whose next answer waits for this one: no client that leaves or dawdles is in the way."""
    journey = backend.journey()
    flight = backend.answers.relay(
        lambda: _sent(request, backend, outgoing, journey),
        drain=backend.drains,
        sending=journey,
        hurries=backend.has_queue,
    )
    with flight.reader() as reader:
        head = await flight.head()
        return await relay(request, exchange, head.status, head.reason, to_client(head.headers), reader.chunks())


@asynccontextmanager
async def _sent(
    request: web.Request, backend: Backend, outgoing: Outgoing, journey: Journey
) -> AsyncIterator[UpstreamResponse]:
    if not _occupies(outgoing.method, outgoing.target):
        async with backend.upstream.send(outgoing) as response:
            # A refusal of a request without a key says nothing of ours.
            if not is_nobodys(request, backend):
                await backend.heard(request.headers, response.status, generation=False)
            yield response
        return
    try:
        async with backend.lane.place(_client(request, backend)):
            journey.depart()
            if isinstance(outgoing.body, bytes) and _loads(outgoing.target):
                await backend.make_way(outgoing.target, outgoing.body)
            async with backend.upstream.send(outgoing) as response:
                await backend.heard(request.headers, response.status, generation=False)
                if _ends_with(outgoing.target, _CHANGES_MODEL) and backend.tracker.adapter.capabilities.sends_loaded:
                    # Before anybody asks the new model and is answered by what is known of the old one.
                    await backend.tracker.look()
                yield response
    except LaneBusy as error:
        raise backend.refused(error) from error


def _client(request: web.Request, backend: Backend) -> bytes:
    named = request.get(CLIENT)
    return backend.client(request.headers, request.remote, named.name if named is not None else "")


def _occupies(method: str, target: str) -> bool:
    """Whether a request makes the model work, as far as its path tells; what is unknown does."""
    path = target.partition("?")[0].rstrip("/")
    return method == "POST" and path.rpartition("/")[2] not in _LIGHT and not path.startswith("/slots/")


def _loads(target: str) -> bool:
    """Whether a request has the server load a model, which some servers survive only at the right moment."""
    return _ends_with(target, (_LOAD,))


def _ends_with(target: str, ends: tuple[str, ...]) -> bool:
    return unquote(target.partition("?")[0]).rstrip("/").endswith(ends)


async def _whole_body(request: web.Request, services: Services) -> bytes | web.Response | None:
    """The body where it is there already, or must be looked at; None where it is streamed, or there is none."""
    content, length = request.content, request.content_length
    if content.is_eof() and length is not None:
        # It can be sent again, should a reused connection turn out closed.
        return content.read_nowait()
    is_json = request.content_type == "application/json" and request.body_exists
    names_model = is_json and not services.backends.routing.trivial
    target = target_of(request)
    loads = request.method == "POST" and request.body_exists and _loads(target)
    # Whoever sends slowly must not hold a place meanwhile.
    works = request.body_exists and _occupies(request.method, target)
    waited_for = works and any(one.has_queue or one.drains for one in services.backends)
    if not (names_model or loads or waited_for):
        return None
    return await read_body(request, services.settings.limits.request_timeout_s)


def _addressed(request: web.Request, services: Services, body: bytes | None) -> tuple[Backend, str, bytes | None]:
    """The upstream that a request is for, and its target and body as that one understands them."""
    backends, target = services.backends, target_of(request)
    if backends.routing.trivial:
        return backends.first, target, body
    if body and request.content_type == "application/json":
        backend, body = backends.of_body(body)
        return backend, target, body
    for pattern, name in ((_MODEL_IN_QUERY, request.query.get("model")), (_MODEL_PATH, _model_in_path(target))):
        if name:
            backend, renamed = backends.of_model(name)
            return backend, target if renamed is None else _renamed(pattern, target, renamed), body
    return backends.first, target, body


def _model_in_path(target: str) -> str:
    match = _MODEL_PATH.match(target)
    return unquote(match[2]) if match else ""


def _renamed(pattern: re.Pattern[str], target: str, model: str) -> str:
    shown = quote(model, safe="")
    return pattern.sub(lambda match: match[1] + shown if pattern is _MODEL_PATH else shown, target, count=1)
