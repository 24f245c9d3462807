"""The errands of one upstream that are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from proxy.cache.asking import Asking, Terms
from proxy.cache.bringing import Bringing, Order, Sent
from proxy.cache.errand import Errand, Gathered
from proxy.cache.flight import Flight, Flown
from proxy.cache.leasing import Claim, LeaseTerms
from proxy.cache.policy import Drop, Miss, lifetime
from proxy.cache.repeats import Lately
from storage.leases import Held, Taken

_JOINS = frozenset({Miss.ABSENT, Miss.EXPIRED, Miss.TOO_OLD, Miss.TOO_STALE_SOON, Miss.CLOCK})
"""Why an item is fetched that an answer under way would do for."""
_UNSHARED_MS = 10_000
"""For how long items go upstream side by side after an answer that could not be shared."""
_LARGEST = 128 * 1024 * 1024
"""Bytes of an answer beyond which it is only passed on; 2,048 vectors of 1,536 numbers, spelled out, are half of it."""


class Errands:
    """Sends errands, and finds the one that is under way for an item."""

    def __init__(
        self, bringing: Bringing, terms: Terms, now_ms: Callable[[], int], leases: LeaseTerms | None = None
    ) -> None:
        """`now_ms` is the clock, in ms since the epoch.

        `leases` are for the processes that share the store, where there may be any.
        """
        self._bringing = bringing
        self._terms = terms
        self._now_ms = now_ms
        self._leases = leases
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
        errand = self._by_key.get(key) or before
        if errand is None or errand.flight.refused or not errand.flight.joinable:
            return None
        return errand if self._may_join(key, asking, miss) else None

    def not_shared(self, keys: Sequence[bytes]) -> None:
        """What came for these items could not be given to all who waited: for a while, nobody waits for another's."""
        for key in keys:
            self._unshared.note(key, self._now_ms())

    async def send(self, order: Order, misses: Mapping[int, Miss]) -> dict[Errand, Sequence[int]]:
        """Fetch the items of these numbers, by errands for so many of them each.

        What other processes fetch now is left to an errand of its own, which waits for them. Where there are none,
        nothing is awaited.
        """
        if not misses:
            return {}
        numbers, terms = list(misses), self._sharing(order.asking)
        if terms is None:
            return {self._depart(order, numbers, None): numbers}
        joining = [number for number in numbers if self._may_join(order.keys[number], order.asking, misses[number])]
        if not joining:
            return {self._depart(order, numbers, None): numbers}
        standings = await terms.leases.take([order.keys[number] for number in joining])
        held = [number for number, one in zip(joining, standings, strict=True) if isinstance(one, Held)]
        waits = frozenset(held)
        free = [number for number in numbers if number not in waits]
        taken = [one for one in standings if isinstance(one, Taken)]
        errands: dict[Errand, Sequence[int]] = {}
        if free:
            errands[self._depart(order, free, Claim(terms, order.keys_of(free), taken))] = free
        if held:
            errands[self._depart(order, held, Claim(terms, order.keys_of(held)))] = held
        return errands

    def depart(self, order: Order, numbers: Sequence[int], *, waits: bool, after: Errand | None = None) -> Errand:
        """Fetch the items of these numbers; with `waits`, once no other process does. `after` has failed to."""
        terms = self._sharing(order.asking) if waits else None
        return self._depart(order, numbers, None if terms is None else Claim(terms, order.keys_of(numbers)), after)

    async def close(self) -> None:
        """Cancel what is still under way and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _may_join(self, key: bytes, asking: Asking, miss: Miss) -> bool:
        if not asking.may_lead or not asking.may_read or miss not in _JOINS:
            return False
        # What is known beforehand not to be kept was asked for by somebody who wants an answer of his own.
        own = isinstance(lifetime(self._terms.lifetimes, asking.ttl_ms, volatile=False), Drop)
        return not (own or asking.directives.max_age_s == 0 or self._unshared.happened(key, self._now_ms()))

    def _sharing(self, asking: Asking) -> LeaseTerms | None:
        """How other processes and this one may fetch for one another; None where there are none, or it is its own.

        Whoever waits for it waits in vain where its answer may not be stored.
        """
        if self._leases is None or not self._leases.leases.shared:
            return None
        return self._leases if asking.may_store and asking.finished is not None else None

    def _depart(self, order: Order, numbers: Sequence[int], claim: Claim | None, after: Errand | None = None) -> Errand:
        # As they stand in the client's own bytes, which go upstream where they are the whole batch.
        numbers = sorted(numbers)
        ask, sending = order.dispatch()
        gathered = Gathered(max(self._terms.max_answer_bytes, _LARGEST))
        flight = Flight(
            gathered,
            stream=False,
            include_usage=False,
            drain=order.asking.drain,
            sending=sending,
            overgrown=None if claim is None else lambda: claim.landed((), shareable=False),
        )
        errand = Errand(flight, gathered, order.keys_of(numbers), order.batch.form)
        if claim is None:
            errand.decide({})
        if order.asking.may_lead:
            self._announce(errand, after)
        sent = Sent(errand, order, numbers, ask, replace(order.asking, sending=sending), claim)

        async def land(flown: Flown) -> None:
            try:
                await self._bringing.land(sent, flown)
            finally:
                self._forget(errand)

        task = flight.depart(lambda: self._bringing.fetch(sent), land)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return errand

    def _announce(self, errand: Errand, after: Errand | None) -> None:
        for key in errand.keys:
            leading = self._by_key.get(key)
            if leading in (None, after) or leading.flight.refused or not leading.flight.joinable:
                self._by_key[key] = errand

    def _forget(self, errand: Errand) -> None:
        for key in errand.keys:
            if self._by_key.get(key) is errand:
                del self._by_key[key]
        errand.give_up()
