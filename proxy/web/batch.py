"""One request for vectors: look up its items, fetch the missing ones, and put the answer together."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, assert_never

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache import directives
from proxy.cache.asking import Refused, Replay
from proxy.cache.batches import BatchLook, Gathering, Known
from proxy.cache.bringing import Ask
from proxy.cache.controls import without_controls
from proxy.cache.dialects.call import NotCacheable
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.dialects.embeddings import Batch, assembled, batch_of, reduced
from proxy.cache.dialects.laying import Part
from proxy.cache.errand import STEP, Broken, Declined, Errand
from proxy.cache.flight import Head, Reader
from proxy.cache.policy import Bypass, Drop, Keep, Miss, Outcome, Tier, age_s, ttl_s
from proxy.cache.ports import Fetch, Sending
from proxy.upstream.client import UpstreamError
from proxy.web.accesslog import Exchange
from proxy.web.errors import complain
from proxy.web.gathering import Collected, Failed, Gatherer, Unfit
from proxy.web.headers import shown_id, to_client, to_upstream_cacheable
from proxy.web.joining import FAILURES
from proxy.web.journey import Journey
from proxy.web.replying import Replying, forward_reason
from proxy.web.services import Services
from proxy.web.turn import Turn

_JSON = "application/json; charset=utf-8"
_ITEMS = "X-Nearhit-Items"
_MOST_TOLD = 100
_OF_ANOTHER_BODY = ("Content-Length", "Content-Encoding", "ETag")
"""What upstreams say of a body that is not sent on."""


class BatchReplying(Replying):
    """Answers one request for vectors in HTTP."""

    __slots__ = ()

    async def reused(self, gathering: Gathering, known: Mapping[int, Known], status: str = "") -> web.StreamResponse:
        """Give what is stored of all items; `status` is the Cache-Status of what stands in for a failed answer."""
        entries = [one.replay.ready.entry for one in known.values()]
        now_ms = gathering.now_ms
        is_stale = bool(status) or any(one.replay.stale for one in known.values())
        self.exchange.outcome = outcome = Outcome.STALE if is_stale else Outcome.HIT
        ttl = min(ttl_s(entry, now_ms) for entry in entries)
        newest = max(known.values(), key=lambda one: one.replay.ready.entry.stored_ms)
        headers = {
            "Content-Type": _JSON,
            "Cache-Status": status or directives.status_hit(ttl, "stale" if is_stale else Tier.EXACT),
            "Age": str(max(age_s(entry, now_ms) for entry in entries)),
            "X-Cache": outcome,
            "X-Nearhit-Score": "1.0",
            "X-Nearhit-Saved-Ms": str(sum(entry.cost_ms for entry in entries)),
        }
        if len(entries) == 1:
            headers["X-Nearhit-Entry"] = shown_id(entries[0].key)
        body = await self._body(gathering.batch, {number: one.part for number, one in known.items()}, newest.part)
        self.count(known)
        return web.Response(body=body, headers=headers | await self._cors())

    async def put_together(
        self, gathering: Gathering, collected: Collected, head: Head | None, status: str
    ) -> web.StreamResponse:
        """Give what is stored and what came just now; `head` is the upstream's, where this caller has asked it."""
        headers: CIMultiDict[str] = CIMultiDict() if head is None else to_client(head.headers)
        for name in _OF_ANOTHER_BODY:
            headers.popall(name, None)
        headers["Content-Type"] = _JSON
        headers.add("Cache-Status", status)
        headers["X-Cache"] = self.exchange.outcome
        if gathering.known:
            headers[_ITEMS] = f"{gathering.places_known}/{len(gathering.batch.order)}"
            saved_ms = sum(one.replay.ready.entry.cost_ms for one in gathering.known.values())
            headers["X-Nearhit-Saved-Ms"] = str(saved_ms)
        if head is None:
            headers.update(await self._cors())
        shell = next(iter(collected.parts.values())) if collected.fresh is None else collected.fresh
        body = await self._body(gathering.batch, collected.parts, shell)
        self.count(gathering.known)
        return web.Response(body=body, headers=headers)

    def count(self, known: Mapping[int, Known]) -> None:
        """Count what came from the cache: each item is an answer."""
        for one in known.values():
            self.services.metrics.tally.hit(one.replay.ready.entry, Tier.EXACT)

    async def _body(self, batch: Batch, parts: Mapping[int, Part], shell: Part) -> bytes:
        ordered = [parts[number] for number in batch.order]
        made = assembled(ordered, shell.shell, batch.form, self._fresh_id(), int(time.time()))
        pieces: list[bytes] = []
        for piece in made:
            pieces.append(piece)
            if len(pieces) % STEP == 0:
                await asyncio.sleep(0)
        return b"".join(pieces)


class BatchTurn(Turn):
    """One request for vectors, from its bytes to its answer."""

    __slots__ = ("reply",)

    def __init__(
        self, request: web.Request, services: Services, dialect: Dialect, exchange: Exchange, body: bytes
    ) -> None:
        """`body` is the whole body of `request`; `exchange` is told what became of it."""
        super().__init__(request, services, dialect, exchange, body)
        self.reply = BatchReplying(request, services, self.backend, dialect, exchange)

    async def answer(self) -> web.StreamResponse:
        """See `Turn`."""
        headers, digest = self.request.headers, hashlib.sha256(self.body).digest()
        call = self._read(headers, digest)
        if isinstance(call, NotCacheable):
            return await super().answer()
        asked = self._asked(headers, call)
        if call.controls is not None:
            self.body = without_controls(self.body)
        scope = self.services.scopes.of(call, headers, self.backend.trust)
        if scope.mode == "off":
            return await self._bypass(Bypass.MODE_OFF)
        try:
            batch = batch_of(call, self.body)
            if isinstance(batch, NotCacheable):
                return await self._bypass(batch.reason)
            asking = await self._asking(asked, scope, batch.call, digest)
            reply = await self.backend.batches.respond(batch, asking, self._dispatch)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not cost the client its answer
            complain(error)
            return await self._bypass(Bypass.INTERNAL)
        match reply:
            case Gathering():
                return await (self._gather(reply) if reply.misses else self.reply.reused(reply, reply.known))
            case Refused():
                return self.reply.refused()
            case Bypass():
                return await self._bypass(reply)
            case _:
                assert_never(reply)

    def _dispatch(self) -> tuple[Ask, Sending]:
        journey = self.backend.journey()

        def ask(places: Sequence[int] | None) -> Fetch:
            part = self
            if places is not None:
                part = copy(self)
                part.body = reduced(self.body, places)
            return part.fetching(journey)

        return ask, journey

    def fetching(self, journey: Journey) -> Fetch:
        """How to send this request's body upstream."""
        return lambda: self._fetch(to_upstream_cacheable(self.request.headers), journey)

    async def _gather(self, gathering: Gathering) -> web.StreamResponse:
        cache = self.services.settings.cache
        self.services.metrics.joined.inc(sum(map(len, gathering.joined.values())))
        self.exchange.outcome = Outcome.JOINED
        gatherer = Gatherer(
            self.backend.batches,
            gathering,
            self._dispatch,
            retries=cache.join_failures == "retry",
            join_timeout_s=cache.join_timeout_s,
        )
        counted: set[Errand] = set()
        with gatherer:
            self._count(gathering, counted)
            passed = await gatherer.passed()
            self._count(gathering, counted)
            if passed is not None:
                failed = await self._failure(gathering, passed)
                if failed is None:
                    return await self.reply.relay(passed, self._status(gathering))
                return await self._failed(gathering, failed)
            ending = await gatherer.collect()
            self._count(gathering, counted)
            if gatherer.alone:
                self.exchange.outcome = Outcome.MISS
            match ending:
                case Collected():
                    asked = [errand for errand in gathering.sent if errand.left]
                    head = await asked[0].flight.head() if asked else None
                    return await self.reply.put_together(gathering, ending, head, self._status(gathering))
                case Failed():
                    return await self._failed(gathering, ending)
                case Unfit():
                    pass
                case _:
                    assert_never(ending)
        return await self._bypass(Bypass.NOT_SHAREABLE)

    def _count(self, gathering: Gathering, counted: set[Errand]) -> None:
        """Count what is known by now of what was sent for, once."""
        metrics = self.services.metrics
        for errand, numbers in gathering.sent.items():
            if errand.left is None or errand in counted:
                continue
            counted.add(errand)
            left = frozenset(errand.left)
            asked = [number for number in numbers if gathering.keys[number] in left]
            metrics.joined.inc(len(numbers) - len(asked))
            for number in asked:
                metrics.by_miss[gathering.misses[number]].inc()
            if asked and self.exchange.outcome is Outcome.JOINED:
                self.exchange.outcome, self.exchange.reason = Outcome.MISS, gathering.misses[asked[0]]

    def _status(self, gathering: Gathering) -> str:
        reasons = {forward_reason(miss) for miss in gathering.misses.values()}
        reason = "partial" if gathering.known else reasons.pop() if len(reasons) == 1 else "miss"
        return directives.status_forwarded(reason, collapsed=self.exchange.outcome is Outcome.JOINED)

    async def _failure(self, gathering: Gathering, reader: Reader) -> Failed | None:
        """How a request that is passed on failed, where stored answers may stand in."""
        if gathering.spares.keys() != gathering.misses.keys():
            return None
        try:
            status = (await reader.flight.head()).status
        except UpstreamError as error:
            return Failed(Broken(error), reader, joined=False)
        return Failed(Declined(status), reader, joined=False) if status in FAILURES else None

    async def _failed(self, gathering: Gathering, failed: Failed) -> web.StreamResponse:
        heard = failed.heard
        status = heard.status if isinstance(heard, Declined) else None
        is_away = isinstance(heard, Broken) and isinstance(heard.error, UpstreamError)
        if gathering.misses.keys() <= gathering.spares.keys() and (is_away or status in FAILURES):
            known = {**gathering.spares, **gathering.known}
            stale = directives.status_stale("partial" if gathering.known else "stale", status)
            return await self.reply.reused(gathering, known, stale)
        if isinstance(heard, Broken):
            raise heard.error
        return await self.reply.relay(failed.reader, self._status(gathering), follower=failed.joined)


def told_batch(batch: Batch, look: BatchLook) -> dict[str, Any]:
    """What explaining tells of a batch: its outcome, and of each item, whether it is known and why not."""
    known = {number: found for number, found in enumerate(look.found) if isinstance(found, Replay)}
    missing = [number for number in range(len(look.found)) if number not in known]
    all_known, all_joined = not missing, bool(missing) and all(number in look.in_flight for number in missing)
    outcome = Outcome.HIT if all_known else Outcome.JOINED if all_joined else Outcome.MISS
    reason = "equal" if all_known else "in-flight" if all_joined else "partial" if known else look.found[missing[0]]
    if look.bypass is not None:
        outcome, reason = Outcome.BYPASS, look.bypass
    places = batch.order[:_MOST_TOLD]
    return {
        "outcome": outcome,
        "reason": reason,
        "items": {
            "asked": len(batch.order),
            "different": len(batch.items),
            "known": sum(number in known for number in batch.order),
            "told": [_told_item(place, number, look) for place, number in enumerate(places)],
        },
        "would_store": _told_keep(look.keep),
    }


def _told_item(place: int, number: int, look: BatchLook) -> dict[str, Any]:
    found = look.found[number]
    told: dict[str, Any] = {"place": place, "key": shown_id(look.keys[number])}
    if isinstance(found, Miss):
        return {**told, "known": False, "reason": "in-flight" if number in look.in_flight else found}
    entry = found.ready.entry
    ages = {"age_s": age_s(entry, found.now_ms), "ttl_s": ttl_s(entry, found.now_ms), "saved_ms": entry.cost_ms}
    return {**told, "known": True, **ages}


def _told_keep(keep: Keep | Drop) -> dict[str, Any]:
    return {"reason": keep} if isinstance(keep, Drop) else {"ttl_s": keep.ttl_ms // 1000}
