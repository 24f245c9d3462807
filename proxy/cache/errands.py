"""The errands of one upstream that are under way, and keeping what they bring."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from proxy.cache.asking import Asking, Terms
from proxy.cache.dialects.call import Call
from proxy.cache.dialects.embeddings import EMBEDDINGS, Batch, Part, apportioned
from proxy.cache.errand import STEP, Errand, Gathered
from proxy.cache.flight import Flight, Flown
from proxy.cache.keeping import Departed, Keeping
from proxy.cache.keys import Keys
from proxy.cache.policy import Drop, Miss, lifetime
from proxy.cache.ports import Fetch, Identity, Observer, Sending
from proxy.cache.repeats import Lately

Dispatch = Callable[[Sequence[int] | None], tuple[Fetch, Sending]]
"""How to ask for the items at these places of the request, None: for all, with the client's own bytes."""

_JOINS = frozenset({Miss.ABSENT, Miss.EXPIRED, Miss.TOO_OLD, Miss.TOO_STALE_SOON, Miss.CLOCK})
"""Why an item is fetched that an answer under way would do for."""
_UNSHARED_MS = 10_000
"""For how long items go upstream side by side after an answer that could not be shared."""
_LARGEST = 128 * 1024 * 1024
"""Bytes of an answer beyond which it is only passed on; 2,048 vectors of 1,536 numbers, spelled out, are half of it."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an errand was sent for. `keys`, `items` and `lengths` belong together."""

    keys: Sequence[bytes]
    items: Sequence[Call]
    lengths: Sequence[int]
    asking: Asking
    identity: Identity


@dataclass(frozen=True, slots=True)
class _Told:
    """An identity that was confirmed already: once for all items."""

    current: Identity

    async def confirm(self) -> Identity:
        return self.current


class Errands:
    """Sends errands, and finds the one that is under way for an item."""

    def __init__(
        self, keys: Keys, keeping: Keeping, terms: Terms, observer: Observer, now_ms: Callable[[], int]
    ) -> None:
        """`keeping` keeps what they bring; `now_ms` is the clock, in ms since the epoch."""
        self._keys = keys
        self._keeping = keeping
        self._terms = terms
        self._observer = observer
        self._now_ms = now_ms
        self._by_key: dict[bytes, Errand] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unshared = Lately(_UNSHARED_MS)

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._tasks)

    def __contains__(self, key: bytes) -> bool:
        """Whether one is under way for the item of this key."""
        return key in self._by_key

    def of(self, key: bytes) -> Errand | None:
        """The one that is under way for the item of this key."""
        return self._by_key.get(key)

    def joinable(self, key: bytes, asking: Asking, miss: Miss, before: Errand | None = None) -> Errand | None:
        """The one that brings the item of this key to this caller, too; `before` was under way for it a moment ago."""
        if not asking.may_lead or not asking.may_read or miss not in _JOINS:
            return None
        # What is known beforehand not to be kept was asked for by somebody who wants an answer of his own.
        own = isinstance(lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=False), Drop)
        if own or asking.directives.max_age_s == 0 or self._unshared.happened(key, self._now_ms()):
            return None
        errand = self._by_key.get(key) or before
        return errand if errand is not None and errand.flight.joinable else None

    def not_shared(self, keys: Sequence[bytes]) -> None:
        """What came for these items could not be given to all who waited: for a while, nobody waits for another's."""
        for key in keys:
            self._unshared.note(key, self._now_ms())

    def depart(
        self, batch: Batch, numbers: Sequence[int], asking: Asking, identity: Identity, dispatch: Dispatch
    ) -> Errand:
        """Fetch the items of these numbers."""
        whole = len(numbers) == len(batch.order)
        fetch, sending = dispatch(None if whole else [batch.firsts[number] for number in numbers])
        items = [batch.items[number] for number in numbers]
        asked = _Asked(
            keys=[self._keys.key(item, asking.namespace, identity) for item in items],
            items=items,
            lengths=[batch.lengths[number] for number in numbers],
            asking=replace(asking, sending=sending),
            identity=identity,
        )
        gathered = Gathered(len(numbers), max(self._terms.max_answer_bytes, _LARGEST))
        flight = Flight(gathered, stream=False, include_usage=False, drain=asking.drain, sending=sending)
        errand = Errand(flight, gathered, asked.keys, batch.form)
        if asking.may_lead:
            self._announce(errand)

        async def land(flown: Flown) -> None:
            try:
                await self._land(errand, asked, flown)
            finally:
                self._forget(errand)

        task = flight.depart(fetch, land)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return errand

    async def close(self) -> None:
        """Cancel what is still under way and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _announce(self, errand: Errand) -> None:
        for key in errand.keys:
            leading = self._by_key.get(key)
            if leading is None or not leading.flight.joinable:
                self._by_key[key] = errand

    def _forget(self, errand: Errand) -> None:
        for key in errand.keys:
            if self._by_key.get(key) is errand:
                del self._by_key[key]
        errand.give_up()

    async def _land(self, errand: Errand, asked: _Asked, flown: Flown) -> None:
        parts = flown.result if isinstance(flown.result, Drop) else await errand.unpack(asked.lengths)
        errand.deliver(parts)
        asking = asked.asking
        if asking.sending.sent:
            self._observer.fetched(flown.seconds, None)
        if isinstance(parts, Drop):
            self._observer.not_stored(parts)
            return
        after = await asking.identities.confirm()
        errand.settle(steady=after.trusted and after.epoch == asked.identity.epoch)
        asked = replace(asked, asking=replace(asking, identities=_Told(after)))
        for drop in await self._keep(asked, parts, flown.seconds):
            self._observer.not_stored(drop)

    async def _keep(self, asked: _Asked, parts: Sequence[Part], seconds: float) -> set[Drop]:
        """Keep each item; why some are not kept."""
        drops: set[Drop] = set()
        costs_ms = apportioned(round(seconds * 1000), asked.lengths)
        for number, part in enumerate(parts):
            departed = Departed(EMBEDDINGS, asked.keys[number], asked.items[number], asked.asking, asked.identity, None)
            fits = part.vector.weight <= self._terms.max_answer_bytes
            flown = Flown(part.recorded if fits else Drop.TOO_LARGE, costs_ms[number] / 1000, None)
            kept = await self._keeping.keep(departed, flown, None, may_store=departed.asking.may_store)
            if isinstance(kept, Drop):
                drops.add(kept)
            else:
                self._observer.stored()
            if number % STEP == STEP - 1:
                await asyncio.sleep(0)
        return drops
