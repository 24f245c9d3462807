"""Everything that handlers use, put together and taken apart in one place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from proxy.cache import sealing, volatile
from proxy.cache.answers import Answers
from proxy.cache.asking import Terms
from proxy.cache.batches import Batches
from proxy.cache.coherence import follow, forget_readable
from proxy.cache.feedback import Feedback
from proxy.cache.holdings import Holdings
from proxy.cache.hot import HotTier
from proxy.cache.leasing import LeaseTerms
from proxy.cache.near import matcher
from proxy.cache.near.tier import NearTier
from proxy.cache.policy import Lifetimes
from proxy.cache.reading import CallReader
from proxy.cache.recent import RecentCalls
from proxy.cache.resketch import Resketcher
from proxy.cache.served import Served
from proxy.cache.upkeep import Clocks, Upkeep
from proxy.settings import Settings
from proxy.upstream.models_dir import read_models_dir
from proxy.upstream.routing import DEFAULT, Routing, Target, model_in, with_fields
from proxy.web.accesslog import AccessLog, access_log
from proxy.web.backend import Backend, Ground, backend
from proxy.web.background import in_background
from proxy.web.clients import Clients
from proxy.web.clock import counted_ms, now_ms
from proxy.web.metrics import Metrics
from proxy.web.private_files import private_files
from proxy.web.scope import Scopes
from storage.base import Room
from storage.presence import Presence
from storage.renewal import RenewableStore, renewable
from storage.sqlite import open_sqlite
from storage.sqlite_leases import SqliteLeases, open_leases
from storage.store import Store
from storage.write_behind import WriteBehind, write_behind

log = logging.getLogger("nearhit")

_LOOKUP_TIMEOUT_S = 1.0
_UPKEEP_S = 5.0
_SETTLE_S = 600.0
_WATCH_FILE_S = 5.0
_PENDING_BYTES = 64 * 1024 * 1024


class Backends:
    """The upstreams, and which of them serves a call."""

    def __init__(self, backends: Mapping[str, Backend], routing: Routing) -> None:
        """The first of `backends` is the one for whatever no other serves."""
        self._backends = backends
        self.routing = routing
        self.first = next(iter(backends.values()))

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._backends.values())

    def __len__(self) -> int:
        return len(self._backends)

    @property
    def shared(self) -> bool:
        """Whether all callers share one namespace at every upstream."""
        return all(one.gate.shared for one in self)

    def of_body(self, body: bytes) -> tuple[Backend, bytes]:
        """The upstream for a request with this body, and the body with its model's name there."""
        if self.routing.trivial:
            return self.first, body
        chosen, model = self.of_model(model_in(body))
        return chosen, body if model is None else with_fields(body, {"model": model})

    def of_model(self, model: str) -> tuple[Backend, str | None]:
        """The upstream for a model, and its name there where that is another one."""
        route = self.routing.route(model, {one.name: one.shown for one in self})
        return self._backends[route.upstream], route.model

    def friendly(self, one: Backend, model: str) -> str:
        """The name that people know a model of an upstream by."""
        return self.routing.friendly(one.name, model, one.shown)


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running proxy."""

    settings: Settings
    backends: Backends
    reader: CallReader
    scopes: Scopes
    holdings: Holdings
    feedback: Feedback
    recent: RecentCalls
    metrics: Metrics
    store: RenewableStore
    buffer: WriteBehind
    presence: Presence
    leases: SqliteLeases | None
    hot: HotTier
    room: Room
    access: AccessLog
    clients: Clients | None
    local_token: str
    started: float

    @property
    def near(self) -> NearTier | None:
        """The near tier, once its lists are loaded."""
        return self.backends.first.answers.near

    @property
    def in_flight(self) -> int:
        """How many fetches are under way."""
        return sum(one.answers.in_flight + one.batches.in_flight for one in self.backends)

    @property
    def near_state(self) -> str:
        """Whether other words are compared: `off`, `loading`, `on` or `failed`."""
        if not is_near_wanted(self.settings):
            return "off"
        return "on" if self.near is not None else "failed" if self.metrics.near_failed else "loading"


SERVICES = web.AppKey("services", Services)


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Services]:
    """All services for the life of this block.

    Raises:
        StorageRefused: the database file is not ours, or too new.
    """
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        metrics.enabled.set(settings.cache.mode != "off")
        private = await asyncio.to_thread(private_files, settings.data)
        await asyncio.to_thread(volatile.load)
        if settings.cache.store_words == "digest":
            await asyncio.to_thread(sealing.load)
        access = await stack.enter_async_context(access_log(settings.log.format))
        store = await _open_store(stack, settings)
        leases = await _open_leases(stack, settings, metrics)
        presence = Presence()
        room = Room(settings.cache.max_entries, settings.cache.max_bytes, settings.cache.top_k)
        buffer = await _open_buffer(stack, settings, store, presence, room, metrics)
        hot = HotTier(settings.cache.hot_bytes)
        await _tend(stack, store, room, presence, hot, metrics)
        if settings.cache.store_words == "digest":
            await stack.enter_async_context(in_background(lambda: forget_readable(store, now_ms), "nearhit-privacy"))
        served = Served()
        terms = _terms(settings)
        joining = LeaseTerms(leases, buffer.written, settings.cache.join_timeout_s) if leases else None
        ground = Ground(
            settings,
            store,
            private,
            lambda origin: Answers(origin, buffer, hot, terms, metrics, now_ms, served, joining),
            lambda origin: Batches(origin, buffer, hot, terms, metrics, now_ms, joining),
            await _routing(settings),
            metrics,
        )
        backends = await _open_backends(stack, settings, ground)
        holdings = Holdings(store, buffer, hot)
        if is_near_wanted(settings):
            await stack.enter_async_context(
                in_background(lambda: _near(backends, store, buffer, metrics), "nearhit-near")
            )
        yield Services(
            settings=settings,
            backends=backends,
            reader=CallReader(),
            scopes=Scopes(settings.cache),
            holdings=holdings,
            feedback=Feedback(store, holdings, served, now_ms),
            recent=RecentCalls(),
            metrics=metrics,
            store=store,
            buffer=buffer,
            presence=presence,
            leases=leases,
            hot=hot,
            room=room,
            access=access,
            clients=Clients(settings.clients, private.secret, metrics.clients) if settings.clients else None,
            local_token=private.token,
            started=time.monotonic(),
        )


async def _tend(
    stack: AsyncExitStack, store: Store, room: Room, presence: Presence, hot: HotTier, metrics: Metrics
) -> None:
    """Begin what goes on beside requests: learning and forgetting what others do, and the upkeep."""
    upkeep = Upkeep(
        store,
        room,
        clocks=Clocks(now_ms, counted_ms),
        evicted=metrics.removed,
        failed=metrics.storage_failed,
        every_s=_UPKEEP_S,
        settle_s=_SETTLE_S,
    )
    await stack.enter_async_context(in_background(lambda: presence.follow(store), "nearhit-presence"))
    await stack.enter_async_context(in_background(upkeep.run, "nearhit-upkeep"))
    await stack.enter_async_context(in_background(lambda: follow(store, hot.clear), "nearhit-coherence"))


def is_near_wanted(settings: Settings) -> bool:
    """Whether any call may be answered in other words."""
    cache = settings.cache
    if cache.store_words == "digest":
        return False
    return cache.mode == "approx" or any(override.mode == "approx" for override in cache.overrides)


async def _near(backends: Backends, store: Store, buffer: WriteBehind, metrics: Metrics) -> None:
    """Load what comparing prompts takes, once requests are served already, and keep the sketches up to date."""
    try:
        loaded = await asyncio.to_thread(matcher.load)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with lists or libraries, equal calls are answered
        metrics.near_failed = True
        log.error("the near tier could not be loaded (%s: %s); equal calls are answered", type(error).__name__, error)
        return
    near = NearTier(buffer, loaded)
    for one in backends:
        one.answers.near = near
    await Resketcher(store, loaded, now_ms=now_ms, failed=metrics.storage_failed).run()


def _terms(settings: Settings) -> Terms:
    cache = settings.cache
    return Terms(
        lifetimes=Lifetimes(
            ttl_ms=round(cache.ttl_hours * 3_600_000),
            volatile_ttl_ms=round(cache.volatile_ttl_s * 1000),
            max_ttl_ms=round(cache.max_ttl_hours * 3_600_000),
            if_error_ms=round(cache.stale_if_error_hours * 3_600_000),
            revalidate_ms=round(cache.stale_while_revalidate_s * 1000),
        ),
        sampled_bypass=cache.sampled == "bypass",
        retry_window_ms=round(cache.retry_window_s * 1000),
        # One answer must not take the place of all others.
        max_answer_bytes=min(cache.max_answer_bytes, cache.max_bytes // 16),
        lookup_timeout_s=_LOOKUP_TIMEOUT_S,
        seals=cache.store_words == "digest",
        variants=cache.variants,
    )


async def _open_backends(stack: AsyncExitStack, settings: Settings, ground: Ground) -> Backends:
    chosen = {DEFAULT: settings.upstream, **{one.name: one for one in settings.upstreams}}
    backends = {
        name: await stack.enter_async_context(backend(name, options, ground)) for name, options in chosen.items()
    }
    return Backends(backends, ground.routing)


async def _routing(settings: Settings) -> Routing:
    names = {
        name: Target(target) if isinstance(target, str) else Target(target.model, target.upstream)
        for name, target in settings.models.items()
    }
    patterns = {DEFAULT: settings.upstream.models, **{one.name: one.models for one in settings.upstreams}}
    if not settings.models_dir:
        return Routing(names, patterns, {})
    folders = await asyncio.to_thread(lambda: read_models_dir(Path(settings.models_dir).expanduser()))
    for warning in folders.warnings:
        log.warning("%s", warning)
    return Routing(names, patterns, folders.files)


async def _open_buffer(
    stack: AsyncExitStack, settings: Settings, store: Store, presence: Presence, room: Room, metrics: Metrics
) -> WriteBehind:
    return await stack.enter_async_context(
        write_behind(
            store,
            metrics.storage_failed,
            flush_s=settings.cache.flush_s,
            max_pending_bytes=_PENDING_BYTES,
            presence=presence,
            room=room,
            on_evicted=metrics.removed,
        )
    )


async def _open_leases(stack: AsyncExitStack, settings: Settings, metrics: Metrics) -> SqliteLeases | None:
    # Before what writes behind, so that they are released once all is written.
    path, wanted = settings.database, settings.cache.leases
    if path is None or wanted == "off":
        return None
    return await stack.enter_async_context(open_leases(path, counted_ms, metrics.storage_failed, always=wanted == "on"))


async def _open_store(stack: AsyncExitStack, settings: Settings) -> RenewableStore:
    path, cache = settings.database, settings.cache
    overwrite = cache.secure_delete or cache.store_words == "digest"

    def opener(suspect: bool) -> AbstractAsyncContextManager[Store]:
        return open_sqlite(path, suspect=suspect, overwrite_deleted=overwrite)

    return await stack.enter_async_context(renewable(opener, watch_s=_WATCH_FILE_S, retry_s=_WATCH_FILE_S))
