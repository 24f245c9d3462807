"""Of several processes that share a store, one asks upstream for an answer: leases on keys, with a term and a token.

Whoever holds the lease on a key fetches its answer; the others wait for it to be in the store. A lease ends when it is
released, when its holder ends, however that happens, and after its term unless it is renewed (Gray and Cheriton 1989,
"Leases: an efficient fault-tolerant mechanism for distributed file cache consistency"). A holder that was paused beyond
its term and was overtaken finds that out by its token: tokens only ever grow, and the lease has the token of the last
who took it. So it must ask `holds` before it stores anything.

Leases save work, nothing depends on them: whatever goes wrong with them, a call goes upstream as if it were alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

TERM_MS = 10_000
"""How long a lease is good for without being renewed."""
RENEW_MS = 3_000
"""How often it is renewed."""
APART_MS = 2_000
"""How long it is remembered that an answer could not be shared."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The lease on `key` is ours; `token` is greater than that of any lease before."""

    key: bytes
    token: int


@dataclass(frozen=True, slots=True)
class Held:
    """Another process fetches the answer now."""


@dataclass(frozen=True, slots=True)
class Apart:
    """To be fetched without a lease, by everybody at once: the last answer could not be shared, or leases fail."""


Standing = Taken | Held | Apart


class Leases(Protocol):
    """The leases as one process sees them. Nothing here raises or takes longer than a second."""

    @property
    def shared(self) -> bool:
        """Whether there may be anybody else to agree with; costs nothing to ask."""
        ...

    async def take(self, key: bytes) -> Standing:
        """Take the lease on a key, unless another process holds it; it is renewed until it is released.

        Of one that this process holds already, a second taker is `Apart`: who shares within a process needs no lease.
        """
        ...

    async def holds(self, lease: Taken) -> bool:
        """Whether nobody has overtaken us; where the answer is yes, nobody will for the next `TERM_MS`."""
        ...

    async def release(self, lease: Taken, *, shareable: bool) -> None:
        """Let go of it. With `shareable`, the next may take it, who finds the answer in the store, or fetches it.

        Without, the answer was of a kind that is not kept: for `APART_MS`, those who wait need not do so one by one.
        """
        ...
