"""One fetch for equal calls, or equal items of batches, at several processes that share a store; see `storage.leases`.

Within a process a `Flight` does that; this is put in front of its fetch. What can happen, A and B being two processes
that both looked in the store and found nothing:

* A takes the lease and fetches. B finds it held and waits. A stores the answer, has it written to the file, and only
  then releases. B takes the lease and looks in the store *again*: there it is.
* B looked in the store before A's answer was written, and comes to the lease when A has released it. It is taken at
  once, nobody seems to have held it: the second look finds the answer all the same.
* A's client leaves, or A is killed, or is paused for longer than a term: B takes the lease, finds nothing, and fetches.
  Of several that wait, one does. Should A come back, it finds that it was overtaken, and does not store.
* A's answer is not to be kept (an error, say): its release says so, and all who wait ask upstream at once.
* A is killed after it wrote the answer and before it released: B takes the lease and finds the answer.
* Leases fail, or B has waited for too long: B asks upstream without one. The store is looked at once more before.

While B waits, its call was not sent: should its clients leave, nothing need be fetched.

A batch is fetched under a lease for each of its items. Whoever waits for some holds none meanwhile, and takes them all
together once all are free: two that wait for each other's items would wait for good.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from proxy.cache.policy import Drop
from proxy.cache.ports import Fetch, Incoming
from storage.leases import Held, Leases, Taken

log = logging.getLogger("nearhit")

_FIRST_S = 0.02
_LONGEST_S = 0.25
_SHARE = 0.1
"""Part of the time that was waited already which may be waited in vain."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer from the store in place of the upstream's response; `body` is in the form that the call wants."""

    headers: Mapping[str, str]
    body: bytes
    status: int = 200
    reason: str = "OK"

    async def chunks(self) -> AsyncIterator[bytes]:
        """See `proxy.cache.ports.Incoming`."""
        yield self.body


Look = Callable[[], Awaitable[Collection[bytes]]]
"""Finds the keys of a claim whose answers are in the file, whatever is believed to be there."""


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How calls of several processes are made one.

    `flush` writes what was stored to where others find it, and tells whether it could. `timeout_s` bounds the waiting
    for others; 0 does not.
    """

    leases: Leases
    flush: Callable[[], Awaitable[bool]]
    timeout_s: float


class Claim:
    """The leases of one fetch on the keys that it is for. Used once."""

    def __init__(self, terms: LeaseTerms, keys: Sequence[bytes], taken: Iterable[Taken] | None = None) -> None:
        """`taken` are leases that are ours already, and nobody is waited for; None: they are still to be had."""
        self._terms = terms
        self._keys = keys
        self._waits = taken is None
        self._taken = {lease.key: lease for lease in taken or ()}

    async def settle(self, look: Look) -> list[bytes]:
        """Wait for our turn, and look whether there are answers; the keys that are to be fetched all the same."""
        if self._waits:
            await self._wait()
        found = await self._found(look)
        held = [self._taken.pop(key) for key in found if key in self._taken]
        await self._release(held, shareable=True)
        return [key for key in self._keys if key not in found]

    async def may_store(self, keys: Sequence[bytes]) -> Collection[bytes]:
        """Those that nobody has overtaken us with; to be asked right before their answers are stored."""
        taken = [self._taken[key] for key in keys if key in self._taken]
        held = {lease.key for lease in await self._terms.leases.holds(taken)} if taken else set()
        return [key for key in keys if key in held or key not in self._taken]

    async def landed(self, stored: Collection[bytes], *, shareable: bool) -> None:
        """Let the others have their turn; to be called once after the fetch, however it ended.

        `stored` are the keys of the answers that were; `shareable` says that the others might have been as good as any.
        """
        leases, self._taken = self._taken, {}
        written = False
        try:
            await self._release([lease for key, lease in leases.items() if key not in stored], shareable=shareable)
            written = any(key in stored for key in leases) and await self._terms.flush()
        finally:
            await self._release([lease for key, lease in leases.items() if key in stored], shareable=written)

    async def _release(self, leases: Collection[Taken], *, shareable: bool) -> None:
        if leases:
            await self._terms.leases.release(leases, shareable=shareable)

    async def _wait(self) -> None:
        started = time.monotonic()
        while True:
            waited_s = time.monotonic() - started
            standings = await self._terms.leases.take(self._keys, together=True)
            if not any(isinstance(standing, Held) for standing in standings):
                self._taken = {lease.key: lease for lease in standings if isinstance(lease, Taken)}
                return
            left_s = self._terms.timeout_s - waited_s if self._terms.timeout_s else _LONGEST_S
            if left_s <= 0:
                return
            await asyncio.sleep(min(max(_FIRST_S, waited_s * _SHARE), _LONGEST_S, left_s))

    async def _found(self, look: Look) -> Collection[bytes]:
        try:
            return await look()
        except Exception as error:  # noqa: BLE001 - a fault of ours must not cost the client its answer
            log.error("%s while looking for another process's answer; the call went upstream", type(error).__name__)
            return ()


class LeasedFetch:
    """A `Fetch` that another process may do in our place. Used once."""

    def __init__(
        self, terms: LeaseTerms, key: bytes, fetch: Fetch, finished: Callable[[], Awaitable[Finished | None]]
    ) -> None:
        """`finished` looks in the file for the answer to this key, whatever is believed to be there."""
        self._key = key
        self._claim = Claim(terms, (key,))
        self._fetch = fetch
        self._finished = finished
        self._answer: Finished | None = None

    @property
    def collapsed(self) -> bool:
        """Whether the answer is another process's, known when the response's head is: it is stored already."""
        return self._answer is not None

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Incoming]:
        """See `Fetch`."""
        await self._claim.settle(self._look)
        if self._answer is not None:
            yield self._answer
            return
        async with self._fetch() as incoming:
            yield incoming

    async def may_store(self) -> bool:
        """Whether nobody has overtaken us; to be asked right before the answer is stored."""
        return bool(await self._claim.may_store((self._key,)))

    async def landed(self, drop: Drop | None) -> None:
        """Let the others have their turn; to be called once after the fetch, however it ended.

        `drop` says why the answer was not stored, None: it was.
        """
        # Where its clients have left, the answer might have been as good as any.
        await self._claim.landed(() if drop else (self._key,), shareable=drop is Drop.CLIENT_GONE)

    async def _look(self) -> Collection[bytes]:
        self._answer = await self._finished()
        return () if self._answer is None else (self._key,)
