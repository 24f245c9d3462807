"""How far the cache may go for one call: settings, what overrides them for its model and client, and its own header."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from proxy.cache.asking import NearTerms
from proxy.cache.dialects.call import Call
from proxy.cache.trust import ORDINARY, Trust
from proxy.settings import CacheSettings, Mode, Override

TIER_HEADER = "X-Nearhit-Tier"
"""With `exact`, a client keeps one call to the exact tier."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What may answer a call: nothing (`off`), an equal one, or also one in other words.

    `ttl_ms` is for how long its own answer may be kept, None: as usual.
    """

    mode: Mode
    near: NearTerms | None
    ttl_ms: int | None = None


class Scopes:
    """Finds the scope of calls."""

    def __init__(self, cache: CacheSettings) -> None:
        """Apply these settings."""
        self._cache = cache
        self._usual = self._scope(cache.mode, cache.threshold, shadow=cache.shadow)

    def of(self, call: Call, headers: Mapping[str, str], trust: Trust = ORDINARY) -> Scope:
        """The scope of a call with these header fields; later overrides win over earlier ones."""
        scope = self._overridden(call.model, headers) if self._cache.overrides else self._usual
        narrowed = self._cache.sampled == "exact" and trust.samples(call)
        if scope.near is not None and (narrowed or (TIER_HEADER in headers and _is_exact(headers))):
            scope = replace(scope, near=None)
        if call.controls is not None and call.controls.ttl_s is not None:
            return replace(scope, ttl_ms=round(call.controls.ttl_s * 1000))
        return scope

    def _overridden(self, model: str, headers: Mapping[str, str]) -> Scope:
        mode, threshold, shadow = self._cache.mode, self._cache.threshold, self._cache.shadow
        ttl_hours: float | None = None
        for override in self._cache.overrides:
            if _applies(override, model, headers):
                mode = override.mode or mode
                threshold = threshold if override.threshold is None else override.threshold
                shadow = shadow if override.shadow is None else override.shadow
                ttl_hours = ttl_hours if override.ttl_hours is None else override.ttl_hours
        ttl_ms = None if ttl_hours is None else round(ttl_hours * 3_600_000)
        return replace(self._scope(mode, threshold, shadow=shadow), ttl_ms=ttl_ms)

    def _scope(self, mode: Mode, threshold: float, *, shadow: bool) -> Scope:
        readable = self._cache.store_words == "full"
        return Scope(mode, NearTerms(threshold, shadow) if mode == "approx" and readable else None)


def _is_exact(headers: Mapping[str, str]) -> bool:
    return headers[TIER_HEADER].strip().lower() == "exact"


def _applies(override: Override, model: str, headers: Mapping[str, str]) -> bool:
    return fnmatchcase(model, override.model) and (not override.key or _shows(override.key, headers))


def _shows(key: str, headers: Mapping[str, str]) -> bool:
    given = headers.get("Authorization", "")
    scheme, _, credentials = given.partition(" ")
    shown = (credentials.strip() if scheme.lower() == "bearer" else given, headers.get("X-Api-Key", ""))
    return any(hmac.compare_digest(value.encode("utf-8", "surrogateescape"), key.encode()) for value in shown)
