"""Of several processes that share a store, one asks upstream for an answer: leases on keys, with a term and a token.

Whoever holds the lease on a key fetches its answer; the others wait for it to be in the store. A lease ends when it is
released, when its holder ends, however that happens, and after its term unless it is renewed (Gray and Cheriton 1989,
"Leases: an efficient fault-tolerant mechanism for distributed file cache consistency"). A holder that was paused beyond
its term and was overtaken finds that out by its token: tokens only ever grow, and the lease has the token of the last
who took it. So it must ask `holds` before it stores anything.

Leases save work, nothing depends on them: whatever goes wrong with them, a call goes upstream as if it were alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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

    async def take(self, keys: Sequence[bytes], *, together: bool = False) -> Sequence[Standing]:
        """Take the leases on different keys, but for those that others hold; they are renewed until they are released.

        How each key stands, in their order. With `together`, none is taken while another process holds one of them:
        all are `Held` then. Of one that this process holds already, a second taker is `Apart`: who shares within a
        process needs no lease.
        """
        ...

    async def holds(self, leases: Collection[Taken]) -> Collection[Taken]:
        """Those of them that nobody has overtaken us with, and nobody will for the next `TERM_MS`."""
        ...

    async def release(self, leases: Collection[Taken], *, shareable: bool) -> None:
        """Let go of them. With `shareable`, the next may take them, who finds answers in the store, or fetches them.

        Without, the answers were of a kind that is not kept: for `APART_MS`, those who wait need not do so one by one.
        """
        ...
