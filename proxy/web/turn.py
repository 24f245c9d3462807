"""One request to a cacheable endpoint: look it up, and replay, join, fetch or pass it on."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import assert_never

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache import directives
from proxy.cache.asking import Asking, Fetching, Refused, Replay, Reply
from proxy.cache.controls import FIELD, narrowed, within, without_controls
from proxy.cache.dialects.call import BEHAVIOUR_HEADERS, Call, NotCacheable
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Reader
from proxy.cache.policy import Bypass, Miss, Outcome
from proxy.cache.ports import Incoming
from proxy.cache.reading import digest_of
from proxy.upstream.client import Outgoing, UpstreamError
from proxy.upstream.identity import Identity
from proxy.upstream.sharing import Caller, shown_credential
from proxy.web.accesslog import Exchange
from proxy.web.backend import Backend
from proxy.web.clients import CLIENT, Client, as_nearhit, credential_for
from proxy.web.errors import complain
from proxy.web.exchange import exchange
from proxy.web.headers import directives_of, shown_id, shown_score, to_upstream, to_upstream_cacheable
from proxy.web.joining import Alone, Along, Failed, Made, Way, came_from_elsewhere, failure_of, way_of
from proxy.web.journey import Journey
from proxy.web.leads import lead_in, no_lead
from proxy.web.relay import target_of
from proxy.web.replying import Replying, forward_reason
from proxy.web.scope import Scope
from proxy.web.services import Services

_UTF8 = frozenset({"", "utf-8", "utf8"})
_CONTROLS = f'"{FIELD}"'.encode()
_READABLE = frozenset(
    {
        Bypass.RETURN_PROGRESS,
        Bypass.STORE_TRUE,
        Bypass.PREVIOUS_RESPONSE,
        Bypass.CONVERSATION,
        Bypass.BACKGROUND,
        Bypass.STREAM_OPTIONS,
    }
)
"""Whoever is passed by for this has sent a JSON object without repeated keys."""


@dataclass(frozen=True, slots=True)
class _Lent:
    """The tracker, with this caller's credential for the requests that it makes on this caller's behalf."""

    backend: Backend
    credential: Mapping[str, str]

    @property
    def current(self) -> Identity:
        return self.backend.tracker.current

    async def confirm(self) -> Identity:
        # Our own key will do, unless the upstream shows what it runs to callers' keys alone.
        tracker = self.backend.tracker
        lent = self.backend.probe(self.credential) if tracker.current.locked else None
        return await tracker.confirm(lent)


class Turn:
    """One request to a cacheable endpoint, from its bytes to its answer."""

    __slots__ = ("backend", "body", "client", "dialect", "exchange", "replying", "request", "services", "traceless")

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
        # Every hit comes by here, and asking a request costs more than asking the services.
        self.client: Client | None = None if services.clients is None else request.get(CLIENT)
        self.replying = Replying(request, services, self.backend, dialect, exchange)
        self.traceless = False
        """Whether nothing of this request may be remembered."""

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
            # What its controls say was not read.
            self.traceless = _CONTROLS in self.body
            if call.reason in _READABLE and self.traceless:
                self.body = without_controls(self.body)
            return await self._bypass(call.reason)
        asked = self._asked(headers, call)
        if call.controls is not None:
            self.body = without_controls(self.body)
        scope = self.services.scopes.of(call, headers, self.backend.trust)
        if scope.mode == "off":
            return await self._bypass(Bypass.MODE_OFF)
        asking: Asking | None = None
        try:
            reply: Reply | None = self._recall(call, asked)
            if reply is None:
                asking = await self._asking(asked, scope, call, digest)
                reply = await self.backend.answers.respond(self.dialect, call, asking)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not cost the client its answer
            complain(error)
            return await self._bypass(Bypass.INTERNAL)
        return await self._deliver(call, reply, asking)

    async def _deliver(self, call: Call, reply: Reply, asking: Asking | None) -> web.StreamResponse:
        match reply:
            case Replay():
                body = self._rendered(call, reply)
                if body is None:
                    return await self._bypass(Bypass.INTERNAL)
                return await self.replying.replay(call, reply, body)
            case Fetching():
                if reply.joined and asking is not None:
                    return await self._join(call, reply, asking)
                return await self._lead(call, reply)
            case Refused():
                return self.replying.refused()
            case Bypass():
                return await self._bypass(reply)
            case _:
                assert_never(reply)

    def _asked(self, headers: Mapping[str, str], call: Call) -> directives.Directives:
        asked = narrowed(directives_of(headers), call.controls)
        self.traceless = asked.no_store
        if self.client is not None and not self.client.uses_cache:
            return replace(asked, no_store=True)
        return asked

    def _recall(self, call: Call, asked: directives.Directives) -> Replay | None:
        backend = self.backend
        caller = backend.gate.anybody_on(self.request.path) if self.client is None else self.client.caller
        if caller is None:
            return None
        namespace = within(caller.namespace, call.controls)
        return backend.answers.recall(call, asked, namespace, backend.tracker.current, backend.trust)

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
        if self.client is not None:
            return self.client.caller
        if not identity.confirmed and identity.locked:
            # Nobody but a caller with a key can show us what runs there; the look does not hold up this call.
            backend.tracker.look_soon(backend.probe(shown_credential(headers)))
        if identity.fingerprint is None:
            # This call will pass by the cache: nothing need be asked about its caller.
            return Caller(b"", may_read=False, may_lead=False)
        return await backend.admit(headers, self.request.path)

    async def _asking(self, asked: directives.Directives, scope: Scope, call: Call, digest: bytes) -> Asking:
        backend = self.backend
        caller = await self._admit(self.request.headers)
        # Callers who share everything are told apart here all the same: a retry is one caller's.
        retries = self.services.settings.cache.retry_window_s > 0
        credential = backend.gate.credential_of(self.request.headers) if retries else b""
        journey = backend.journey()
        return Asking(
            directives=asked,
            near=scope.near,
            ttl_ms=scope.ttl_ms,
            namespace=within(caller.namespace, call.controls),
            may_read=caller.may_read,
            may_lead=caller.may_lead,
            may_store=self.client is None or self.client.may_store,
            repeat=digest_of(credential, self.dialect.endpoint.encode(), digest),
            identities=_Lent(backend, credential_for(self.request, backend)),
            fetch=lambda: self._fetch(to_upstream_cacheable(self.request.headers), journey),
            usage_from_timings=backend.tracker.adapter.capabilities.usage_from_timings,
            drain=backend.drains,
            trust=backend.trust,
            sending=journey,
            finished=lambda replay: self.replying.finished(call, replay),
        )

    @asynccontextmanager
    async def _fetch(self, headers: CIMultiDict[str], journey: Journey) -> AsyncIterator[Incoming]:
        backend, asked = self.backend, self.request.headers
        passed = as_nearhit(self.request, backend, headers)
        outgoing = Outgoing("POST", target_of(self.request), passed, self.body)
        client = backend.client(asked, self.request.remote, self.client.name if self.client is not None else "")
        # Preparing a call is done with nearhit's own key: for nobody whom the upstream may refuse.
        leading = lead_in(self.dialect.endpoint) if backend.gate.serves(asked) else no_lead
        learns = not self.traceless and (self.client is None or self.client.may_store)
        learns = learns and not directives_of(asked).no_store
        async with exchange(backend, outgoing, client, journey, leading, learns=learns) as response:
            await backend.heard(asked, response.status, generation=True, path=self.request.path)
            origin = asked.get("Origin")
            if origin is not None and response.status < 300:
                backend.cors.learn(origin, response.headers)
            yield response
        if response.status < 300:
            backend.answered(self.request.path, self.body)

    async def _lead(self, call: Call, fetching: Fetching) -> web.StreamResponse:
        self.exchange.outcome, self.exchange.reason = Outcome.MISS, fetching.miss
        with fetching.flight.reader() as reader:
            if await came_from_elsewhere(fetching):
                self.exchange.outcome, self.exchange.reason = Outcome.JOINED, ""
                self.services.metrics.joined.inc()
                status = directives.status_forwarded("miss", collapsed=True)
                return await self.replying.relay(reader, status, follower=True)
            self.services.metrics.by_miss[fetching.miss].inc()
            self._remember(call, fetching)
            if fetching.spare is not None and (failed := await failure_of(fetching.flight)) is not None:
                spare = await self._stand_in(call, fetching.spare, fetching.miss, failed)
                if spare is not None:
                    return spare
            status = directives.status_forwarded(forward_reason(fetching.miss))
            return await self.replying.relay(reader, status, self._told(fetching))

    async def _join(self, call: Call, fetching: Fetching, asking: Asking, *, again: bool = False) -> web.StreamResponse:
        self.exchange.outcome = Outcome.JOINED
        if not again:
            self.services.metrics.joined.inc()
        with fetching.flight.reader() as reader:
            way = await self._way(call, fetching, reader, again=again)
            match way:
                case Along(refit):
                    status = directives.status_forwarded("miss", collapsed=True)
                    return await self.replying.relay(reader, status, follower=True, refit=refit)
                case Made(wire):
                    return await self.replying.joined(call, wire)
                case Failed() if fetching.spare is not None:
                    spare = await self._stand_in(call, fetching.spare, fetching.miss, way)
                    if spare is not None:
                        return spare
                case Failed() | Alone():
                    pass
                case _:
                    assert_never(way)
        failed, waited = isinstance(way, Failed), way is Alone.TOO_LONG
        return await self._ask_alone(call, asking, fetching, failed=failed, waited=waited)

    async def _stand_in(self, call: Call, spare: Replay, miss: Miss, failed: Failed) -> web.StreamResponse | None:
        body = self._rendered(call, spare)
        return None if body is None else await self.replying.stand_in(call, spare, body, miss, failed.status)

    def _rendered(self, call: Call, replay: Replay) -> bytes | None:
        try:
            return self.replying.rendered(call, replay)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not cost the client its answer
            complain(error)
            return None

    async def _ask_alone(
        self, call: Call, asking: Asking, fetching: Fetching, *, failed: bool, waited: bool
    ) -> web.StreamResponse:
        answers = self.backend.answers
        if not failed:
            answers.not_shared(fetching.key)
            if not waited:
                # What the other caller got cannot be put into this one's form: this one asks for itself.
                return await self._bypass(Bypass.NOT_SHAREABLE)
        # This caller asks for the first time still.
        asking = replace(asking, repeat=b"")
        try:
            reply = await answers.respond(self.dialect, call, asking, joins=failed, after=fetching.flight)
        except Exception as error:  # noqa: BLE001 - as above
            complain(error)
            return await self._bypass(Bypass.INTERNAL)
        if isinstance(reply, Fetching) and reply.joined:
            return await self._join(call, reply, asking, again=True)
        return await self._deliver(call, reply, asking)

    async def _way(self, call: Call, fetching: Fetching, reader: Reader, *, again: bool) -> Way:
        cache = self.services.settings.cache
        survives = fetching.spare is not None or (cache.join_failures == "retry" and not again)
        try:
            async with asyncio.timeout(cache.join_timeout_s or None):
                await fetching.flight.head()
            return await way_of(reader, call, self.dialect, self.replying.converted, survives=survives)
        except TimeoutError:
            return Alone.TOO_LONG
        except UpstreamError:
            if not survives:
                raise
            return Failed(None)

    def _remember(self, call: Call, fetching: Fetching) -> None:
        if fetching.miss is Miss.ABSENT:
            headers = {name: self.request.headers[name] for name in BEHAVIOUR_HEADERS if name in self.request.headers}
            query = target_of(self.request).partition("?")[2]
            self.services.recent.note(call, fetching.namespace, self.dialect, query, headers, self.body)

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

    async def _bypass(self, reason: Bypass) -> web.StreamResponse:
        if directives_of(self.request.headers).only_if_cached:
            return self.replying.refused()
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
            return await self.replying.relay(reader, directives.status_forwarded("bypass", detail=reason))
