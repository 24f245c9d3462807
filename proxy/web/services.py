"""Everything that handlers use, put together and taken apart in one place."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from proxy.cache import sealing, volatile
from proxy.cache.answers import Answers
from proxy.cache.asking import Terms
from proxy.cache.coherence import follow, forget_readable
from proxy.cache.feedback import Feedback
from proxy.cache.holdings import Holdings
from proxy.cache.hot import HotTier
from proxy.cache.near import matcher
from proxy.cache.near.tier import NearTier
from proxy.cache.policy import Lifetimes
from proxy.cache.reading import CallReader
from proxy.cache.recent import RecentCalls
from proxy.cache.resketch import Resketcher
from proxy.cache.upkeep import Clocks, Upkeep
from proxy.settings import Settings
from proxy.upstream.adapter import Adapter, Kind, Probe
from proxy.upstream.client import Upstream, client_session, origin_of
from proxy.upstream.detect import ADAPTERS, Detected
from proxy.upstream.identity import Identity, Tracker
from proxy.upstream.sharing import Gate, Sharing, Verdict
from proxy.web.accesslog import AccessLog, access_log
from proxy.web.cors import CorsMemory
from proxy.web.metrics import Metrics
from proxy.web.scope import Scopes
from storage.base import Room, StorageError
from storage.presence import Presence
from storage.renewal import RenewableStore, renewable
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.write_behind import WriteBehind, write_behind

log = logging.getLogger("nearhit")

_PROBE_TIMEOUT_S = 5.0
_CORS_TIMEOUT_S = 0.5
_LOADING = 503
_CREDENTIAL_TIMEOUT_S = 2.0
_LOOKUP_TIMEOUT_S = 1.0
_UPKEEP_S = 5.0
_SETTLE_S = 600.0
_WATCH_FILE_S = 5.0
_AGAIN_S = 1.0
_PENDING_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running proxy."""

    settings: Settings
    upstream: Upstream
    tracker: Tracker
    gate: Gate
    answers: Answers
    reader: CallReader
    scopes: Scopes
    holdings: Holdings
    feedback: Feedback
    recent: RecentCalls
    metrics: Metrics
    cors: CorsMemory
    store: RenewableStore
    buffer: WriteBehind
    presence: Presence
    hot: HotTier
    room: Room
    access: AccessLog
    local_token: str
    started: float

    def probe(self, credential: Mapping[str, str]) -> Probe:
        """Requests of nearhit's own with this credential, lent for the occasion."""
        return Probe(self.upstream, credential, _PROBE_TIMEOUT_S)

    async def cors_of_upstream(self, credential: Mapping[str, str], origin: str) -> Mapping[str, str] | None:
        """The header fields of some answer to this Origin; None where there was none at once: a hit waits for it."""
        asked = CIMultiDict(credential)
        asked["Origin"] = origin
        return await Probe(self.upstream, asked, _CORS_TIMEOUT_S).headers("/v1/models")

    @property
    def near_state(self) -> str:
        """Whether other words are compared: `off`, `loading`, `on` or `failed`."""
        if not is_near_wanted(self.settings):
            return "off"
        return "on" if self.answers.near is not None else "failed" if self.metrics.near_failed else "loading"

    @property
    def drains(self) -> bool:
        """Whether the upstream must be read to the end when a client leaves."""
        chosen = self.settings.upstream.on_disconnect
        return self.tracker.adapter.capabilities.drains if chosen == "auto" else chosen == "drain"

    async def heard(self, headers: Mapping[str, str], status: int, *, generation: bool) -> None:
        """Learn from what the upstream said to a caller with these header fields; see `Gate.heard`."""
        if status != _LOADING:
            self.tracker.answered()
        await self.gate.heard(headers, status, generation=generation)


SERVICES = web.AppKey("services", Services)


def now_ms() -> int:
    """The clock: ms since the epoch."""
    return time.time_ns() // 1_000_000


def _counted_ms() -> int:
    # Where a system has no clock that counts while it sleeps, waking up looks like a jump, which costs nothing.
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Services]:
    """All services for the life of this block.

    Raises:
        StorageRefused: the database file is not ours, or too new.
    """
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        metrics.enabled.set(settings.cache.mode != "off")
        local_token, secret = await asyncio.to_thread(_private_files, settings.data)
        await asyncio.to_thread(volatile.load)
        if settings.cache.store_words == "digest":
            await asyncio.to_thread(sealing.load)
        access = await stack.enter_async_context(access_log(settings.log.format))
        store = await _open_store(stack, settings)
        presence = Presence()
        room = Room(settings.cache.max_entries, settings.cache.max_bytes, settings.cache.top_k)
        buffer = await stack.enter_async_context(
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
        hot = HotTier(settings.cache.hot_bytes)
        await _tend(stack, store, room, presence, hot, metrics)
        if settings.cache.store_words == "digest":
            await stack.enter_async_context(_in_background(lambda: forget_readable(store, now_ms), "nearhit-privacy"))
        upstream, tracker, gate = await _open_upstream(stack, settings, store, secret)
        answers = _answers(settings, upstream, buffer, hot, metrics)
        stack.push_async_callback(answers.close)
        holdings = Holdings(store, buffer, hot)
        if is_near_wanted(settings):
            await stack.enter_async_context(
                _in_background(lambda: _near(answers, store, buffer, metrics), "nearhit-near")
            )
        yield Services(
            settings=settings,
            upstream=upstream,
            tracker=tracker,
            gate=gate,
            answers=answers,
            reader=CallReader(),
            scopes=Scopes(settings.cache),
            holdings=holdings,
            feedback=Feedback(store, holdings, answers.served, now_ms),
            recent=RecentCalls(),
            metrics=metrics,
            cors=CorsMemory(),
            store=store,
            buffer=buffer,
            presence=presence,
            hot=hot,
            room=room,
            access=access,
            local_token=local_token,
            started=time.monotonic(),
        )


async def _tend(
    stack: AsyncExitStack, store: Store, room: Room, presence: Presence, hot: HotTier, metrics: Metrics
) -> None:
    """Begin what goes on beside requests: learning and forgetting what others do, and the upkeep."""
    upkeep = Upkeep(
        store,
        room,
        clocks=Clocks(now_ms, _counted_ms),
        evicted=metrics.removed,
        failed=metrics.storage_failed,
        every_s=_UPKEEP_S,
        settle_s=_SETTLE_S,
    )
    await stack.enter_async_context(_in_background(lambda: presence.follow(store), "nearhit-presence"))
    await stack.enter_async_context(_in_background(upkeep.run, "nearhit-upkeep"))
    await stack.enter_async_context(_in_background(lambda: follow(store, hot.clear), "nearhit-coherence"))


def is_near_wanted(settings: Settings) -> bool:
    """Whether any call may be answered in other words."""
    cache = settings.cache
    if cache.store_words == "digest":
        return False
    return cache.mode == "approx" or any(override.mode == "approx" for override in cache.overrides)


async def _near(answers: Answers, store: Store, buffer: WriteBehind, metrics: Metrics) -> None:
    """Load what comparing prompts takes, once requests are served already, and keep the sketches up to date."""
    try:
        loaded = await asyncio.to_thread(matcher.load)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with lists or libraries, equal calls are answered
        metrics.near_failed = True
        log.error("the near tier could not be loaded (%s: %s); equal calls are answered", type(error).__name__, error)
        return
    answers.near = NearTier(buffer, loaded)
    await Resketcher(store, loaded, now_ms=now_ms, failed=metrics.storage_failed).run()


def _answers(settings: Settings, upstream: Upstream, buffer: WriteBehind, hot: HotTier, metrics: Metrics) -> Answers:
    cache = settings.cache
    terms = Terms(
        lifetimes=Lifetimes(
            ttl_ms=round(cache.ttl_hours * 3_600_000),
            volatile_ttl_ms=round(cache.volatile_ttl_s * 1000),
            max_ttl_ms=round(cache.max_ttl_hours * 3_600_000),
        ),
        sampled_bypass=cache.sampled == "bypass",
        retry_window_ms=round(cache.retry_window_s * 1000),
        # One answer must not take the place of all others.
        max_answer_bytes=min(cache.max_answer_bytes, cache.max_bytes // 16),
        lookup_timeout_s=_LOOKUP_TIMEOUT_S,
        seals=cache.store_words == "digest",
    )
    return Answers(upstream.origin, buffer, hot, terms, metrics, now_ms)


async def _open_store(stack: AsyncExitStack, settings: Settings) -> RenewableStore:
    path, cache = settings.database, settings.cache
    overwrite = cache.secure_delete or cache.store_words == "digest"

    def opener(suspect: bool) -> AbstractAsyncContextManager[Store]:
        return open_sqlite(path, suspect=suspect, overwrite_deleted=overwrite)

    return await stack.enter_async_context(renewable(opener, watch_s=_WATCH_FILE_S, retry_s=_WATCH_FILE_S))


async def _open_upstream(
    stack: AsyncExitStack, settings: Settings, store: Store, secret: bytes
) -> tuple[Upstream, Tracker, Gate]:
    chosen = settings.upstream
    session = await stack.enter_async_context(
        client_session(connect_timeout_s=chosen.connect_timeout_s, read_timeout_s=chosen.read_timeout_s)
    )
    upstream = Upstream(origin_of(chosen.url), session, lambda: tracker.unreachable())
    facts = _Facts(store, upstream.origin)
    own = {"Authorization": f"Bearer {chosen.api_key}"} if chosen.api_key else {}

    async def changed(identity: Identity) -> None:
        await facts.note("fingerprint", (identity.fingerprint or b"").hex())
        await facts.note("kind", adapter.kind.value)

    async def remember(verdict: Verdict) -> None:
        await facts.note("sharing", verdict.value)

    async def connected() -> None:
        await gate.ask(adapter.capabilities)

    adapter = _adapter(settings, await facts.get("kind"))
    known = await facts.get("fingerprint")
    tracker = Tracker(
        adapter,
        Probe(upstream, own, _PROBE_TIMEOUT_S),
        bytes.fromhex(known) if known else None,
        changed=changed,
        connected=connected,
        poll_s=chosen.poll_s,
    )
    verdict = await facts.get("sharing")
    known_verdict = Verdict(verdict) if verdict in {v.value for v in Verdict} else None
    gate = Gate(
        Sharing(settings.sharing),
        secret,
        known_verdict,
        lambda credential: Probe(upstream, credential, _CREDENTIAL_TIMEOUT_S),
        remember,
    )
    await stack.enter_async_context(_in_background(tracker.run, "nearhit-identity"))
    return upstream, tracker, gate


def _adapter(settings: Settings, known: str | None) -> Adapter:
    epoch = settings.upstream.epoch
    if settings.upstream.kind != "auto":
        return ADAPTERS[Kind(settings.upstream.kind)](epoch)
    return Detected(epoch, Kind(known) if known in {kind.value for kind in Kind} else None)


class _Facts:
    """What storage remembers of the upstream; without storage, nothing."""

    def __init__(self, store: Store, origin: str) -> None:
        self._store = store
        self._origin = origin

    async def get(self, name: str) -> str | None:
        try:
            return await self._store.fact(self._origin, name)
        except StorageError:
            return None

    async def note(self, name: str, value: str) -> None:
        try:
            await self._store.note(self._origin, name, value, now_ms())
        except StorageError as error:
            log.warning("what was learned of the upstream (%s) could not be kept: %s", name, error)


@asynccontextmanager
async def _in_background(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(_kept_up(work, name), name=name)
    try:
        yield
    finally:
        # Work that fails while it is being cancelled would begin again.
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_AGAIN_S)


async def _kept_up(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Do the work to its end; where it fails in a way that nobody foresaw, tell and begin again."""
    while True:
        try:
            await work()
        except Exception as error:
            log.critical("%s failed and begins again", name, exc_info=error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


def _private_files(data: Path) -> tuple[str, bytes]:
    """The token for the routes of this machine, and the installation's secret; each made when it is missing."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        token = _kept(data / "admin.token", secrets.token_urlsafe(32).encode()).decode("ascii").strip()
        return token, _kept(data / "secret", secrets.token_bytes(32))
    except (OSError, ValueError) as error:
        log.warning("%s: %s: no local admin token, and credentials are told apart for this run only", data, error)
    return secrets.token_urlsafe(32), secrets.token_bytes(32)


def _kept(path: Path, fresh: bytes) -> bytes:
    """The content of a private file, `fresh` where there was none; whoever else makes it first wins."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(fresh)
        # Linking a finished file, where the name is free, shows nobody a half-written one.
        with suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        scratch.unlink()
    return path.read_bytes() or fresh
