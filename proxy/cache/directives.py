"""Cache-Control of a request (RFC 9111 section 5.2.1) and Cache-Status of a response (RFC 9211). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

ANY_AGE = 1 << 60
"""Seconds that nothing is older than."""


@dataclass(frozen=True, slots=True)
class Directives:
    """What a client asks of the cache. Seconds are whole and not negative; 0 is a value, None is absence.

    `stale_if_error_s` is of RFC 5861, all others of RFC 9111. A `max-stale` without a number is `ANY_AGE`.
    """

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None
    min_fresh_s: int | None = None
    max_stale_s: int | None = None
    stale_if_error_s: int | None = None


NONE = Directives()
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+("?)', re.DOTALL)
"""With a group for the closing quote. It matches without one, too: so no byte is looked at twice."""
_MALFORMED = "?"


def parse(cache_control: Iterable[str], pragma: Iterable[str] = ()) -> Directives:
    """Read all values of both headers. Unknown or malformed directives are ignored, as RFC 9111 asks.

    `Pragma: no-cache` counts only where there is no Cache-Control.
    """
    values = list(cache_control)
    if not values:
        no_cache = any("no-cache" in value.lower() for value in pragma)
        return Directives(no_cache=True) if no_cache else NONE
    found: dict[str, str] = {}
    for value in values:
        # No directive that is understood here has a comma in its argument; others may, within quotes.
        for directive in _QUOTED.sub(_without_commas, value).split(","):
            name, equals, argument = directive.partition("=")
            argument = argument.strip().strip('"')
            found.setdefault(name.strip().lower(), argument or _MALFORMED if equals else "")
    return Directives(
        no_cache="no-cache" in found,
        no_store="no-store" in found,
        only_if_cached="only-if-cached" in found,
        max_age_s=_seconds(found.get("max-age")),
        min_fresh_s=_seconds(found.get("min-fresh")),
        max_stale_s=ANY_AGE if found.get("max-stale") == "" else _seconds(found.get("max-stale")),
        stale_if_error_s=_seconds(found.get("stale-if-error")),
    )


def status_hit(ttl_s: int, detail: str) -> str:
    """Cache-Status of an answer from the cache, which has been stale for -`ttl_s` where that is negative."""
    return f"nearhit; hit; ttl={ttl_s}; detail={detail}"


def status_stale(reason: str, failed_with: int | None) -> str:
    """Cache-Status of a stored answer that stands in for one that could not be had.

    `reason` is why it was fetched; `failed_with` what the upstream said, None where it said nothing.
    """
    said = "" if failed_with is None else f"; fwd-status={failed_with}"
    return f"nearhit; fwd={reason}{said}; detail=stale"


def status_forwarded(reason: str, *, collapsed: bool = False, detail: str = "") -> str:
    """Cache-Status of an answer from upstream; `reason` is RFC 9211's `fwd`."""
    return f"nearhit; fwd={reason}{'; collapsed' if collapsed else ''}{f'; detail={detail}' if detail else ''}"


def status_refused(detail: str) -> str:
    """Cache-Status of an answer that is nearhit's own."""
    return f"nearhit; detail={detail}"


def _without_commas(quoted: re.Match[str]) -> str:
    return quoted[0].replace(",", ";") if quoted[1] else quoted[0]


def _seconds(argument: str | None) -> int | None:
    if argument is None or not re.fullmatch(r"[0-9]+", argument):
        return None
    # Longer runs of digits than any clock needs are as good as the longest (RFC 9111 section 1.2.2).
    digits = argument.lstrip("0")
    return int(digits or "0") if len(digits) <= 18 else ANY_AGE
