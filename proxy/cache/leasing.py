"""One fetch for equal calls at several processes that share a store; see `storage.leases`.

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
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import assert_never

from proxy.cache.policy import Drop
from proxy.cache.ports import Fetch, Incoming
from storage.leases import Apart, Held, Leases, Taken

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


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How calls of several processes are made one.

    `flush` writes what was stored to where others find it, and tells whether it could. `timeout_s` bounds the waiting
    for others; 0 does not.
    """

    leases: Leases
    flush: Callable[[], Awaitable[bool]]
    timeout_s: float


class LeasedFetch:
    """A `Fetch` that another process may do in our place. Used once."""

    def __init__(
        self, terms: LeaseTerms, key: bytes, fetch: Fetch, finished: Callable[[], Awaitable[Finished | None]]
    ) -> None:
        """`finished` looks in the file for the answer to this key, whatever is believed to be there."""
        self._terms = terms
        self._key = key
        self._fetch = fetch
        self._finished = finished
        self._lease: Taken | None = None
        self.collapsed = False
        """Whether the answer is another process's, known when the response's head is: it is stored already."""

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Incoming]:
        """See `Fetch`."""
        finished = await self._arrive()
        if finished is not None:
            self.collapsed = True
            yield finished
            return
        async with self._fetch() as incoming:
            yield incoming

    async def may_store(self) -> bool:
        """Whether nobody has overtaken us; to be asked right before the answer is stored."""
        return self._lease is None or await self._terms.leases.holds(self._lease)

    async def landed(self, drop: Drop | None) -> None:
        """Let the others have their turn; to be called once after the fetch, however it ended.

        `drop` says why the answer was not stored, None: it was.
        """
        lease, self._lease = self._lease, None
        if lease is None:
            return
        # Where its clients have left, the answer might have been as good as any.
        shareable = drop is Drop.CLIENT_GONE
        try:
            if drop is None:
                shareable = await self._terms.flush()
        finally:
            await self._terms.leases.release(lease, shareable=shareable)

    async def _arrive(self) -> Finished | None:
        """Wait for our turn, which is None, or for the answer."""
        started = time.monotonic()
        while True:
            waited_s = time.monotonic() - started
            match await self._terms.leases.take(self._key):
                case Held():
                    left_s = self._terms.timeout_s - waited_s if self._terms.timeout_s else _LONGEST_S
                    if left_s <= 0:
                        return await self._looked()
                    await asyncio.sleep(min(max(_FIRST_S, waited_s * _SHARE), _LONGEST_S, left_s))
                case Taken() as lease:
                    self._lease = lease
                    finished = await self._looked()
                    if finished is not None:
                        self._lease = None
                        await self._terms.leases.release(lease, shareable=True)
                    return finished
                case Apart():
                    return await self._looked()
                case other:
                    assert_never(other)

    async def _looked(self) -> Finished | None:
        try:
            return await self._finished()
        except Exception as error:  # noqa: BLE001 - a fault of ours must not cost the client its answer
            log.error("%s while looking for another process's answer; the call went upstream", type(error).__name__)
            return None
