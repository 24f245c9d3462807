"""How the answer to a call goes out: from the cache, along with an upstream's, or not at all."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from types import MappingProxyType
from typing import assert_never

from aiohttp import web

from proxy.cache import directives
from proxy.cache.answer import Recorded, Wire
from proxy.cache.asking import Replay
from proxy.cache.dialects.call import Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Reader
from proxy.cache.hot import render
from proxy.cache.leasing import Finished
from proxy.cache.policy import Drop, Miss, Outcome, Tier, age_s, ttl_s
from proxy.cache.refit import Refit
from proxy.web.accesslog import Exchange
from proxy.web.backend import Backend
from proxy.web.clients import credential_for
from proxy.web.errors import RETRY_AFTER_S, complain, error_response
from proxy.web.headers import shown_id, shown_score, to_client, to_follower
from proxy.web.pacing import paced, rendered_in_pieces
from proxy.web.relay import relay
from proxy.web.services import Services

_RUN = secrets.token_hex(8)
_serial = itertools.count(1)
NOTHING: Mapping[str, str] = MappingProxyType({})
_TYPES = {False: "application/json; charset=utf-8", True: "text/event-stream"}


class Replying:
    """Answers one request in HTTP."""

    __slots__ = ("backend", "dialect", "exchange", "request", "services")

    def __init__(
        self, request: web.Request, services: Services, backend: Backend, dialect: Dialect, exchange: Exchange
    ) -> None:
        """`exchange` is told what became of `request`."""
        self.request = request
        self.services = services
        self.backend = backend
        self.dialect = dialect
        self.exchange = exchange

    def rendered(self, call: Call, replay: Replay) -> bytes:
        """A stored answer in the form of this call.

        Raises:
            Exception: it is unreadable, and has been removed.
        """
        try:
            wire = replay.ready.wire(stream=call.stream, include_usage=call.include_usage)
        except Exception:
            self.backend.answers.forget(replay)
            raise
        return wire.render(self._fresh_id(), int(time.time()))

    def finished(self, call: Call, replay: Replay) -> Finished:
        """An answer that another process fetched, as the upstream's response to this call.

        Raises:
            Exception: see `rendered`.
        """
        return Finished({"Content-Type": _TYPES[call.stream]}, self.rendered(call, replay))

    def replay(self, call: Call, replay: Replay, body: bytes) -> Awaitable[web.StreamResponse]:
        """Give an answer from the cache."""
        entry, near = replay.ready.entry, replay.near
        tier, outcome = (Tier.EXACT, Outcome.HIT) if near is None else (Tier.NEAR, Outcome.NEAR)
        detail: str = tier
        if replay.stale:
            outcome, detail = Outcome.STALE, "stale"
        status = directives.status_hit(ttl_s(entry, replay.now_ms), detail)
        return self._reused(call, replay, body, tier, outcome, status)

    def stand_in(
        self, call: Call, spare: Replay, body: bytes, miss: Miss, failed_with: int | None
    ) -> Awaitable[web.StreamResponse]:
        """Give a stored answer for want of the one that was asked for."""
        status = directives.status_stale(forward_reason(miss), failed_with)
        return self._reused(call, spare, body, Tier.EXACT, Outcome.STALE, status)

    async def _reused(
        self, call: Call, replay: Replay, body: bytes, tier: Tier, outcome: Outcome, status: str
    ) -> web.StreamResponse:
        entry, near = replay.ready.entry, replay.near
        headers = {
            "Content-Type": _TYPES[call.stream],
            "Cache-Status": status,
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
        if call.stream and (pace := self.services.settings.cache.replay_tokens_per_second):
            spoken = await rendered_in_pieces(self.dialect, entry.answer, include_usage=call.include_usage)
            body = spoken.wire.render(self._fresh_id(), int(time.time()))
            return await paced(self.request, self.exchange, headers, body, spoken.tokens / pace)
        return web.Response(body=body, headers=headers)

    def converted(self, call: Call, result: Recorded | Drop) -> Wire | None:
        """What another caller got, in the form of this call; None where that cannot be."""
        if isinstance(result, Drop) or (call.needs_usage and not result.usage_known):
            return None
        try:
            return render(self.dialect, result.body, stream=call.stream, include_usage=call.include_usage)
        except Exception as error:  # noqa: BLE001 - whatever an upstream sent, it must not cost another its answer
            complain(error)
            return None

    async def joined(self, call: Call, wire: Wire) -> web.StreamResponse:
        """Give what another caller got, in a form of its own."""
        status = directives.status_forwarded("miss", collapsed=True)
        headers = {"Content-Type": _TYPES[call.stream], "Cache-Status": status, "X-Cache": Outcome.JOINED}
        body = wire.render(self._fresh_id(), int(time.time()))
        return web.Response(body=body, headers=headers | await self._cors())

    async def relay(
        self,
        reader: Reader,
        status: str,
        more: Mapping[str, str] = NOTHING,
        *,
        follower: bool = False,
        refit: Refit | None = None,
    ) -> web.StreamResponse:
        """Pass on what a flight brings, as it comes; `refit` makes it over for a `follower` of another form.

        Raises:
            UpstreamError: nothing came.
        """
        head = await reader.flight.head()
        headers = to_follower(head.headers) if follower else to_client(head.headers)
        headers.add("Cache-Status", status)
        headers["X-Cache"] = self.exchange.outcome
        headers.update(more)
        if follower:
            headers.update(await self._cors())
        if head.status == 503:
            headers.setdefault("Retry-After", RETRY_AFTER_S)
        chunks = reader.chunks() if refit is None else _refitted(reader, refit)
        return await relay(self.request, self.exchange, head.status, head.reason, headers, chunks)

    def refused(self) -> web.StreamResponse:
        """Say that there is no stored answer, to who wants no other."""
        self.exchange.outcome, self.exchange.reason = Outcome.MISS, "only-if-cached"
        headers = {"Cache-Status": directives.status_refused("only-if-cached"), "X-Cache": Outcome.MISS}
        message = "no stored answer, and only-if-cached forbids asking the LLM server"
        return error_response(504, message, "only_if_cached", kind="cache_miss", headers=headers)

    def _fresh_id(self) -> str:
        return f"{self.dialect.id_prefix}{_RUN}{next(_serial):012x}"

    async def _cors(self) -> dict[str, str]:
        origin = self.request.headers.get("Origin")
        if origin is None:
            return {}
        credential = credential_for(self.request, self.backend)
        return await self.backend.cors.fields(origin, lambda: self.backend.cors_of_upstream(credential, origin))


async def _refitted(reader: Reader, refit: Refit) -> AsyncIterator[bytes]:
    async for chunk in reader.chunks():
        if made_over := refit.feed(chunk):
            yield made_over
    if rest := refit.end():
        yield rest


def forward_reason(miss: Miss) -> str:
    """RFC 9211's `fwd` for a call that was not answered from the cache."""
    match miss:
        case Miss.NO_CACHE | Miss.TOO_OLD | Miss.TOO_STALE_SOON | Miss.RETRY:
            return "request"
        case Miss.EXPIRED:
            return "stale"
        case Miss.ABSENT | Miss.NO_USAGE | Miss.IN_DOUBT | Miss.UNCONFIRMED | Miss.CLOCK:
            return "miss"
        case _:
            assert_never(miss)
