"""Whether and how an answer that was fetched is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.cache.answer import NotUnderstood, Recorded
from proxy.cache.asking import Asking, Terms
from proxy.cache.dialects.call import KEY_VERSION, Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Flown
from proxy.cache.hot import HotTier, Ready
from proxy.cache.keys import Keys, topic
from proxy.cache.leasing import LeasedFetch
from proxy.cache.near.matcher import LONGEST_TEXT
from proxy.cache.near.tier import Nearest, NearTier, Step
from proxy.cache.policy import Drop, Keep, lifetime
from proxy.cache.ports import Identity
from proxy.cache.sealing import sealed
from storage.base import Entry, Sketch
from storage.write_behind import WriteBehind


@dataclass(frozen=True, slots=True)
class Departed:
    """A call that was sent upstream, as it was then. `key` is where its answer is found."""

    dialect: Dialect
    key: bytes
    call: Call
    asking: Asking
    identity: Identity
    nearest: Nearest | None


class Keeping:
    """Keeps answers of one upstream."""

    def __init__(
        self, upstream: str, keys: Keys, buffer: WriteBehind, hot: HotTier, terms: Terms, now_ms: Callable[[], int]
    ) -> None:
        """Keep them in `hot` and `buffer`; `upstream` names the server."""
        self._upstream = upstream
        self._keys = keys
        self._buffer = buffer
        self._hot = hot
        self._terms = terms
        self._now_ms = now_ms

    async def keep(
        self,
        departed: Departed,
        flown: Flown,
        near: NearTier | None,
        leased: LeasedFetch | None = None,
        *,
        may_store: bool,
    ) -> Entry | Drop:
        """Keep what came back, or say why not; `leased` is the fetch where another process might have done it.

        `may_store` says that the answers of somebody who gets this one may be kept.
        """
        asking, call = departed.asking, departed.call
        if isinstance(flown.result, Drop):
            return flown.result
        if asking.sending.tainted:
            return Drop.TAINTED
        if not may_store:
            return Drop.READ_ONLY
        keep = lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=call.volatile)
        if isinstance(keep, Drop):
            return keep
        after = await asking.identities.confirm()
        if not (departed.identity.confirmed and after.confirmed and after.epoch == departed.identity.epoch):
            return Drop.IN_DOUBT
        try:
            entry = self._entry(departed, flown.result, keep, flown.seconds)
        except NotUnderstood:
            return Drop.NOT_UNDERSTOOD
        sketch = await _sketch(near, entry, departed.nearest)
        if leased is not None and not await leased.may_store():
            return Drop.LEASE_LOST
        stored = sealed(entry, call.digest) if self._terms.seals else entry
        if not self._buffer.put(stored, sketch):
            return Drop.STORAGE_BEHIND
        place = self._keys.place(call, entry.namespace, entry.fingerprint)
        self._hot.put(place, Ready(entry, departed.dialect))
        return entry

    def _entry(self, departed: Departed, recorded: Recorded, keep: Keep, seconds: float) -> Entry:
        call, asking, identity = departed.call, departed.asking, departed.identity
        now_ms, gist = self._now_ms(), recorded.gist
        return Entry(
            key=departed.key,
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
            prompt_tokens=gist.prompt_tokens,
            completion_tokens=gist.completion_tokens,
            usage_known=recorded.usage_known,
            answer=recorded.encoded(),
            near=call.words is not None
            and len(call.words) <= LONGEST_TEXT
            and recorded.may_be_near(limited=asking.trust.is_limited(call, gist.completion_tokens)),
            topic=topic(call, asking.namespace),
            grace_ms=keep.grace_ms,
        )


async def _sketch(near: NearTier | None, entry: Entry, nearest: Nearest | None) -> Sketch | None:
    if near is None or not entry.near or entry.words is None:
        # Until the lists are loaded, and where the near tier is off: made up for later, in the background.
        return None
    if nearest is not None and nearest.step is not Step.KEY:
        return nearest.sketch
    return await near.sketch(entry.words, entry.space)
