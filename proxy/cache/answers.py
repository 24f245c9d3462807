"""The service: look up, decide, fetch once, keep. Everything that does I/O for a call goes through here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxy.cache.asking import Absent, Asking, Fetching, Found, Look, Refused, Replay, Reply, Terms
from proxy.cache.dialects.call import Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.directives import NONE, Directives
from proxy.cache.flight import Flight, Flown
from proxy.cache.hot import HotTier
from proxy.cache.keeping import Departed, Keeping
from proxy.cache.keys import Keys
from proxy.cache.leasing import Finished, LeasedFetch, LeaseTerms
from proxy.cache.lookup import Lookup, barred
from proxy.cache.near.matcher import LONGEST_TEXT
from proxy.cache.near.tier import Nearest, NearTier
from proxy.cache.policy import Bypass, Drop, Miss, decide, lifetime
from proxy.cache.ports import Fetch, Identity, Observer, Sending
from proxy.cache.recorder import Recorder, Unrecorded
from proxy.cache.repeats import Lately, Repeats
from proxy.cache.served import Served
from proxy.cache.trust import ORDINARY, UNTRACKED, Trust
from proxy.cache.variants import Variants
from storage.write_behind import WriteBehind

_JOINS = frozenset({Miss.ABSENT, Miss.EXPIRED, Miss.TOO_OLD, Miss.TOO_STALE_SOON, Miss.NO_USAGE, Miss.CLOCK})
"""Why a call is fetched that an answer under way would do for."""
_UNSHARED_MS = 10_000
"""For how long calls of a key go upstream side by side after one whose answer could not be shared."""


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
        leases: LeaseTerms | None = None,
    ) -> None:
        """`upstream` names the server in keys; `now_ms` is the clock, in ms since the epoch.

        `leases` are for the processes that share the store, where there may be any.
        """
        self._leases = leases
        self._keys = Keys(upstream)
        self._buffer = buffer
        self._hot = hot
        self._terms = terms
        self._observer = observer
        self._now_ms = now_ms
        self._lookup = Lookup(self._keys, buffer, hot, terms, observer)
        self._keeping = Keeping(upstream, self._keys, buffer, hot, terms, lambda: self._now_ms())
        self._flights: dict[bytes, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._repeats = Repeats(terms.retry_window_ms)
        self._unshared = Lately(_UNSHARED_MS)
        self._variants = Variants(terms.variants)
        self.served = served

    @property
    def near(self) -> NearTier | None:
        """The near tier, once its lists are loaded."""
        return self._lookup.near

    @near.setter
    def near(self, near: NearTier) -> None:
        self._lookup.near = near

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
        chancy = (terms.sampled_bypass or terms.retry_window_ms > 0 or terms.variants > 1) and trust.samples(call)
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

    def forget(self, replay: Replay) -> None:
        """Remove an answer that turned out unreadable."""
        self._hot.discard_entry(replay.ready.entry.key)
        self._buffer.delete(replay.ready.entry.key)

    async def respond(
        self, dialect: Dialect, call: Call, asking: Asking, *, joins: bool = True, after: Flight | None = None
    ) -> Reply:
        """Find or start the answer to a call; with `joins` it may be one that another call has under way.

        `after` has failed this very call. All whom it failed ask together, and hear the same.
        """
        identity = asking.identities.current
        bypass = self._bypass(call, asking, identity)
        if bypass is not None:
            return bypass
        varied, asked = self._terms.variants > 1 and asking.trust.samples(call), call
        call = self._variants.of(call, asking.namespace) if varied else call
        key = self._keys.key(call, asking.namespace, identity)
        now_ms = self._now_ms()
        found, nearest = await self._find(dialect, key, call, asking, identity, now_ms)
        if isinstance(found, Replay):
            self._serve(Departed(dialect, key, call, asking, identity, None), found)
            if varied and found.near is None:
                self._variants.served(asked, asking.namespace)
            return found
        if found.spare is not None and identity.away and identity.looked:
            # Whether it is back is found out without making anybody wait for it.
            self._buffer.used(found.spare.ready.entry.key, now_ms)
            return found.spare
        if asking.directives.only_if_cached:
            return Refused()
        # From here to the new flight nothing is awaited: two calls cannot both find none.
        joins = joins and self._may_join(key, asking, found.miss, now_ms)
        flight = self._under_way(key, call, asking, after) if joins else None
        if flight is not None:
            if after is not None:
                after.successor = flight
            flight.keeps = flight.keeps or asking.may_store
            return Fetching(flight, key, asking.namespace, found.miss, joined=True, spare=found.spare)
        departed = Departed(dialect, key, call, asking, identity, nearest)
        leased = self._leased(departed) if joins else None
        flight = self._depart(departed, asked if varied else None, leased)
        if after is not None and joins:
            after.successor = flight
        shadow = asking.near is not None and asking.near.shadow and nearest is not None and nearest.found is not None
        return Fetching(
            flight,
            key,
            asking.namespace,
            found.miss,
            joined=False,
            spare=found.spare,
            leased=leased,
            nearest=nearest,
            shadow=shadow,
        )

    async def look(self, dialect: Dialect, call: Call, asking: Asking) -> Look:
        """What `respond` would come to."""
        identity, now_ms = asking.identities.current, self._now_ms()
        if self._terms.variants > 1 and asking.trust.samples(call):
            call = self._variants.of(call, asking.namespace)
        key = self._keys.key(call, asking.namespace, identity)
        space = self._keys.space(call, asking.namespace, identity)
        keep = lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=call.volatile)
        nearest, terms = None, asking.near
        if self.near is not None and terms is not None and call.words is not None and len(call.words) <= LONGEST_TEXT:
            threshold, words = terms.threshold, call.words
            nearest = await self.near.find(space, asking.namespace, words, threshold=threshold, now_ms=now_ms)
        bypass = self._bypass(call, asking, identity)
        if bypass is not None:
            return Look(key, space, bypass, key in self._flights, nearest, keep)
        closed = barred(asking, identity)
        found: Found = Absent(closed) if closed else await self._lookup.stored(dialect, key, call, asking, now_ms)
        if isinstance(found, Absent) and found.miss in (Miss.ABSENT, Miss.EXPIRED) and nearest is not None:
            found = await self._lookup.near_reply(dialect, call, asking, nearest, now_ms) or found
        told = found.miss if isinstance(found, Absent) else found
        return Look(key, space, told, key in self._flights, nearest, keep)

    def relay(self, fetch: Fetch, *, drain: bool, sending: Sending = UNTRACKED, hurries: bool = False) -> Flight:
        """Fetch for one caller, keeping nothing; how the answer ended stays unknown.

        With `hurries`, others wait for its end, so that a caller who reads slowly must not hold it up.
        """
        ahead_bytes = self._terms.max_answer_bytes if hurries else 0
        flight = Flight(Unrecorded(ahead_bytes), stream=False, include_usage=False, drain=drain, sending=sending)
        self._watch(flight.depart(fetch, _forget))
        return flight

    def not_shared(self, key: bytes) -> None:
        """An answer under way could not be given to all who waited: for a while, nobody waits for another's."""
        self._unshared.note(key, self._now_ms())

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
    ) -> tuple[Found, Nearest | None]:
        closed = barred(asking, identity)
        # Who asks before the first is answered does not ask for another answer.
        if closed is None and self._is_retry(call, asking, now_ms) and key not in self._flights:
            closed = Miss.RETRY
        if closed is not None:
            return Absent(closed), None
        # While storage is asked, another task may have begun, or begun and ended, the same fetch: the first is found
        # among the flights by our caller, the second in memory by the look-up.
        found = await self._lookup.exact(dialect, key, call, asking, identity, now_ms)
        if isinstance(found, Replay) or found.miss not in (Miss.ABSENT, Miss.EXPIRED) or key in self._flights:
            return found, None
        nearest = await self._lookup.nearest(call, asking, identity, now_ms)
        near = await self._lookup.near_reply(dialect, call, asking, nearest, now_ms)
        # Meanwhile the very call may have been answered, or be under way.
        held = self._lookup.held(call, asking, identity, now_ms)
        return near or (held if held != _NOTHING else found), nearest

    def _is_retry(self, call: Call, asking: Asking, now_ms: int) -> bool:
        repeats = asking.trust.samples(call) and bool(asking.repeat)
        return repeats and self._repeats.is_retry(asking.repeat, now_ms)

    def _serve(self, departed: Departed, found: Replay) -> None:
        key, call, asking = departed.key, departed.call, departed.asking
        self._buffer.used(found.ready.entry.key, found.now_ms)
        if found.near is not None:
            self.served.note(found.ready.entry, call.words or "")
        late_ms = found.now_ms - found.ready.entry.expires_ms
        is_due = 0 <= late_ms < self._terms.lifetimes.revalidate_ms and not asking.directives.only_if_cached
        if is_due and asking.may_lead and asking.may_store and key not in self._flights:
            # Nobody reads it: it is fetched for whoever asks next.
            self._depart(departed, None, self._leased(departed))

    def _may_join(self, key: bytes, asking: Asking, miss: Miss, now_ms: int) -> bool:
        if not asking.may_lead or not asking.may_read or miss not in _JOINS:
            return False
        # What is known beforehand not to be kept was asked for by somebody who wants an answer of his own.
        own = isinstance(lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=False), Drop)
        return not (own or asking.directives.max_age_s == 0 or self._unshared.happened(key, now_ms))

    def _under_way(self, key: bytes, call: Call, asking: Asking, after: Flight | None) -> Flight | None:
        """The flight that serves this call, too; `after` has failed it."""
        flight = after.successor if after is not None else None
        if flight is not None and flight.failed:
            # What was asked for all whom the first failed is over by now: a look-up takes longer for some.
            return flight
        flight = flight or self._flights.get(key)
        if flight is None or flight is after or (after is None and flight.refused):
            return None
        return flight if flight.serves(call, usage_from_timings=asking.usage_from_timings) else None

    def _leased(self, departed: Departed) -> LeasedFetch | None:
        """The fetch as several processes may do it for one another; None where there are no others, or it is its own.

        Whoever waits for it waits in vain where its answer may not be stored.
        """
        asking, make = departed.asking, departed.asking.finished
        if self._leases is None or not self._leases.leases.shared or make is None or not asking.may_store:
            return None

        async def finished() -> Finished | None:
            one = departed
            replay = await self._lookup.anew(one.dialect, one.key, one.call, asking, one.identity, self._now_ms())
            return None if replay is None else make(replay)

        return LeasedFetch(self._leases, departed.key, asking.fetch, finished)

    def _depart(self, departed: Departed, varied: Call | None, leased: LeasedFetch | None) -> Flight:
        asking, call, key = departed.asking, departed.call, departed.key
        recorder = Recorder(
            departed.dialect,
            call,
            max_bytes=self._terms.max_answer_bytes,
            usage_from_timings=asking.usage_from_timings,
            trust=asking.trust,
        )
        flight = Flight(
            recorder,
            stream=call.stream,
            include_usage=call.include_usage or not departed.dialect.usage_on_request,
            drain=asking.drain,
            sending=asking.sending,
            echoed=call.echoed,
            overgrown=None if leased is None else lambda: leased.landed(Drop.TOO_LARGE),
        )

        async def land(flown: Flown) -> None:
            try:
                await self._land(departed, flown, varied, leased, may_store=asking.may_store or flight.keeps)
            finally:
                if self._flights.get(key) is flight:
                    del self._flights[key]

        leading = self._flights.get(key)
        if asking.may_lead and (leading is None or leading.refused or not leading.joinable):
            self._flights[key] = flight
        self._watch(flight.depart(leased or asking.fetch, land))
        return flight

    def _watch(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _land(
        self,
        departed: Departed,
        flown: Flown,
        varied: Call | None,
        leased: LeasedFetch | None,
        *,
        may_store: bool,
    ) -> None:
        if leased is not None and leased.collapsed:
            # It is stored already.
            return
        if departed.asking.sending.sent:
            self._observer.fetched(flown.seconds, flown.ttft_seconds)
        drop: Drop | None = Drop.UPSTREAM_GONE
        try:
            kept = await self._keeping.keep(departed, flown, self.near, leased, may_store=may_store)
            drop = kept if isinstance(kept, Drop) else None
            if drop is not None:
                self._observer.not_stored(drop)
                return
            if varied is not None:
                self._variants.served(varied, departed.asking.namespace)
            self._observer.stored()
        finally:
            if leased is not None:
                await leased.landed(drop)


_NOTHING = Absent(Miss.ABSENT)


async def _forget(flown: Flown) -> None:
    del flown
