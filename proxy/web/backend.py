"""One upstream with everything that belongs to it, opened and closed together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from multidict import CIMultiDict

from proxy.cache.answers import Answers
from proxy.cache.batches import Batches
from proxy.cache.trust import ORDINARY, Trust
from proxy.settings import Settings, UpstreamSettings
from proxy.upstream.adapter import NO_ROOM, Adapter, Capabilities, Kind, Probe, Room
from proxy.upstream.client import Outgoing, Upstream, UpstreamBusy, client_session
from proxy.upstream.detect import ADAPTERS, Detected
from proxy.upstream.evidence import Tail
from proxy.upstream.identity import Identity, Tracker
from proxy.upstream.lane import Lane, LaneBusy, LaneFull
from proxy.upstream.origin import origin_of
from proxy.upstream.prefix import Lead, Readied, Ready
from proxy.upstream.prefix_cache import PrefixCache
from proxy.upstream.routing import Routing, Shown, model_in, with_fields
from proxy.upstream.sharing import Caller, Gate, Sharing, Verdict, shown_credential
from proxy.web.background import in_background
from proxy.web.cors import CorsMemory
from proxy.web.facts import Facts
from proxy.web.journey import Journey, Leak
from proxy.web.metrics import Metrics
from proxy.web.prefix_metrics import PrefixMetrics
from proxy.web.prefixing import Place, open_prefixes
from proxy.web.private_files import PrivateFiles
from storage.store import Store

PROBE_TIMEOUT_S = 5.0
NOTHING = Ready(Readied.NOTHING)
_IDLE_S = 1.0
_SETTLE_S = 2.0
"""What a call waits, at most, to find its prefix restored by a server that was away."""
_CORS_TIMEOUT_S = 0.5
_CREDENTIAL_TIMEOUT_S = 2.0
_LOADING = 503


@dataclass(slots=True)
class _Trusting:
    """The trust in servers of these capabilities, made once."""

    capabilities: Capabilities | None = None
    room: Room = NO_ROOM
    trust: Trust = ORDINARY


@dataclass(frozen=True, slots=True)
class Boarding:
    """A call that is ready to be sent, and what was done about its lead before; see `PrefixCache`."""

    outgoing: Outgoing
    lead: Lead | None = None
    ready: Ready = NOTHING
    fingerprint: bytes | None = None
    probe: Probe | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """An upstream, what is known of it, and what answers for it."""

    name: str
    settings: UpstreamSettings
    upstream: Upstream
    tracker: Tracker
    gate: Gate
    cors: CorsMemory
    answers: Answers
    batches: Batches
    lane: Lane
    prefixes: PrefixCache | None
    seed_problems: tuple[str, ...]
    leak: Leak
    metrics: PrefixMetrics
    trusting: _Trusting
    tasks: set[asyncio.Task[None]]

    @property
    def shown(self) -> Shown:
        """What it shows of its models."""
        identity = self.tracker.current
        return Shown(identity.models, identity.files)

    @property
    def drains(self) -> bool:
        """Whether the upstream must be read to the end when a client leaves."""
        chosen = self.settings.on_disconnect
        return self.tracker.adapter.capabilities.drains if chosen == "auto" else chosen == "drain"

    @property
    def has_queue(self) -> bool:
        """Whether calls wait for one another here."""
        return self.lane.max_concurrency > 0

    @property
    def trust(self) -> Trust:
        """How far its account of its answers can be believed."""
        # Every hit asks.
        capabilities, room = self.tracker.adapter.capabilities, self.tracker.current.room
        known = self.trusting
        if known.capabilities is not capabilities or known.room is not room:
            known.capabilities, known.room = capabilities, room
            known.trust = _trust(capabilities, room, self.settings.cached)
        return known.trust

    def journey(self) -> Journey:
        """A call's way upstream, before it begins."""
        return Journey(self.leak if self.tracker.adapter.capabilities.leaks_tail else None)

    def client(self, headers: Mapping[str, str], remote: str | None, name: str = "") -> bytes:
        """Tells callers apart in the queue, where there is one; `name` is that of a named client."""
        if not self.has_queue:
            return b""
        if name:
            return name.encode()
        return self.gate.credential_of(headers) + (remote or "").encode()

    async def board(self, outgoing: Outgoing, lead_in: Callable[[bytes], Lead | None], *, learns: bool) -> Boarding:
        """Make a call ready that is sent next: with the model's name as it must be, and its prefix restored.

        Without `learns`, nothing of it is remembered.
        """
        body, identity = outgoing.body, self.tracker.current
        if not isinstance(body, bytes):
            return Boarding(outgoing)
        edits: dict[str, Any] = {}
        # In doubt there may be nothing loaded: then the call itself says what is to be.
        sends_loaded = self.tracker.adapter.capabilities.sends_loaded and identity.confirmed
        if sends_loaded and identity.loaded not in ("", model_in(body)):
            edits["model"] = identity.loaded
        boarding = Boarding(outgoing)
        if self.prefixes is not None and self.tracker.adapter.prefixing is not None:
            lead, probe = lead_in(body), self._lent(outgoing.headers)
            if self.tracker.adapter.capabilities.may_be_paid and not self.prefixes.wants(lead, identity.fingerprint):
                lead = None
            if not identity.confirmed and self.prefixes.keeps(lead, identity.fingerprint):
                # A look takes less time than computing again what can be restored if the same model is back.
                identity = await self.tracker.settle(_SETTLE_S)
            # Until it is confirmed what runs, nothing is known of what it holds.
            fingerprint = identity.fingerprint if identity.confirmed else None
            ready = await self.prefixes.before(probe, lead, fingerprint, identity.instance, learns=learns)
            boarding = Boarding(outgoing, lead, ready, fingerprint, probe)
            edits.update(ready.edits)
        return replace(boarding, outgoing=replace(outgoing, body=with_fields(body, edits))) if edits else boarding

    def refused(self, error: LaneBusy) -> UpstreamBusy:
        """What a caller hears who got no place."""
        counts = self.metrics
        (counts.queue_full if isinstance(error, LaneFull) else counts.queue_timeout).inc()
        return UpstreamBusy(str(error), error.retry_after_s)

    def landed(self, boarding: Boarding, tail: Tail) -> None:
        """Learn from the end of a call's answer, without anybody waiting for it."""
        if self.prefixes is None or boarding.probe is None:
            return
        evidence = tail.evidence()
        told = self.prefixes.after(boarding.probe, boarding.lead, boarding.ready, evidence, boarding.fingerprint)
        task = asyncio.create_task(told, name="nearhit-landed")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def answered(self, path: str, body: bytes) -> None:
        """Learn from a call that was answered whether its path takes anybody, without anybody waiting for it."""
        if self.gate.wonders(path):
            told = self.gate.learn(path, model_in(body), self.tracker.adapter.capabilities)
            task = asyncio.create_task(told, name="nearhit-path")
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _lent(self, headers: Mapping[str, str]) -> Probe:
        return self.own_probe if self.settings.api_key else self.probe(shown_credential(headers))

    async def make_way(self, target: str, body: bytes) -> None:
        """Do what must come before a request that is passed on; see `Adapter.make_way`."""
        await self.tracker.adapter.make_way(self.own_probe, target, body)

    @property
    def own_probe(self) -> Probe:
        """Requests with nearhit's own credential."""
        return self.probe(own_credential(self.settings))

    def probe(self, credential: Mapping[str, str]) -> Probe:
        """Requests of nearhit's own with this credential, lent for the occasion."""
        return Probe(self.upstream, credential, PROBE_TIMEOUT_S)

    async def admit(self, headers: Mapping[str, str], path: str = "") -> Caller:
        """What a caller with these header fields may do here, on `path`; the upstream itself may have to be asked."""
        capabilities, away = self.tracker.adapter.capabilities, self.tracker.current.away
        return await self.gate.admit(headers, capabilities, away=away, path=path)

    async def cors_of_upstream(self, credential: Mapping[str, str], origin: str) -> Mapping[str, str] | None:
        """The header fields of some answer to this Origin; None where there was none at once: a hit waits for it."""
        asked = CIMultiDict(credential)
        asked["Origin"] = origin
        return await Probe(self.upstream, asked, _CORS_TIMEOUT_S).headers("/v1/models")

    async def heard(self, headers: Mapping[str, str], status: int, *, generation: bool, path: str = "") -> None:
        """Learn from what the upstream said to a caller with these header fields; see `Gate.heard`."""
        if status != _LOADING:
            self.tracker.answered()
        await self.gate.heard(headers, status, generation=generation, path=path)


@dataclass(frozen=True, slots=True)
class Ground:
    """What all upstreams stand on.

    `answering` makes the part that answers calls to the upstream of an origin, `batching` that for batches of items.
    """

    settings: Settings
    store: Store
    private: PrivateFiles
    answering: Callable[[str], Answers]
    batching: Callable[[str], Batches]
    routing: Routing
    metrics: Metrics


@asynccontextmanager
async def backend(name: str, chosen: UpstreamSettings, ground: Ground) -> AsyncIterator[Backend]:
    """The upstream with these options, for the life of this block."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            client_session(connect_timeout_s=chosen.connect_timeout_s, read_timeout_s=chosen.read_timeout_s)
        )
        upstream = Upstream(origin_of(chosen.url), session, lambda: tracker.unreachable())
        facts = Facts(ground.store, upstream.origin)
        adapter = _adapter(chosen, await facts.get("kind"))
        label = f" {name}" if ground.settings.upstreams else ""
        lane = Lane(
            chosen.max_concurrency or adapter.capabilities.max_concurrency,
            max_waiting=chosen.max_waiting,
            timeout_s=chosen.queue_timeout_s,
            observe=ground.metrics.prefixes.placed,
        )
        gate = await _gate(ground, upstream, facts, label, lane)
        tracker = await _tracker(chosen, upstream, facts, adapter, gate, lane, lambda: restarted(), label)
        prefixes, seed_problems = await open_prefixes(
            stack,
            ground.settings,
            Place(name, chosen, upstream, tracker, lane, ground.routing, ground.private, own_credential(chosen)),
            ground.metrics.prefixes,
        )

        def restarted() -> None:
            if prefixes is not None:
                prefixes.restarted()

        answers, batches = ground.answering(upstream.origin), ground.batching(upstream.origin)
        tasks: set[asyncio.Task[None]] = set()
        stack.push_async_callback(_ended, tasks)
        await stack.enter_async_context(in_background(tracker.run, f"nearhit-identity-{name}"))
        stack.push_async_callback(answers.close)
        stack.push_async_callback(batches.close)
        yield Backend(
            name=name,
            settings=chosen,
            upstream=upstream,
            tracker=tracker,
            gate=gate,
            cors=CorsMemory(),
            answers=answers,
            batches=batches,
            lane=lane,
            prefixes=prefixes,
            seed_problems=seed_problems,
            # An answer may have been left in the middle before we came.
            leak=Leak(open=True),
            metrics=ground.metrics.prefixes,
            trusting=_Trusting(),
            tasks=tasks,
        )


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _tracker(
    chosen: UpstreamSettings,
    upstream: Upstream,
    facts: Facts,
    adapter: Adapter,
    gate: Gate,
    lane: Lane,
    restarted: Callable[[], None],
    label: str,
) -> Tracker:
    async def changed(identity: Identity) -> None:
        await facts.note("fingerprint", (identity.fingerprint or b"").hex())
        await facts.note("kind", adapter.kind.value)
        lane.limit(chosen.max_concurrency or adapter.capabilities.max_concurrency)

    async def connected() -> None:
        lane.limit(chosen.max_concurrency or adapter.capabilities.max_concurrency)
        await gate.ask(adapter.capabilities)

    known = await facts.get("fingerprint")
    return Tracker(
        adapter,
        Probe(upstream, own_credential(chosen), PROBE_TIMEOUT_S),
        bytes.fromhex(known) if known else None,
        changed=changed,
        connected=connected,
        poll_s=chosen.poll_s,
        canary_s=chosen.canary_s,
        idle=lambda: _is_idle(lane),
        vectors=facts,
        restarted=restarted,
        label=label,
    )


def _is_idle(lane: Lane) -> bool:
    return lane.idle_for(time.monotonic()) > _IDLE_S and not lane.seeding_now


async def _gate(ground: Ground, upstream: Upstream, facts: Facts, label: str, lane: Lane) -> Gate:
    async def remember(verdict: Verdict) -> None:
        await facts.note("sharing", verdict.value)

    verdict = await facts.get("sharing")
    return Gate(
        Sharing(ground.settings.sharing),
        ground.private.secret,
        Verdict(verdict) if verdict in {v.value for v in Verdict} else None,
        lambda credential: Probe(upstream, credential, _CREDENTIAL_TIMEOUT_S),
        remember,
        label,
        lambda: lane.place(b"nearhit"),
    )


def own_credential(chosen: UpstreamSettings) -> dict[str, str]:
    """The header fields that nearhit's own requests carry."""
    return {"Authorization": f"Bearer {chosen.api_key}"} if chosen.api_key else {}


def _adapter(chosen: UpstreamSettings, known: str | None) -> Adapter:
    if chosen.kind != "auto":
        return ADAPTERS[Kind(chosen.kind)](chosen.epoch)
    return Detected(chosen.epoch, Kind(known) if known in {kind.value for kind in Kind} else None)


def _trust(capabilities: Capabilities, room: Room, cached: str) -> Trust:
    """What follows from how a kind of server behaves, and from what the operator says."""
    return Trust(
        tells_length=capabilities.tells_length,
        unit=capabilities.usage_unit,
        default_limit=capabilities.default_limit or room.answer or None,
        context=room.context,
        honours_sampling=capabilities.honours_sampling,
        multi_turn=capabilities.multi_turn or cached == "on",
        cached=capabilities.cached if cached == "auto" else cached == "on",
        keeps_responses=capabilities.keeps_responses,
    )
