"""One request to a cacheable endpoint: look it up, and replay, join, fetch or pass it on."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import assert_never

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache import directives
from proxy.cache.answer import NotUnderstood, Recorded, Wire
from proxy.cache.asking import Asking, Fetching, Refused, Replay, Reply
from proxy.cache.controls import FIELD, narrowed, within, without_controls
from proxy.cache.dialects import CHAT
from proxy.cache.dialects.call import BEHAVIOUR_HEADERS, Call, NotCacheable
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Reader
from proxy.cache.hot import render
from proxy.cache.policy import Bypass, Drop, Miss, Outcome, Tier, age_s, ttl_s
from proxy.cache.ports import Incoming
from proxy.cache.reading import digest_of
from proxy.upstream.client import Outgoing
from proxy.upstream.identity import Identity
from proxy.upstream.sharing import Caller, shown_credential
from proxy.web.accesslog import Exchange
from proxy.web.backend import Backend
from proxy.web.errors import RETRY_AFTER_S, error_response
from proxy.web.exchange import chat_lead, exchange, no_lead
from proxy.web.headers import shown_id, shown_score, to_client, to_follower, to_upstream, to_upstream_cacheable
from proxy.web.journey import Journey
from proxy.web.relay import relay, target_of
from proxy.web.scope import Scope
from proxy.web.services import Services

log = logging.getLogger("nearhit")

_RUN = secrets.token_hex(8)
_serial = itertools.count(1)
_PERSONAL = frozenset({401, 403, 429})
"""What an upstream says to one caller and not to another."""
_UTF8 = frozenset({"", "utf-8", "utf8"})
_NOTHING: Mapping[str, str] = MappingProxyType({})
_CONTROLS = f'"{FIELD}"'.encode()
_READABLE = frozenset({Bypass.RETURN_PROGRESS, Bypass.STORE_TRUE, Bypass.STREAM_OPTIONS})
"""Whoever is passed by for this has sent a JSON object without repeated keys."""
_TYPES = {False: "application/json; charset=utf-8", True: "text/event-stream"}


@dataclass(frozen=True, slots=True)
class _Lent:
    """The tracker, with this caller's credential for the requests that it makes on this caller's behalf."""

    backend: Backend
    headers: Mapping[str, str]

    @property
    def current(self) -> Identity:
        return self.backend.tracker.current

    async def confirm(self) -> Identity:
        # Our own key will do, unless the upstream shows what it runs to callers' keys alone.
        tracker = self.backend.tracker
        lent = self.backend.probe(shown_credential(self.headers)) if tracker.current.locked else None
        return await tracker.confirm(lent)


class Turn:
    """One request to a cacheable endpoint, from its bytes to its answer."""

    __slots__ = ("backend", "body", "dialect", "exchange", "request", "services")

    def __init__(
        self, request: web.Request, services: Services, dialect: Dialect, exchange: Exchange, body: bytes
    ) -> None:
        """`body` is the whole body of `request`; `exchange` is told what became of it."""
        self.request = request
        self.services = services
        self.backend, body = services.backends.of_body(body)
        self.dialect = dialect
        self.exchange = exchange
        self.body = body

    async def answer(self) -> web.StreamResponse:
        """Answer it.

        Raises:
            UpstreamError: nothing was sent to the client yet, and nothing can be.
            Interrupted: nearhit stops.
        """
        headers = self.request.headers
        digest = hashlib.sha256(self.body).digest()
        call = self._read(headers, digest)
        if isinstance(call, NotCacheable):
            if call.reason in _READABLE and _CONTROLS in self.body:
                self.body = without_controls(self.body)
            return await self._bypass(call.reason)
        asked = narrowed(_directives(headers), call.controls)
        if call.controls is not None:
            self.body = without_controls(self.body)
        scope = self.services.scopes.of(call, headers, self.backend.trust)
        if scope.mode == "off":
            return await self._bypass(Bypass.MODE_OFF)
        try:
            reply = self._recall(call, asked) or await self._respond(call, asked, scope, digest)
            body = self._rendered(call, reply) if isinstance(reply, Replay) else b""
        except Exception as error:  # noqa: BLE001 - a fault of ours must not cost the client its answer
            _complain(error)
            return await self._bypass(Bypass.INTERNAL)
        match reply:
            case Replay():
                return await self._replay(call, reply, body)
            case Fetching():
                return await self._follow(call, reply)
            case Refused():
                return self._refused()
            case Bypass():
                return await self._bypass(reply)
            case _:
                assert_never(reply)

    def _recall(self, call: Call, asked: directives.Directives) -> Replay | None:
        backend = self.backend
        anybody = backend.gate.anybody
        if anybody is None:
            return None
        namespace = within(anybody.namespace, call.controls)
        return backend.answers.recall(call, asked, namespace, backend.tracker.current, backend.trust)

    async def _respond(self, call: Call, asked: directives.Directives, scope: Scope, digest: bytes) -> Reply:
        caller = await self._admit(self.request.headers)
        caller = replace(caller, namespace=within(caller.namespace, call.controls))
        return await self.backend.answers.respond(self.dialect, call, self._asking(asked, scope, caller, digest))

    def _rendered(self, call: Call, replay: Replay) -> bytes:
        try:
            wire = replay.ready.wire(stream=call.stream, include_usage=call.include_usage)
        except Exception:
            self.backend.answers.forget(call, replay)
            raise
        return wire.render(self._fresh_id(), int(time.time()))

    def _read(self, headers: Mapping[str, str], digest: bytes) -> Call | NotCacheable:
        services = self.services
        is_off = not services.settings.cache.overrides and services.settings.cache.mode == "off"
        # What is our own in a body does not go upstream, whether or not it has an effect.
        if is_off and _CONTROLS not in self.body:
            return NotCacheable(Bypass.MODE_OFF)
        charset = headers.get("Content-Type", "").lower().partition("charset=")[2].strip('" ')
        if headers.get("Content-Encoding", "identity").lower() != "identity" or charset not in _UTF8:
            return NotCacheable(Bypass.CONTENT_ENCODING)
        query = target_of(self.request).partition("?")[2]
        return services.reader.read(self.dialect, query, headers, self.body, digest)

    async def _admit(self, headers: Mapping[str, str]) -> Caller:
        backend, identity = self.backend, self.backend.tracker.current
        if not identity.confirmed and identity.locked:
            # Nobody but a caller with a key can show us what runs there; the look does not hold up this call.
            backend.tracker.look_soon(backend.probe(shown_credential(headers)))
        if identity.fingerprint is None:
            # This call will pass by the cache: nothing need be asked about its caller.
            return Caller(b"", may_read=False, may_lead=False)
        return await backend.admit(headers)

    def _asking(self, asked: directives.Directives, scope: Scope, caller: Caller, digest: bytes) -> Asking:
        backend = self.backend
        # Callers who share everything are told apart here all the same: a retry is one caller's.
        retries = self.services.settings.cache.retry_window_s > 0
        credential = backend.gate.credential_of(self.request.headers) if retries else b""
        journey = backend.journey()
        return Asking(
            directives=asked,
            near=scope.near,
            ttl_ms=scope.ttl_ms,
            namespace=caller.namespace,
            may_read=caller.may_read,
            may_lead=caller.may_lead,
            repeat=digest_of(credential, self.dialect.endpoint.encode(), digest),
            identities=_Lent(backend, self.request.headers),
            fetch=lambda: self._fetch(to_upstream_cacheable(self.request.headers), journey),
            usage_from_timings=backend.tracker.adapter.capabilities.usage_from_timings,
            drain=backend.drains,
            trust=backend.trust,
            sending=journey,
        )

    @asynccontextmanager
    async def _fetch(self, headers: CIMultiDict[str], journey: Journey) -> AsyncIterator[Incoming]:
        backend, asked = self.backend, self.request.headers
        outgoing = Outgoing("POST", target_of(self.request), headers, self.body)
        client = backend.client(asked, self.request.remote)
        lead_in = chat_lead if self.dialect is CHAT else no_lead
        async with exchange(backend, outgoing, client, journey, lead_in) as response:
            await backend.heard(asked, response.status, generation=True)
            origin = asked.get("Origin")
            if origin is not None and response.status < 300:
                backend.cors.learn(origin, response.headers)
            yield response

    async def _replay(self, call: Call, replay: Replay, body: bytes) -> web.StreamResponse:
        entry, near = replay.ready.entry, replay.near
        tier, outcome = (Tier.EXACT, Outcome.HIT) if near is None else (Tier.NEAR, Outcome.NEAR)
        headers = {
            "Content-Type": _TYPES[call.stream],
            "Cache-Status": directives.status_hit(ttl_s(entry, replay.now_ms), tier),
            "Age": str(age_s(entry, replay.now_ms)),
            "X-Cache": outcome,
            "X-Nearhit-Entry": shown_id(entry.key),
            "X-Nearhit-Score": "1.0" if near is None else shown_score(near.score),
            "X-Nearhit-Saved-Ms": str(entry.cost_ms),
        }
        if near is not None:
            headers["X-Nearhit-Rule"] = self.exchange.reason = near.verdict.rule
        if "Origin" in self.request.headers:
            headers.update(await self._cors())
        self.services.metrics.tally.hit(entry, tier)
        self.exchange.outcome = outcome
        return self._whole(body, headers)

    async def _follow(self, call: Call, fetching: Fetching) -> web.StreamResponse:
        flight = fetching.flight
        if not fetching.joined:
            self.exchange.outcome, self.exchange.reason = Outcome.MISS, fetching.miss
            self.services.metrics.by_miss[fetching.miss].inc()
            self._remember(call, fetching)
            with flight.reader() as reader:
                return await self._relay(
                    reader, directives.status_forwarded(_forward_reason(fetching.miss)), self._told(fetching)
                )
        self.exchange.outcome = Outcome.JOINED
        self.services.metrics.joined.inc()
        with flight.reader() as reader:
            same_form = (flight.stream, flight.include_usage) == (call.stream, call.include_usage)
            status = directives.status_forwarded("miss", collapsed=True)
            failed = (await flight.head()).status
            if failed in _PERSONAL:
                return await self._bypass(Bypass.NOT_SHAREABLE)
            if (flight.stream and same_form) or failed >= 300:
                return await self._relay(reader, status, follower=True)
            flown = await flight.flown()
        wire = self._converted(call, flown.result)
        if wire is not None:
            headers = {"Content-Type": _TYPES[call.stream], "Cache-Status": status, "X-Cache": Outcome.JOINED}
            return self._whole(wire.render(self._fresh_id(), int(time.time())), headers | await self._cors())
        # What the other caller got cannot be put into this one's form: this one asks for itself.
        return await self._bypass(Bypass.NOT_SHAREABLE)

    def _remember(self, call: Call, fetching: Fetching) -> None:
        if fetching.miss is Miss.ABSENT:
            headers = {name: self.request.headers[name] for name in BEHAVIOUR_HEADERS if name in self.request.headers}
            query = target_of(self.request).partition("?")[2]
            self.services.recent.note(call, fetching.namespace, self.dialect, query, headers, self.body)

    def _converted(self, call: Call, result: Recorded | Drop) -> Wire | None:
        if isinstance(result, Drop) or (call.needs_usage and not result.usage_known):
            return None
        try:
            return render(self.dialect, result.body, stream=call.stream, include_usage=call.include_usage)
        except NotUnderstood:
            return None

    def _told(self, fetching: Fetching) -> dict[str, str]:
        """What a miss says of the near tier: the rule that refused, or the hit that was not served."""
        deciding = fetching.nearest.deciding if fetching.nearest else None
        if deciding is None:
            return {}
        told = {"X-Nearhit-Rule": str(deciding.verdict.rule)}
        if fetching.shadow:
            shown = f"{shown_id(deciding.candidate.key)}; score={shown_score(deciding.score)}"
            told["X-Nearhit-Shadow"] = self.exchange.reason = shown
            self.services.metrics.shadow.inc()
        return told

    async def _relay(
        self, reader: Reader, status: str, more: Mapping[str, str] = _NOTHING, *, follower: bool = False
    ) -> web.StreamResponse:
        head = await reader.flight.head()
        headers = to_follower(head.headers) if follower else to_client(head.headers)
        headers.add("Cache-Status", status)
        headers["X-Cache"] = self.exchange.outcome
        headers.update(more)
        if follower:
            headers.update(await self._cors())
        if head.status == 503:
            headers.setdefault("Retry-After", RETRY_AFTER_S)
        return await relay(self.request, self.exchange, head.status, head.reason, headers, reader.chunks())

    async def _bypass(self, reason: Bypass) -> web.StreamResponse:
        if _directives(self.request.headers).only_if_cached:
            return self._refused()
        services, headers = self.services, self.request.headers
        self.exchange.outcome, self.exchange.reason = Outcome.BYPASS, reason
        services.metrics.by_bypass[reason].inc()
        # The body may be shorter than it came.
        passed = to_upstream(headers, drop=frozenset({"content-length"}))
        journey = self.backend.journey()
        flight = self.backend.answers.relay(
            lambda: self._fetch(passed, journey),
            drain=self.backend.drains,
            sending=journey,
            hurries=self.backend.has_queue,
        )
        with flight.reader() as reader:
            return await self._relay(reader, directives.status_forwarded("bypass", detail=reason))

    def _refused(self) -> web.StreamResponse:
        self.exchange.outcome, self.exchange.reason = Outcome.MISS, "only-if-cached"
        headers = {"Cache-Status": directives.status_refused("only-if-cached"), "X-Cache": Outcome.MISS}
        message = "no stored answer, and only-if-cached forbids asking the LLM server"
        return error_response(504, message, "only_if_cached", kind="cache_miss", headers=headers)

    def _whole(self, body: bytes, headers: dict[str, str]) -> web.Response:
        return web.Response(body=body, headers=headers)

    def _fresh_id(self) -> str:
        return f"{self.dialect.id_prefix}{_RUN}{next(_serial):012x}"

    async def _cors(self) -> dict[str, str]:
        origin = self.request.headers.get("Origin")
        if origin is None:
            return {}
        credential = shown_credential(self.request.headers)
        return await self.backend.cors.fields(origin, lambda: self.backend.cors_of_upstream(credential, origin))


def _directives(headers: Mapping[str, str]) -> directives.Directives:
    if "Cache-Control" not in headers and "Pragma" not in headers:
        return directives.NONE
    values = getattr(headers, "getall", None)
    if values is None:
        return directives.NONE
    return directives.parse(values("Cache-Control", ()), values("Pragma", ()))


def _forward_reason(miss: Miss) -> str:
    """RFC 9211's `fwd`."""
    match miss:
        case Miss.NO_CACHE | Miss.TOO_OLD | Miss.TOO_STALE_SOON | Miss.RETRY:
            return "request"
        case Miss.EXPIRED:
            return "stale"
        case Miss.ABSENT | Miss.NO_USAGE | Miss.IN_DOUBT | Miss.UNCONFIRMED | Miss.CLOCK:
            return "miss"
        case _:
            assert_never(miss)


def _complain(error: Exception) -> None:
    # Messages of exceptions may quote what a client wrote: name the kind and the place only.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    log.error(
        "%s at %s:%s while looking up an answer; the call went upstream",
        type(error).__name__,
        frame.filename,
        frame.lineno,
    )
