"""The service: look up, decide, fetch once, keep. Everything that does I/O for a call goes through here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from proxy.cache.answer import NotUnderstood, Recorded
from proxy.cache.asking import Asking, Fetching, Look, Refused, Replay, Reply, Terms
from proxy.cache.dialects.call import KEY_VERSION, Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.directives import NONE, Directives
from proxy.cache.flight import Flight, Flown
from proxy.cache.hot import HotTier, Place, Ready
from proxy.cache.keys import Keys, topic
from proxy.cache.near.matcher import LONGEST_TEXT
from proxy.cache.near.tier import Nearest, NearTier, Step
from proxy.cache.policy import Bypass, Drop, Keep, Miss, decide, lifetime
from proxy.cache.ports import Fetch, Identity, Observer, Sending
from proxy.cache.recorder import Recorder, Unrecorded
from proxy.cache.repeats import Repeats
from proxy.cache.sealing import opened, sealed
from proxy.cache.served import Served
from proxy.cache.trust import ORDINARY, UNTRACKED, Trust
from storage.base import Entry, Sketch
from storage.write_behind import WriteBehind


class Answers:
    """Answers calls to one upstream from one store."""

    def __init__(
        self,
        upstream: str,
        buffer: WriteBehind,
        hot: HotTier,
        terms: Terms,
        observer: Observer,
        now_ms: Callable[[], int],
        served: Served,
    ) -> None:
        """`upstream` names the server in keys; `now_ms` is the clock, in ms since the epoch."""
        self._upstream = upstream
        self._keys = Keys(upstream)
        self._buffer = buffer
        self._hot = hot
        self._terms = terms
        self._observer = observer
        self._now_ms = now_ms
        self._flights: dict[bytes, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._repeats = Repeats(terms.retry_window_ms)
        self.near: NearTier | None = None
        """The near tier, once its lists are loaded."""
        self.served = served

    @property
    def max_answer_bytes(self) -> int:
        """Larger answers are not kept."""
        return self._terms.max_answer_bytes

    @property
    def in_flight(self) -> int:
        """How many fetches are under way."""
        return len(self._tasks)

    def recall(
        self, call: Call, asked: Directives, namespace: bytes, identity: Identity, trust: Trust = ORDINARY
    ) -> Replay | None:
        """The answer, where memory alone can tell that it may be given; None leaves the question to `respond`.

        For a caller who may read under `namespace`. Nothing is awaited and nothing prepared: this is the path of
        nearly all hits.
        """
        terms = self._terms
        chancy = (terms.sampled_bypass or terms.retry_window_ms > 0) and trust.samples(call)
        if identity.fingerprint is None or not identity.trusted or asked is not NONE or chancy:
            return None
        if trust.bypass(call) is not None:
            return None
        now_ms = self._now_ms()
        ready = self._hot.get(self._keys.place(call, namespace, identity.fingerprint), now_ms)
        if ready is None or decide(ready.entry, asked, needs_usage=call.needs_usage, now_ms=now_ms) is not None:
            return None
        self._buffer.used(ready.entry.key, now_ms)
        return Replay(ready, now_ms)

    def forget(self, call: Call, replay: Replay) -> None:
        """Remove an answer that turned out unreadable."""
        entry = replay.ready.entry
        self._hot.discard(self._keys.place(call, entry.namespace, entry.fingerprint))
        self._buffer.delete(entry.key)

    async def respond(self, dialect: Dialect, call: Call, asking: Asking) -> Reply:
        """Find or start the answer to a call."""
        identity = asking.identities.current
        bypass = self._bypass(call, asking, identity)
        if bypass is not None:
            return bypass
        key = self._keys.key(call, asking.namespace, identity)
        now_ms = self._now_ms()
        found = await self._find(dialect, key, call, asking, identity, now_ms)
        nearest = None
        if found is Miss.ABSENT and key not in self._flights:
            nearest = await self._nearest(call, asking, identity, now_ms)
            near = await self._near_reply(dialect, call, asking, nearest, now_ms)
            # Meanwhile the very call may have been answered, or be under way.
            found = near or self._held(call, asking, identity, now_ms)
        if isinstance(found, Replay):
            self._buffer.used(found.ready.entry.key, now_ms)
            if found.near is not None:
                self.served.note(found.ready.entry, call.words or "")
            return found
        # From here to the new flight nothing is awaited: two calls cannot both find none.
        flight = self._flights.get(key) if asking.may_lead and asking.may_read and found is Miss.ABSENT else None
        if flight is not None and flight.joinable:
            return Fetching(flight, asking.namespace, found, joined=True)
        if asking.directives.only_if_cached:
            return Refused()
        flight = self._depart(dialect, key, call, asking, identity, nearest)
        shadow = asking.near is not None and asking.near.shadow and nearest is not None and nearest.found is not None
        return Fetching(flight, asking.namespace, found, joined=False, nearest=nearest, shadow=shadow)

    async def look(self, dialect: Dialect, call: Call, asking: Asking) -> Look:
        """What `respond` would come to."""
        identity, now_ms = asking.identities.current, self._now_ms()
        key = self._keys.key(call, asking.namespace, identity)
        space = self._keys.space(call, asking.namespace, identity)
        keep = lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=call.volatile)
        nearest, terms = None, asking.near
        if self.near is not None and terms is not None and call.words is not None and len(call.words) <= LONGEST_TEXT:
            threshold, words = terms.threshold, call.words
            nearest = await self.near.find(space, asking.namespace, words, threshold=threshold, now_ms=now_ms)
        found: Replay | Miss | Bypass | None = self._bypass(call, asking, identity)
        found = found or await self._stored(dialect, key, call, asking, identity, now_ms)
        if found is Miss.ABSENT and nearest is not None:
            found = await self._near_reply(dialect, call, asking, nearest, now_ms) or found
        return Look(key, space, found, key in self._flights, nearest, keep)

    async def _stored(
        self, dialect: Dialect, key: bytes, call: Call, asking: Asking, identity: Identity, now_ms: int
    ) -> Replay | Miss:
        """What `_find` would find, without counting it or keeping it in memory."""
        if not identity.trusted:
            return Miss.IN_DOUBT
        if not asking.may_read:
            return Miss.UNCONFIRMED
        entry = await self._get(key, call, now_ms)
        return self._judged(Ready(entry, dialect), call, asking, now_ms) if entry else Miss.ABSENT

    def relay(self, fetch: Fetch, *, drain: bool, sending: Sending = UNTRACKED, hurries: bool = False) -> Flight:
        """Fetch for one caller, keeping nothing; how the answer ended stays unknown.

        With `hurries`, others wait for its end, so that a caller who reads slowly must not hold it up.
        """
        ahead_bytes = self._terms.max_answer_bytes if hurries else 0
        flight = Flight(Unrecorded(ahead_bytes), stream=False, include_usage=False, drain=drain, sending=sending)
        self._watch(flight.depart(fetch, _forget))
        return flight

    async def close(self) -> None:
        """Cancel what is still under way and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _bypass(self, call: Call, asking: Asking, identity: Identity) -> Bypass | None:
        if asking.directives.no_store:
            return Bypass.NO_STORE
        distrusted = asking.trust.bypass(call)
        if distrusted is not None:
            return distrusted
        if self._terms.sampled_bypass and asking.trust.samples(call):
            return Bypass.SAMPLED
        return Bypass.NO_FINGERPRINT if identity.fingerprint is None else None

    async def _find(
        self, dialect: Dialect, key: bytes, call: Call, asking: Asking, identity: Identity, now_ms: int
    ) -> Replay | Miss:
        closed = self._unreadable(call, asking, identity, now_ms)
        if closed is not None:
            return closed
        held = self._held(call, asking, identity, now_ms)
        if held is not Miss.ABSENT or key in self._flights:
            return held
        # While storage is asked, another task may have begun, or begun and ended, the same fetch:
        # the first is found among the flights by our caller, the second in the hot tier here.
        place = self._keys.place(call, asking.namespace, identity.fingerprint)
        ready = await self._load(dialect, call, key, place, now_ms)
        return self._judged(ready, call, asking, now_ms) if ready else self._held(call, asking, identity, now_ms)

    def _held(self, call: Call, asking: Asking, identity: Identity, now_ms: int) -> Replay | Miss:
        ready = self._hot.get(self._keys.place(call, asking.namespace, identity.fingerprint), now_ms)
        return self._judged(ready, call, asking, now_ms) if ready else Miss.ABSENT

    def _judged(self, ready: Ready, call: Call, asking: Asking, now_ms: int) -> Replay | Miss:
        miss = decide(ready.entry, asking.directives, needs_usage=call.needs_usage, now_ms=now_ms)
        return Replay(ready, now_ms) if miss is None else miss

    async def _nearest(self, call: Call, asking: Asking, identity: Identity, now_ms: int) -> Nearest | None:
        if self.near is None or asking.near is None or call.words is None or len(call.words) > LONGEST_TEXT:
            return None
        space, started = self._keys.space(call, asking.namespace, identity), time.perf_counter()
        try:
            async with asyncio.timeout(self._terms.lookup_timeout_s):
                nearest = await self.near.find(
                    space, asking.namespace, call.words, threshold=asking.near.threshold, now_ms=now_ms
                )
        except TimeoutError:
            self._buffer.report_slow()
            return None
        self._observer.looked_near(time.perf_counter() - started, nearest)
        return nearest

    async def _near_reply(
        self, dialect: Dialect, call: Call, asking: Asking, nearest: Nearest | None, now_ms: int
    ) -> Replay | None:
        if nearest is None or nearest.found is None or asking.near is None or call.words is None:
            return None
        if asking.near.shadow:
            return None
        entry = await self._buffer.get(nearest.found.candidate.key, now_ms)
        if entry is None or decide(entry, asking.directives, needs_usage=call.needs_usage, now_ms=now_ms) is not None:
            return None
        return Replay(Ready(entry, dialect), now_ms, nearest.found)

    def _unreadable(self, call: Call, asking: Asking, identity: Identity, now_ms: int) -> Miss | None:
        if not identity.trusted:
            return Miss.IN_DOUBT
        if not asking.may_read:
            return Miss.UNCONFIRMED
        if asking.directives.no_cache:
            return Miss.NO_CACHE
        if asking.trust.samples(call) and self._repeats.is_retry(asking.repeat, now_ms):
            return Miss.RETRY
        return None

    async def _get(self, key: bytes, call: Call, now_ms: int) -> Entry | None:
        entry = await self._buffer.get(key, now_ms)
        return opened(entry, call.digest) if entry else None

    async def _load(self, dialect: Dialect, call: Call, key: bytes, place: Place, now_ms: int) -> Ready | None:
        if self._buffer.lacks(key):
            return None
        started = time.perf_counter()
        entry: Entry | None = None
        try:
            async with asyncio.timeout(self._terms.lookup_timeout_s):
                entry = await self._get(key, call, now_ms)
        except TimeoutError:
            self._buffer.report_slow()
        self._observer.looked_up(time.perf_counter() - started)
        if entry is None:
            return None
        ready = Ready(entry, dialect)
        self._hot.put(place, ready)
        return ready

    def _depart(
        self,
        dialect: Dialect,
        key: bytes,
        call: Call,
        asking: Asking,
        identity: Identity,
        nearest: Nearest | None,
    ) -> Flight:
        recorder = Recorder(
            dialect,
            call,
            max_bytes=self._terms.max_answer_bytes,
            usage_from_timings=asking.usage_from_timings,
            trust=asking.trust,
        )
        flight = Flight(
            recorder,
            stream=call.stream,
            include_usage=call.include_usage,
            drain=asking.drain,
            sending=asking.sending,
        )

        async def land(flown: Flown) -> None:
            try:
                await self._land(dialect, key, call, asking, identity, flown, nearest)
            finally:
                if self._flights.get(key) is flight:
                    del self._flights[key]

        leading = self._flights.get(key)
        if asking.may_lead and (leading is None or not leading.joinable):
            self._flights[key] = flight
        self._watch(flight.depart(asking.fetch, land))
        return flight

    def _watch(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _land(
        self,
        dialect: Dialect,
        key: bytes,
        call: Call,
        asking: Asking,
        identity: Identity,
        flown: Flown,
        nearest: Nearest | None,
    ) -> None:
        if asking.sending.sent:
            self._observer.fetched(flown.seconds, flown.ttft_seconds)
        kept = await self._keep(key, call, asking, identity, flown, nearest)
        if isinstance(kept, Drop):
            self._observer.not_stored(kept)
            return
        self._hot.put(self._keys.place(call, kept.namespace, kept.fingerprint), Ready(kept, dialect))
        self._observer.stored()

    async def _keep(
        self,
        key: bytes,
        call: Call,
        asking: Asking,
        identity: Identity,
        flown: Flown,
        nearest: Nearest | None,
    ) -> Entry | Drop:
        if isinstance(flown.result, Drop):
            return flown.result
        if asking.sending.tainted:
            return Drop.TAINTED
        keep = lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=call.volatile)
        if isinstance(keep, Drop):
            return keep
        after = await asking.identities.confirm()
        if not (identity.confirmed and after.confirmed and after.epoch == identity.epoch):
            return Drop.IN_DOUBT
        try:
            entry = self._entry(key, call, asking, identity, flown.result, keep, flown.seconds)
        except NotUnderstood:
            return Drop.NOT_UNDERSTOOD
        sketch = await self._sketch(entry, nearest)
        stored = sealed(entry, call.digest) if self._terms.seals else entry
        return entry if self._buffer.put(stored, sketch) else Drop.STORAGE_BEHIND

    async def _sketch(self, entry: Entry, nearest: Nearest | None) -> Sketch | None:
        if self.near is None or not entry.near or entry.words is None:
            # Until the lists are loaded, and where the near tier is off: made up for later, in the background.
            return None
        if nearest is not None and nearest.step is not Step.KEY:
            return nearest.sketch
        return await self.near.sketch(entry.words, entry.space)

    def _entry(
        self,
        key: bytes,
        call: Call,
        asking: Asking,
        identity: Identity,
        recorded: Recorded,
        keep: Keep,
        seconds: float,
    ) -> Entry:
        now_ms = self._now_ms()
        return Entry(
            key=key,
            key_version=KEY_VERSION,
            namespace=asking.namespace,
            space=self._keys.space(call, asking.namespace, identity),
            upstream=self._upstream,
            fingerprint=identity.fingerprint or b"",
            endpoint=call.endpoint,
            model=call.model,
            words=call.words,
            stored_ms=now_ms,
            expires_ms=now_ms + keep.ttl_ms,
            cost_ms=round(seconds * 1000),
            prompt_tokens=recorded.gist.prompt_tokens,
            completion_tokens=recorded.gist.completion_tokens,
            usage_known=recorded.usage_known,
            answer=recorded.encoded(),
            near=call.words is not None
            and len(call.words) <= LONGEST_TEXT
            and recorded.may_be_near(limited=asking.trust.is_limited(call, recorded.gist.completion_tokens)),
            topic=topic(call, asking.namespace),
        )


async def _forget(flown: Flown) -> None:
    del flown
