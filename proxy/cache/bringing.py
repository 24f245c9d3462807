"""What an errand brings: what other processes have stored meanwhile, the rest from the upstream; and keeping that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from proxy.cache.answer import NotUnderstood
from proxy.cache.asking import Asking, Terms
from proxy.cache.dialects.embeddings import EMBEDDINGS, Batch, part_of
from proxy.cache.dialects.laying import Part, apportioned
from proxy.cache.errand import AT_ONCE, STEP, Errand
from proxy.cache.flight import Flown
from proxy.cache.keeping import Departed, Keeping
from proxy.cache.leasing import Claim, Finished
from proxy.cache.lookup import Lookup
from proxy.cache.policy import Drop
from proxy.cache.ports import Fetch, Identity, Incoming, Observer, Sending
from storage.base import Entry

Ask = Callable[[Sequence[int] | None], Fetch]
"""Asks for the items at these places of the request, None: for all, with the client's own bytes."""
Dispatch = Callable[[], tuple[Ask, Sending]]
"""Begins one errand: how to ask, once, and how far that has come."""

_NOTHING = Finished({}, b"")
"""What comes where all was found elsewhere."""


@dataclass(frozen=True, slots=True)
class Order:
    """Who asks for a batch, and how; `keys` are those of its items."""

    batch: Batch
    keys: Sequence[bytes]
    asking: Asking
    identity: Identity
    dispatch: Dispatch

    def keys_of(self, numbers: Sequence[int]) -> list[bytes]:
        """The keys of the items of these numbers."""
        return [self.keys[number] for number in numbers]


@dataclass(frozen=True, slots=True)
class Sent:
    """An errand, and what it was sent for: the items of these numbers.

    `ask` and `asking` are its own. `claim` is on its keys, where other processes may fetch them, too.
    """

    errand: Errand
    order: Order
    numbers: Sequence[int]
    ask: Ask
    asking: Asking
    claim: Claim | None

    def left(self) -> Sequence[int]:
        """The numbers of the items that are not found elsewhere."""
        keys = frozenset(self.errand.left or ())
        return [number for number in self.numbers if self.order.keys[number] in keys]

    def places(self, numbers: Sequence[int]) -> list[int] | None:
        """Where in the request these items are; None: they are the whole request."""
        batch = self.order.batch
        return None if list(numbers) == list(range(len(batch.order))) else [batch.firsts[number] for number in numbers]

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """What these items weigh against each other."""
        return [self.order.batch.lengths[number] for number in numbers]


@dataclass(frozen=True, slots=True)
class _Told:
    """An identity that was confirmed already: once for all items."""

    current: Identity

    async def confirm(self) -> Identity:
        return self.current


class Bringing:
    """Does for one upstream what its errands are sent for."""

    def __init__(
        self, keeping: Keeping, lookup: Lookup, terms: Terms, observer: Observer, now_ms: Callable[[], int]
    ) -> None:
        """`now_ms` is the clock, in ms since the epoch."""
        self._keeping = keeping
        self._lookup = lookup
        self._terms = terms
        self._observer = observer
        self._now_ms = now_ms

    @asynccontextmanager
    async def fetch(self, sent: Sent) -> AsyncIterator[Incoming]:
        """See `Fetch`: asks for what nobody else has fetched, once it is our turn."""
        if sent.claim is not None:
            found: dict[bytes, Part] = {}
            await sent.claim.settle(lambda: self._find(sent, found))
            sent.errand.decide(found)
        left = sent.left()
        if not left:
            yield _NOTHING
            return
        async with sent.ask(sent.places(left))() as incoming:
            yield incoming

    async def land(self, sent: Sent, flown: Flown) -> None:
        """Tell all who wait what came, keep it, and let other processes have their turn."""
        stored: set[bytes] = set()
        try:
            await self._deliver(sent, flown, stored)
        finally:
            if sent.claim is not None:
                # Where its clients have left, the answer might have been as good as any.
                await sent.claim.landed(stored, shareable=flown.result is Drop.CLIENT_GONE)

    async def _find(self, sent: Sent, found: dict[bytes, Part]) -> Collection[bytes]:
        started = time.monotonic()
        for start in range(0, len(sent.numbers), AT_ONCE):
            numbers = sent.numbers[start : start + AT_ONCE]
            parts = await asyncio.gather(*(self._stored(sent, number) for number in numbers))
            keys = sent.order.keys_of(numbers)
            found |= {key: part for key, part in zip(keys, parts, strict=True) if part is not None}
            if time.monotonic() - started >= self._terms.lookup_timeout_s:
                # A store that takes so long for these is not asked for the others.
                break
        return found

    async def _stored(self, sent: Sent, number: int) -> Part | None:
        order, now_ms = sent.order, self._now_ms()
        key, item = order.keys[number], order.batch.items[number]
        with suppress(NotUnderstood, TimeoutError):
            replay = await self._lookup.anew(EMBEDDINGS, key, item, sent.asking, order.identity, now_ms)
            return None if replay is None else part_of(replay.ready.entry.answer)
        return None

    async def _deliver(self, sent: Sent, flown: Flown, stored: set[bytes]) -> None:
        errand, asking, left = sent.errand, sent.asking, sent.left()
        parts = flown.result if isinstance(flown.result, Drop) else await errand.unpack(sent.lengths(left))
        errand.deliver(parts)
        if asking.sending.sent:
            self._observer.fetched(flown.seconds, None)
        if isinstance(parts, Drop):
            self._observer.not_stored(parts)
            return
        if not left:
            # Under its key is what the very model said that the batch was looked up for.
            errand.settle(steady=True)
            return
        after = await asking.identities.confirm()
        errand.settle(steady=after.trusted and after.epoch == sent.order.identity.epoch)
        told = replace(sent, asking=replace(asking, identities=_Told(after)))
        for drop in await self._keep(told, dict(zip(left, parts, strict=True)), flown.seconds, stored):
            self._observer.not_stored(drop)

    async def _keep(self, sent: Sent, parts: Mapping[int, Part], seconds: float, stored: set[bytes]) -> set[Drop]:
        """Keep each item, and add its key to `stored`; why some are not kept."""
        drops: set[Drop] = set()
        numbers = list(parts)
        costs_ms = dict(zip(numbers, apportioned(round(seconds * 1000), sent.lengths(numbers)), strict=True))
        for start in range(0, len(numbers), STEP):
            some = sent.order.keys_of(numbers[start : start + STEP])
            ours = some if sent.claim is None else await sent.claim.may_store(some)
            for number, key in zip(numbers[start:], some, strict=False):
                kept = (
                    await self._kept(sent, number, parts[number], costs_ms[number]) if key in ours else Drop.LEASE_LOST
                )
                if isinstance(kept, Drop):
                    drops.add(kept)
                else:
                    stored.add(key)
                    self._observer.stored()
            await asyncio.sleep(0)
        return drops

    async def _kept(self, sent: Sent, number: int, part: Part, cost_ms: int) -> Entry | Drop:
        order = sent.order
        departed = Departed(
            EMBEDDINGS, order.keys[number], order.batch.items[number], sent.asking, order.identity, None
        )
        fits = part.vector.weight <= self._terms.max_answer_bytes
        flown = Flown(part.recorded if fits else Drop.TOO_LARGE, cost_ms / 1000, None)
        return await self._keeping.keep(departed, flown, None, may_store=sent.asking.may_store)
