"""How far the cache may go for one call: settings, what overrides them for its model and client, and its own header."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from proxy.cache.asking import NearTerms
from proxy.cache.dialects.call import Call
from proxy.settings import CacheSettings, Mode, Override

TIER_HEADER = "X-Nearhit-Tier"
"""With `exact`, a client keeps one call to the exact tier."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What may answer a call: nothing (`off`), an equal one, or also one in other words."""

    mode: Mode
    near: NearTerms | None


class Scopes:
    """Finds the scope of calls."""

    def __init__(self, cache: CacheSettings) -> None:
        """Apply these settings."""
        self._cache = cache
        self._usual = _scope(cache.mode, cache.threshold, shadow=cache.shadow)

    def of(self, call: Call, headers: Mapping[str, str]) -> Scope:
        """The scope of a call with these header fields; later overrides win over earlier ones."""
        scope = self._overridden(call.model, headers) if self._cache.overrides else self._usual
        narrowed = call.sampled and self._cache.sampled == "exact"
        if scope.near is not None and (narrowed or headers.get(TIER_HEADER, "").strip().lower() == "exact"):
            return Scope(scope.mode, None)
        return scope

    def _overridden(self, model: str, headers: Mapping[str, str]) -> Scope:
        mode, threshold, shadow = self._cache.mode, self._cache.threshold, self._cache.shadow
        for override in self._cache.overrides:
            if _applies(override, model, headers):
                mode = override.mode or mode
                threshold = threshold if override.threshold is None else override.threshold
                shadow = shadow if override.shadow is None else override.shadow
        return _scope(mode, threshold, shadow=shadow)


def _scope(mode: Mode, threshold: float, *, shadow: bool) -> Scope:
    return Scope(mode, NearTerms(threshold, shadow) if mode == "approx" else None)


def _applies(override: Override, model: str, headers: Mapping[str, str]) -> bool:
    return fnmatchcase(model, override.model) and (not override.key or _shows(override.key, headers))


def _shows(key: str, headers: Mapping[str, str]) -> bool:
    given = headers.get("Authorization", "")
    scheme, _, credentials = given.partition(" ")
    shown = (credentials.strip() if scheme.lower() == "bearer" else given, headers.get("X-Api-Key", ""))
    return any(hmac.compare_digest(value.encode("utf-8", "surrogateescape"), key.encode()) for value in shown)
