"""Header fields on their way through: what a proxy must not pass on, and what nearhit adds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from multidict import CIMultiDict

from proxy.cache.dialects.call import BEHAVIOUR_HEADERS
from proxy.cache.directives import NONE, Directives, parse
from proxy.upstream.sharing import is_credential

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields of one connection (RFC 9110 section 7.6.1)."""

_REQUEST_ONLY = HOP_BY_HOP | {"host", "expect", "x-nearhit-admin", "x-nearhit-tier"}
_OF_THE_ANSWER = frozenset(
    {
        "cache-control",
        "content-encoding",
        "content-type",
        "retry-after",
        "retry-after-ms",
        "server",
        "x-accel-buffering",
        "x-should-retry",
    }
)
"""All others may be about the caller: about an account, what is left of its limits, a page, a session."""


def to_upstream(headers: Mapping[str, str], *, drop: frozenset[str] = frozenset()) -> CIMultiDict[str]:
    """The fields of a request that go on to the upstream."""
    return _without(headers, _REQUEST_ONLY | _named_by_connection(headers) | drop)


def to_upstream_cacheable(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The same for a call whose answer is read: not encoded, and sent with a body of known length."""
    passed = to_upstream(headers, drop=frozenset({"content-length", "accept-encoding"}))
    passed["Accept-Encoding"] = "identity"
    values = getattr(headers, "getall", None)
    for name in BEHAVIOUR_HEADERS:
        # What the key covers goes along, also where `Connection` wrongly names it (RFC 9110 section 7.6.1).
        if name in headers and name not in passed:
            for value in values(name) if values else (headers[name],):
                passed.add(name, value)
    return passed


def without_credentials(headers: Mapping[str, str], key: str) -> CIMultiDict[str]:
    """The fields that do not tell who asks: neither by their names, nor by holding this key ("" for none)."""
    return CIMultiDict(
        (name, value) for name, value in headers.items() if not (is_credential(name) or (key and key in value))
    )


def to_client(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The fields of a response that go on to the client."""
    return _without(headers, HOP_BY_HOP | _named_by_connection(headers))


def to_follower(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The fields of a response that another caller than the one who asked may see."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() in _OF_THE_ANSWER)


def _named_by_connection(headers: Mapping[str, str]) -> set[str]:
    connection = headers.get("Connection")
    return {name.strip().lower() for name in connection.split(",")} if connection else set()


def _without(headers: Mapping[str, str], names: Iterable[str]) -> CIMultiDict[str]:
    dropped = names if isinstance(names, frozenset) else frozenset(names)
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def shown_id(key: bytes) -> str:
    """The id of an entry for people and headers."""
    return key[:16].hex()


def shown_score(score: float) -> str:
    """A similarity for people and headers: never rounded up to 1.0."""
    return "1.0" if score == 1 else f"{min(score, 0.999):.3f}"


def directives_of(headers: Mapping[str, str]) -> Directives:
    """What a request asks of the cache."""
    if "Cache-Control" not in headers and "Pragma" not in headers:
        return NONE
    values = getattr(headers, "getall", None)
    if values is None:
        return NONE
    return parse(values("Cache-Control", ()), values("Pragma", ()))
