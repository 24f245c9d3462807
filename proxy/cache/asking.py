"""What is asked of the cache and what it replies, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.cache.directives import Directives
from proxy.cache.flight import Flight
from proxy.cache.hot import Ready
from proxy.cache.leasing import Finished, LeasedFetch
from proxy.cache.near.matcher import Judged
from proxy.cache.near.tier import Nearest
from proxy.cache.policy import Bypass, Drop, Keep, Lifetimes, Miss, is_stale
from proxy.cache.ports import Fetch, Identities, Sending
from proxy.cache.trust import ORDINARY, UNTRACKED, Trust


@dataclass(frozen=True, slots=True)
class Terms:
    """How answers are kept and served; times in milliseconds, sizes in bytes.

    `seals` says that nothing readable is stored. Of a sampled call, so many `variants` are kept.
    """

    lifetimes: Lifetimes
    sampled_bypass: bool
    retry_window_ms: int
    max_answer_bytes: int
    lookup_timeout_s: float
    seals: bool = False
    variants: int = 1


@dataclass(frozen=True, slots=True)
class NearTerms:
    """How far the near tier may go for a call.

    `threshold` is the least Jaccard similarity that the guard is shown; with `shadow`, what it finds is told and not
    served.
    """

    threshold: float
    shadow: bool


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks, and how.

    `near` is None where only the exact tier may answer. `ttl_ms` is how long its answer may be kept, None: as usual.
    `namespace` is the digest that the caller shares answers under; `may_read` says that the upstream would accept the
    caller; `may_lead` that what it says to this caller holds for all of the namespace; `may_store` that this caller's
    answers may be kept. `repeat` identifies caller and bytes of the request. `usage_from_timings`, `drain` and `trust`
    are how this kind of server is treated; `sending` tells how far `fetch` has come. With `drain`, a call that was sent
    is read to its end when nobody waits any more. `finished` puts an answer that another process fetched into the place
    of the upstream's, None: nobody else may fetch it.
    """

    directives: Directives
    near: NearTerms | None
    ttl_ms: int | None
    namespace: bytes
    may_read: bool
    may_lead: bool
    may_store: bool
    repeat: bytes
    identities: Identities
    fetch: Fetch
    usage_from_timings: bool
    drain: bool
    trust: Trust = ORDINARY
    sending: Sending = UNTRACKED
    finished: Callable[[Replay], Finished] | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """Answer from the cache; `near` tells of the match where other words were asked."""

    ready: Ready
    now_ms: int
    near: Judged | None = None

    @property
    def stale(self) -> bool:
        """Whether its time is over."""
        return is_stale(self.ready.entry, self.now_ms)


@dataclass(frozen=True, slots=True)
class Absent:
    """Nothing in the cache answers; `spare` may stand in where nobody else does."""

    miss: Miss
    spare: Replay | None = None


Found = Replay | Absent


@dataclass(frozen=True, slots=True)
class Fetching:
    """Answer from upstream; `joined` where another caller asked first, else `miss` says why it was not in the cache.

    `key` is where the answer will be found. `spare` may stand in where the fetch fails. `leased` is the fetch where
    another process may do it in our place. `nearest` is what the near tier came to, where it looked; with `shadow`,
    what it found would have been served.
    """

    flight: Flight
    key: bytes
    namespace: bytes
    miss: Miss
    joined: bool
    spare: Replay | None = None
    leased: LeasedFetch | None = None
    nearest: Nearest | None = None
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The caller wanted the cache's answer only, and there is none."""


Reply = Replay | Fetching | Refused | Bypass


@dataclass(frozen=True, slots=True)
class Look:
    """What a call would come to, without serving or fetching anything.

    `found` is what would answer, or why nothing would; `nearest` what the near tier came to, where it may look; `keep`
    what would become of a good answer from upstream.
    """

    key: bytes
    space: bytes
    found: Replay | Miss | Bypass
    in_flight: bool
    nearest: Nearest | None
    keep: Keep | Drop
