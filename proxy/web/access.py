"""Who may use the admin routes. Pure."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

TOKEN_HEADER = "X-Nearhit-Admin"  # noqa: S105 - a header's name
_BEHIND_A_PROXY = ("Forwarded", "Via", "X-Real-Ip", "X-Client-Ip", "Cf-Connecting-Ip", "True-Client-Ip")


@dataclass(frozen=True, slots=True)
class Policy:
    """`token` is the one that was set ("" for none), `local_token` the one in this machine's data directory."""

    token: str
    local_token: str


def refusal(
    policy: Policy,
    headers: Mapping[str, str],
    peer: str | None,
    *,
    shows_text: bool,
    shared: bool,
    has_right: bool = False,
) -> str | None:
    """Why this request may not use an admin route, or None where it may.

    A token always does, and so does the key of a client with that right (`has_right`). Without a token set, this
    machine itself may: loopback peer and Host, no proxy in between, no foreign page. Routes that show prompts or
    answers want a token as soon as callers do not share everything.
    """
    if is_cross_site(headers):
        return "requests from other sites' pages are refused"
    shown = headers.get(TOKEN_HEADER)
    if shown is not None:
        known = [token for token in (policy.token, policy.local_token) if token]
        if any(hmac.compare_digest(_bytes(shown), _bytes(token)) for token in known):
            return None
        return f"the token in {TOKEN_HEADER} is wrong"
    if has_right:
        return None
    if policy.token:
        return f"send the admin token as {TOKEN_HEADER}"
    if not _is_local(headers, peer):
        return f"without admin.token only this machine may ask, at a loopback address; else send {TOKEN_HEADER}"
    if shows_text and not shared:
        return f"callers have answers of their own here: send the admin token as {TOKEN_HEADER}"
    return None


def _is_local(headers: Mapping[str, str], peer: str | None) -> bool:
    proxied = any(
        name in _BEHIND_A_PROXY or name.lower().startswith("x-forwarded-") for name in map(str.title, headers)
    )
    return not proxied and _is_loopback(peer) and _is_loopback(_host_of(headers.get("Host", "")))


def is_cross_site(headers: Mapping[str, str]) -> bool:
    """Whether a browser sent this for another site's page."""
    origin = headers.get("Origin")
    if origin is None:
        return headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
    scheme, _, authority = origin.lower().partition("://")
    return scheme not in ("http", "https") or authority != headers.get("Host", "").lower()


def _host_of(authority: str) -> str | None:
    try:
        parts = urlsplit(f"//{authority}")
        host = parts.hostname
    except ValueError:
        return None
    # Nothing but host and port belongs there.
    return host if parts.netloc == authority and "@" not in authority else None


def _bytes(text: str) -> bytes:
    # Header fields that are not UTF-8 come as surrogates.
    return text.encode("utf-8", "surrogateescape")


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)
