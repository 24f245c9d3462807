"""Batches of items that each have an answer of their own: look all up, fetch what is missing once, keep each.

What can happen to an item that is not in the cache:

* Nobody has asked for it: this batch sends an errand for all such items together.
* An errand of another batch is under way for it: this batch waits for that one, and sends its own for the others.
* While storage was asked about the items of this batch, such an errand began, or began and ended: the first is found
  among the errands, the second in memory, where everything is looked up once more before anything is sent.
* Such an errand was under way at first and has ended meanwhile, and memory is too small for all that it brought: it is
  remembered, and heard as if it went on.
* Another process that shares the store asks for it: an errand of its own waits for that, and asks for what the other
  did not store; see `proxy.cache.leasing`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proxy.cache.answer import NotUnderstood
from proxy.cache.asking import Absent, Asking, Found, Refused, Replay, Terms
from proxy.cache.bringing import Bringing, Dispatch, Order
from proxy.cache.dialects.embeddings import EMBEDDINGS, Batch, part_of
from proxy.cache.dialects.laying import Part
from proxy.cache.errand import AT_ONCE, STEP, Errand
from proxy.cache.errands import Errands
from proxy.cache.hot import HotTier
from proxy.cache.keeping import Keeping
from proxy.cache.keys import Keys
from proxy.cache.leasing import LeaseTerms
from proxy.cache.lookup import Lookup, barred
from proxy.cache.policy import Bypass, Drop, Keep, Miss, lifetime
from proxy.cache.ports import Identity, Observer
from storage.write_behind import WriteBehind

_NOTHING = Absent(Miss.ABSENT)


@dataclass(frozen=True, slots=True)
class Known:
    """An item that the cache answers: the stored answer, and what it says."""

    replay: Replay
    part: Part


@dataclass(frozen=True, slots=True)
class Gathering:
    """What a batch comes from; items by their numbers.

    The errands in `sent` were sent for this batch, those in `joined` for others, for these items of it and perhaps
    more. All other items are `known`. `misses` say why the rest is not, `spares` what may stand in for it.
    """

    batch: Batch
    keys: Sequence[bytes]
    asking: Asking
    identity: Identity
    now_ms: int
    known: Mapping[int, Known]
    misses: Mapping[int, Miss]
    spares: Mapping[int, Known]
    sent: Mapping[Errand, Sequence[int]]
    joined: Mapping[Errand, Sequence[int]]

    @property
    def places_known(self) -> int:
        """How many inputs the cache answers, repeated ones included."""
        return sum(number in self.known for number in self.batch.order)


@dataclass(frozen=True, slots=True)
class BatchLook:
    """What a batch would come to, without serving or fetching anything.

    `found` is what would answer each item, or why nothing would; `in_flight` are the numbers of items under way, and
    `keep` is what would become of a good answer from upstream.
    """

    bypass: Bypass | None
    keys: Sequence[bytes]
    found: Sequence[Replay | Miss]
    in_flight: frozenset[int]
    keep: Keep | Drop


class Batches:
    """Answers batches to one upstream from one store."""

    def __init__(
        self,
        upstream: str,
        buffer: WriteBehind,
        hot: HotTier,
        terms: Terms,
        observer: Observer,
        now_ms: Callable[[], int],
        leases: LeaseTerms | None = None,
    ) -> None:
        """`upstream` names the server in keys; `now_ms` is the clock, in ms since the epoch.

        `leases` are for the processes that share the store, where there may be any.
        """
        self._keys = keys = Keys(upstream)
        self._buffer = buffer
        self._hot = hot
        self._terms = terms
        self._now_ms = now_ms
        self._lookup = Lookup(keys, buffer, hot, terms, observer)
        keeping = Keeping(upstream, keys, buffer, hot, terms, now_ms)
        bringing = Bringing(keeping, self._lookup, terms, observer, now_ms)
        self._errands = Errands(bringing, terms, now_ms, leases)
        self._turn = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        """How many fetches are under way."""
        return len(self._errands)

    async def respond(self, batch: Batch, asking: Asking, dispatch: Dispatch) -> Gathering | Refused | Bypass:
        """Find or send for what answers a batch. Whoever takes a `Gathering` reads its errands before all else."""
        identity = asking.identities.current
        bypass = self._bypass(batch, asking, identity)
        if bypass is not None:
            return bypass
        now_ms = self._now_ms()
        keys = [self._keys.key(item, asking.namespace, identity) for item in batch.items]
        found, before = await self._find(batch, keys, asking, identity, now_ms)
        known, absent = await self._read_all(found)
        order = Order(batch, keys, asking, identity, dispatch)
        if not absent:
            # Nothing is asked for, so that nobody who waits for leases holds it up.
            return await self._gather(order, known, absent, before, now_ms)
        # One at a time: two batches cannot both find no errand for an item.
        async with self._turn:
            return await self._gather(order, known, absent, before, now_ms)

    async def _gather(
        self,
        order: Order,
        known: dict[int, Known],
        absent: Mapping[int, Absent],
        before: Mapping[int, Errand],
        now_ms: int,
    ) -> Gathering | Refused:
        batch, keys, asking, identity = order.batch, order.keys, order.asking, order.identity
        known |= self._meanwhile(batch, absent, asking, identity, now_ms)
        spares = {number: spare for number, one in absent.items() if (spare := self._read(one.spare))}
        missing = {number: one.miss for number, one in absent.items() if number not in known}
        if identity.away and identity.looked and missing.keys() <= spares.keys():
            # Whether it is back is found out without making anybody wait for it.
            known |= {number: spares[number] for number in missing}
            missing = {}
        for one in known.values():
            self._buffer.used(one.replay.ready.entry.key, now_ms)
        if asking.directives.only_if_cached:
            if missing:
                return Refused()
            return Gathering(batch, keys, asking, identity, now_ms, known, {}, {}, {}, {})
        joined: dict[Errand, list[int]] = {}
        for number, miss in missing.items():
            errand = self._errands.joinable(keys[number], asking, miss, before.get(number))
            if errand is not None:
                joined.setdefault(errand, []).append(number)
        waited = {number for numbers in joined.values() for number in numbers}
        self._renew(order, known)
        sent = await self._errands.send(
            order, {number: miss for number, miss in missing.items() if number not in waited}
        )
        # Meanwhile, all who read one of the others' may have left it.
        lost = [errand for errand in joined if not errand.flight.joinable]
        again = [number for errand in lost for number in joined.pop(errand)]
        if again:
            sent[self._errands.depart(order, again, waits=True)] = again
        return Gathering(
            batch=batch,
            keys=keys,
            asking=asking,
            identity=identity,
            now_ms=now_ms,
            known=known,
            misses=missing,
            spares=spares,
            sent=sent,
            joined=joined,
        )

    def ask_again(
        self, gathering: Gathering, numbers: Sequence[int], dispatch: Dispatch, after: Errand
    ) -> tuple[dict[Errand, list[int]], Errand | None]:
        """Have items fetched once more that `after` did not bring: those whom it failed ask for each of them once.

        The errands of others that bring some of them, and the one that was sent for the rest.
        """
        joined: dict[Errand, list[int]] = {}
        for number in numbers:
            errand = self._errands.joinable(gathering.keys[number], gathering.asking, gathering.misses[number])
            if errand is not None and errand is not after:
                joined.setdefault(errand, []).append(number)
        waited = {number for some in joined.values() for number in some}
        rest = [number for number in numbers if number not in waited]
        if not rest:
            return joined, None
        order = Order(gathering.batch, gathering.keys, gathering.asking, gathering.identity, dispatch)
        return joined, self._errands.depart(order, rest, waits=True, after=after)

    def ask_alone(self, gathering: Gathering, numbers: Sequence[int], dispatch: Dispatch, *, shared: bool) -> Errand:
        """Send for items that another's errand did not bring; without `shared`, nobody waits for these for a while."""
        order = Order(gathering.batch, gathering.keys, gathering.asking, gathering.identity, dispatch)
        errand = self._errands.depart(order, numbers, waits=shared)
        if not shared:
            self._errands.not_shared(errand.keys)
        return errand

    async def look(self, batch: Batch, asking: Asking) -> BatchLook:
        """What `respond` would come to."""
        identity, now_ms = asking.identities.current, self._now_ms()
        keys = [self._keys.key(item, asking.namespace, identity) for item in batch.items]
        bypass, closed = self._bypass(batch, asking, identity), barred(asking, identity)
        keep = lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=False)
        in_flight = frozenset(number for number, key in enumerate(keys) if key in self._errands)
        if bypass is not None or closed is not None:
            return BatchLook(bypass, keys, [closed or Miss.ABSENT] * len(keys), in_flight, keep)
        found: list[Replay | Miss] = []
        for key, item in zip(keys, batch.items, strict=True):
            stored = await self._lookup.stored(EMBEDDINGS, key, item, asking, now_ms)
            found.append(stored if isinstance(stored, Replay) else stored.miss)
        return BatchLook(None, keys, found, in_flight, keep)

    async def close(self) -> None:
        """Cancel what is still under way and wait for it."""
        await self._errands.close()

    def _bypass(self, batch: Batch, asking: Asking, identity: Identity) -> Bypass | None:
        if asking.directives.no_store:
            return Bypass.NO_STORE
        return asking.trust.bypass(batch.call) or (Bypass.NO_FINGERPRINT if identity.fingerprint is None else None)

    async def _find(
        self, batch: Batch, keys: Sequence[bytes], asking: Asking, identity: Identity, now_ms: int
    ) -> tuple[list[Found], dict[int, Errand]]:
        """What memory and storage have of each item, and the errands under way for some."""
        closed = barred(asking, identity)
        if closed is not None:
            return [Absent(closed)] * len(keys), {}
        found: list[Found] = []
        unknown: list[int] = []
        before: dict[int, Errand] = {}
        for number, (key, item) in enumerate(zip(keys, batch.items, strict=True)):
            found.append(self._lookup.held(item, asking, identity, now_ms))
            errand = self._errands.of(key)
            if errand is not None:
                before[number] = errand
            # What is stored is given, or may stand in, whoever has it fetched anew.
            if found[-1] == _NOTHING and not self._buffer.lacks(key):
                unknown.append(number)
            await _let_others(number)
        for start in range(0, len(unknown), AT_ONCE):
            numbers, started = unknown[start : start + AT_ONCE], time.monotonic()
            looks = (
                self._lookup.exact(EMBEDDINGS, keys[number], batch.items[number], asking, identity, now_ms)
                for number in numbers
            )
            for number, one in zip(numbers, await asyncio.gather(*looks), strict=True):
                found[number] = one
            if time.monotonic() - started >= self._terms.lookup_timeout_s:
                # A store that takes so long for these is not asked for the others.
                break
        return found, before

    async def _read_all(self, found: Sequence[Found]) -> tuple[dict[int, Known], dict[int, Absent]]:
        known: dict[int, Known] = {}
        absent: dict[int, Absent] = {}
        for number, one in enumerate(found):
            read = self._read(one) if isinstance(one, Replay) else None
            if read is not None:
                known[number] = read
            else:
                absent[number] = one if isinstance(one, Absent) else _NOTHING
            await _let_others(number)
        return known, absent

    def _read(self, replay: Replay | None) -> Known | None:
        if replay is None:
            return None
        try:
            return Known(replay, part_of(replay.ready.entry.answer))
        except NotUnderstood:
            self._hot.discard_entry(replay.ready.entry.key)
            self._buffer.delete(replay.ready.entry.key)
            return None

    def _meanwhile(
        self, batch: Batch, absent: Mapping[int, Absent], asking: Asking, identity: Identity, now_ms: int
    ) -> dict[int, Known]:
        """What was answered while others of the batch were looked for."""
        if barred(asking, identity) is not None:
            return {}
        found: dict[int, Known] = {}
        for number in absent:
            held = self._lookup.held(batch.items[number], asking, identity, now_ms)
            read = self._read(held) if isinstance(held, Replay) else None
            if read is not None:
                found[number] = read
        return found

    def _renew(self, order: Order, known: Mapping[int, Known]) -> None:
        """Fetch for whoever asks next what is given though its time is over. Nobody reads it."""
        asking, identity = order.asking, order.identity
        if identity.away or not (asking.may_lead and asking.may_store):
            return
        window_ms = self._terms.lifetimes.revalidate_ms
        due = [
            number
            for number, one in known.items()
            if 0 <= one.replay.now_ms - one.replay.ready.entry.expires_ms < window_ms
            and order.keys[number] not in self._errands
        ]
        if due:
            self._errands.depart(order, due, waits=True)


async def _let_others(number: int) -> None:
    if number % STEP == STEP - 1:
        await asyncio.sleep(0)
