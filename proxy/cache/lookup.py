"""Looking an answer up: in memory, in storage, and among those to other words."""

from __future__ import annotations

import asyncio
import time

from proxy.cache.asking import Absent, Asking, Found, Replay, Terms
from proxy.cache.dialects.call import Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.hot import HotTier, Place, Ready
from proxy.cache.keys import Keys
from proxy.cache.near.matcher import LONGEST_TEXT
from proxy.cache.near.tier import Nearest, NearTier
from proxy.cache.policy import Miss, decide, is_stale, may_stand_in
from proxy.cache.ports import Identity, Observer
from proxy.cache.sealing import opened
from storage.base import Entry
from storage.write_behind import WriteBehind

_UNSERVABLE = frozenset({Miss.EXPIRED, Miss.TOO_OLD, Miss.TOO_STALE_SOON})
"""Why an entry does not answer a call that it may yet answer for want of another."""


class Lookup:
    """Finds answers of one upstream."""

    def __init__(self, keys: Keys, buffer: WriteBehind, hot: HotTier, terms: Terms, observer: Observer) -> None:
        """Look in `hot`, then in `buffer`."""
        self._keys = keys
        self._buffer = buffer
        self._hot = hot
        self._terms = terms
        self._observer = observer
        self.near: NearTier | None = None
        """The near tier, once its lists are loaded."""

    async def exact(
        self, dialect: Dialect, key: bytes, call: Call, asking: Asking, identity: Identity, now_ms: int
    ) -> Found:
        """The answer to this very call; what comes from storage is held in memory from then on."""
        held = self.held(call, asking, identity, now_ms)
        if isinstance(held, Replay) or held.spare is not None or held.miss is not Miss.ABSENT:
            return held
        if self._buffer.lacks(key):
            return held
        place = self._keys.place(call, asking.namespace, identity.fingerprint)
        ready = await self._load(dialect, call, key, place, now_ms)
        # While storage was asked, another task may have begun and ended the same fetch.
        return self._judged(ready, call, asking, now_ms) if ready else self.held(call, asking, identity, now_ms)

    def held(self, call: Call, asking: Asking, identity: Identity, now_ms: int) -> Found:
        """The answer to this very call as far as memory knows."""
        ready = self._hot.get(self._keys.place(call, asking.namespace, identity.fingerprint), now_ms)
        return self._judged(ready, call, asking, now_ms) if ready else Absent(Miss.ABSENT)

    async def stored(self, dialect: Dialect, key: bytes, call: Call, asking: Asking, now_ms: int) -> Found:
        """What `exact` would find, without counting it or keeping it in memory."""
        entry = await self._get(key, call, now_ms)
        return self._judged(Ready(entry, dialect), call, asking, now_ms) if entry else Absent(Miss.ABSENT)

    async def anew(
        self, dialect: Dialect, key: bytes, call: Call, asking: Asking, identity: Identity, now_ms: int
    ) -> Replay | None:
        """A fresh answer to this very call that another process may have stored a moment ago."""
        async with asyncio.timeout(self._terms.lookup_timeout_s):
            entry = await self._buffer.get_anew(key, now_ms)
        entry = opened(entry, call.digest) if entry else None
        if entry is None or is_stale(entry, now_ms):
            return None
        if decide(entry, asking.directives, needs_usage=call.needs_usage, now_ms=now_ms) is not None:
            return None
        ready = Ready(entry, dialect)
        self._hot.put(self._keys.place(call, asking.namespace, identity.fingerprint), ready)
        return Replay(ready, now_ms)

    async def nearest(self, call: Call, asking: Asking, identity: Identity, now_ms: int) -> Nearest | None:
        """What the near tier comes to, where it may look; None where storage takes too long, too."""
        near, terms = self.near, asking.near
        if near is None or terms is None or call.words is None or len(call.words) > LONGEST_TEXT:
            return None
        space, started = self._keys.space(call, asking.namespace, identity), time.perf_counter()
        try:
            async with asyncio.timeout(self._terms.lookup_timeout_s):
                nearest = await near.find(space, asking.namespace, call.words, threshold=terms.threshold, now_ms=now_ms)
        except TimeoutError:
            self._buffer.report_slow()
            return None
        self._observer.looked_near(time.perf_counter() - started, nearest)
        return nearest

    async def near_reply(
        self, dialect: Dialect, call: Call, asking: Asking, nearest: Nearest | None, now_ms: int
    ) -> Replay | None:
        """The answer that the near tier found, where it may be given."""
        if nearest is None or nearest.found is None or asking.near is None or asking.near.shadow:
            return None
        try:
            async with asyncio.timeout(self._terms.lookup_timeout_s):
                entry = await self._buffer.get(nearest.found.candidate.key, now_ms)
        except TimeoutError:
            self._buffer.report_slow()
            return None
        if entry is None or entry.expires_ms <= now_ms:
            # What is past its time is given for nothing but itself.
            return None
        if decide(entry, asking.directives, needs_usage=call.needs_usage, now_ms=now_ms) is not None:
            return None
        return Replay(Ready(entry, dialect), now_ms, nearest.found)

    def _judged(self, ready: Ready, call: Call, asking: Asking, now_ms: int) -> Found:
        entry, directives, usage = ready.entry, asking.directives, call.needs_usage
        lifetimes, replay = self._terms.lifetimes, Replay(ready, now_ms)
        miss = decide(entry, directives, needs_usage=usage, now_ms=now_ms, revalidate_ms=lifetimes.revalidate_ms)
        if miss is None:
            return replay
        if_error_ms = lifetimes.if_error_ms
        stands_in = miss in _UNSERVABLE and may_stand_in(
            entry, directives, needs_usage=usage, now_ms=now_ms, if_error_ms=if_error_ms
        )
        return Absent(miss, replay if stands_in else None)

    async def _load(self, dialect: Dialect, call: Call, key: bytes, place: Place, now_ms: int) -> Ready | None:
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

    async def _get(self, key: bytes, call: Call, now_ms: int) -> Entry | None:
        entry = await self._buffer.get(key, now_ms)
        return opened(entry, call.digest) if entry else None


def barred(asking: Asking, identity: Identity) -> Miss | None:
    """Why nothing may be given from the cache."""
    if not identity.trusted:
        return Miss.IN_DOUBT
    if not asking.may_read:
        return Miss.UNCONFIRMED
    return Miss.NO_CACHE if asking.directives.no_cache else None
