"""The deciding rules: which outcome a look-up has, and whether an answer may be kept. Pure and total.

Every "no" has a name; the names are metric labels, header details and log fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from proxy.cache.directives import Directives


class Outcome(StrEnum):
    """How a request to a cacheable endpoint ended; one each."""

    HIT = "HIT"
    NEAR = "NEAR"
    STALE = "STALE"
    JOINED = "JOINED"
    MISS = "MISS"
    BYPASS = "BYPASS"

    # Every hit is counted under one, and Enum's own is Python code.
    __hash__ = str.__hash__


class Tier(StrEnum):
    """Which look-up found the answer."""

    EXACT = "exact"
    NEAR = "near"

    __hash__ = str.__hash__


class Bypass(StrEnum):
    """Why a request was neither looked up nor stored."""

    MODE_OFF = "mode-off"
    NO_STORE = "no-store"
    NOT_JSON = "not-json"
    NOT_UNDERSTOOD = "not-understood"
    TOO_COMPLEX = "too-complex"
    DUPLICATE_KEYS = "duplicate-keys"
    CONTENT_ENCODING = "content-encoding"
    RETURN_PROGRESS = "return-progress"
    STORE_TRUE = "store-true"
    PREVIOUS_RESPONSE = "previous-response"
    CONVERSATION = "conversation"
    BACKGROUND = "background"
    STREAM_OPTIONS = "stream-options"
    SAMPLED = "sampled"
    NO_FINGERPRINT = "no-fingerprint"
    NOT_CACHED_HERE = "not-cached-here"
    MULTI_TURN = "multi-turn"
    NOT_SHAREABLE = "not-shareable"
    INTERNAL = "internal-error"


class Miss(StrEnum):
    """Why a cacheable call was not answered from the cache."""

    ABSENT = "absent"
    EXPIRED = "expired"
    NO_CACHE = "no-cache"
    TOO_OLD = "too-old"
    TOO_STALE_SOON = "min-fresh"
    NO_USAGE = "no-usage"
    RETRY = "retry"
    IN_DOUBT = "fingerprint-in-doubt"
    UNCONFIRMED = "credential-unconfirmed"
    CLOCK = "clock-set-back"


class Drop(StrEnum):
    """Why an answer was relayed but not kept."""

    NO_STORE = "no-store"
    STATUS = "status"
    CONTENT_ENCODING = "content-encoding"
    NOT_JSON = "not-json"
    NOT_UNDERSTOOD = "not-understood"
    ERROR_IN_200 = "error-in-200"
    ERROR_IN_STREAM = "error-in-stream"
    INCOMPLETE = "incomplete"
    NO_FINISH = "no-finish-reason"
    FINISH_REASON = "finish-reason"
    EMPTY = "empty"
    ZERO_TOKENS = "zero-tokens"
    ABORTED = "aborted-by-server"
    TAINTED = "tainted"
    TOO_LARGE = "too-large"
    VOLATILE = "volatile"
    IN_DOUBT = "fingerprint-in-doubt"
    CLIENT_GONE = "client-gone"
    UPSTREAM_GONE = "upstream-gone"
    STORAGE_BEHIND = "storage-behind"
    READ_ONLY = "read-only"
    LEASE_LOST = "lease-lost"


@dataclass(frozen=True, slots=True)
class Keep:
    """The answer may be kept for `ttl_ms`, and for `grace_ms` more for times when no other can be had."""

    ttl_ms: int
    grace_ms: int = 0


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long answers live, in milliseconds; 0 means not at all.

    For `revalidate_ms` after its time an answer is given while a new one is fetched, for `if_error_ms` where none can
    be had.
    """

    ttl_ms: int
    volatile_ttl_ms: int
    max_ttl_ms: int
    if_error_ms: int = 0
    revalidate_ms: int = 0

    @property
    def grace_ms(self) -> int:
        """For how long after its time an answer is kept."""
        return max(self.if_error_ms, self.revalidate_ms)


CLOCK_SLACK_MS = 60_000
"""An entry that was stored later than this from now is as old as nobody knows."""


class Stored(Protocol):
    """What deciding needs to know of an entry."""

    @property
    def stored_ms(self) -> int:
        """When it was stored, in ms since the epoch."""
        ...

    @property
    def expires_ms(self) -> int:
        """When it stops being fresh."""
        ...

    @property
    def grace_ms(self) -> int:
        """For how long after that it may stand in for one that cannot be had."""
        ...

    @property
    def usage_known(self) -> bool:
        """Whether it can tell its token usage, or never will."""
        ...


def decide(
    entry: Stored, directives: Directives, *, needs_usage: bool, now_ms: int, revalidate_ms: int = 0
) -> Miss | None:
    """Why this entry may not answer the call, or None where it may (RFC 9111 section 5.2.1).

    It may be stale: where the call allows that, or for `revalidate_ms`, where the call does not speak of age.
    """
    if entry.stored_ms > now_ms + CLOCK_SLACK_MS:
        return Miss.CLOCK
    if directives.no_cache:
        return Miss.NO_CACHE
    late_ms = now_ms - entry.expires_ms
    if late_ms >= 0 and late_ms >= min(entry.grace_ms, _tolerated_ms(directives, revalidate_ms)):
        return Miss.EXPIRED
    if directives.max_age_s is not None and age_s(entry, now_ms) > directives.max_age_s:
        return Miss.TOO_OLD
    if directives.min_fresh_s is not None and ttl_s(entry, now_ms) < directives.min_fresh_s:
        return Miss.TOO_STALE_SOON
    if needs_usage and not entry.usage_known:
        return Miss.NO_USAGE
    return None


def _tolerated_ms(directives: Directives, revalidate_ms: int) -> int:
    if directives.max_stale_s is not None:
        # `max-stale=0` says that nothing stale is wanted.
        return directives.max_stale_s * 1000
    return revalidate_ms if directives.max_age_s is None and directives.min_fresh_s is None else 0


def may_stand_in(entry: Stored, directives: Directives, *, needs_usage: bool, now_ms: int, if_error_ms: int) -> bool:
    """Whether this entry may be given where no other answer can be had (RFC 5861 section 4).

    A call that states what age it accepts gets none beyond, unless it speaks of errors, too.
    """
    if entry.stored_ms > now_ms + CLOCK_SLACK_MS or directives.no_cache or (needs_usage and not entry.usage_known):
        return False
    stated = directives.stale_if_error_s
    if stated is None:
        bounded = (directives.max_age_s, directives.min_fresh_s, directives.max_stale_s)
        return all(bound is None for bound in bounded) and now_ms - entry.expires_ms < min(entry.grace_ms, if_error_ms)
    ends_ms = entry.expires_ms
    if directives.max_age_s is not None:
        ends_ms = min(ends_ms, entry.stored_ms + directives.max_age_s * 1000)
    late_ms = now_ms - ends_ms
    return late_ms < stated * 1000 and now_ms - entry.expires_ms < min(entry.grace_ms, if_error_ms)


def is_stale(entry: Stored, now_ms: int) -> bool:
    """Whether its time is over."""
    return now_ms >= entry.expires_ms


def age_s(entry: Stored, now_ms: int) -> int:
    """Whole seconds since the answer was stored; 0 where the clock has stepped back."""
    return max(0, now_ms - entry.stored_ms) // 1000


def ttl_s(entry: Stored, now_ms: int) -> int:
    """Whole seconds for which the answer stays fresh."""
    return (entry.expires_ms - now_ms) // 1000


def lifetime(lifetimes: Lifetimes, asked_ms: int | None, *, volatile: bool) -> Keep | Drop:
    """How long an otherwise good answer is kept, where the call itself asks for `asked_ms` (None: says nothing)."""
    ttl_ms = lifetimes.ttl_ms if asked_ms is None else min(asked_ms, lifetimes.max_ttl_ms)
    if ttl_ms <= 0:
        return Drop.NO_STORE
    if not volatile:
        return Keep(ttl_ms, lifetimes.grace_ms)
    ttl_ms = min(ttl_ms, lifetimes.volatile_ttl_ms)
    return Keep(ttl_ms) if ttl_ms > 0 else Drop.VOLATILE
