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


class Tier(StrEnum):
    """Which look-up found the answer."""

    EXACT = "exact"
    NEAR = "near"


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


@dataclass(frozen=True, slots=True)
class Keep:
    """The answer may be kept for `ttl_ms`."""

    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long answers live, in milliseconds; 0 means not at all."""

    ttl_ms: int
    volatile_ttl_ms: int
    max_ttl_ms: int


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
    def usage_known(self) -> bool:
        """Whether it can tell its token usage, or never will."""
        ...


def decide(entry: Stored, directives: Directives, *, needs_usage: bool, now_ms: int) -> Miss | None:
    """Why this entry may not answer the call, or None where it may (RFC 9111 section 5.2.1)."""
    if now_ms >= entry.expires_ms:
        return Miss.ABSENT
    if entry.stored_ms > now_ms + CLOCK_SLACK_MS:
        return Miss.CLOCK
    if directives.no_cache:
        return Miss.NO_CACHE
    if directives.max_age_s is not None and age_s(entry, now_ms) > directives.max_age_s:
        return Miss.TOO_OLD
    if directives.min_fresh_s is not None and ttl_s(entry, now_ms) < directives.min_fresh_s:
        return Miss.TOO_STALE_SOON
    if needs_usage and not entry.usage_known:
        return Miss.NO_USAGE
    return None


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
        return Keep(ttl_ms)
    ttl_ms = min(ttl_ms, lifetimes.volatile_ttl_ms)
    return Keep(ttl_ms) if ttl_ms > 0 else Drop.VOLATILE
