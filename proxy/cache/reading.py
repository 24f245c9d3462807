"""Requests read once: a verbatim repeat costs one digest of its bytes instead of a parse."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

from proxy.cache.dialects.call import Call, NotCacheable, behaviour, read_call
from proxy.cache.dialects.dialect import Dialect

_REMEMBERED = 4096
_MAX_BODY = 8192
"""Longer bodies are parsed each time: their words would make the memory grow."""


class CallReader:
    """`read_call` with a memory for its last results. What it returns depends on its arguments alone."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._known: OrderedDict[tuple[str | bytes | None, ...], Call | NotCacheable] = OrderedDict()

    def read(
        self, dialect: Dialect, query: str, headers: Mapping[str, str], body: bytes, body_digest: bytes
    ) -> Call | NotCacheable:
        """Parse the request, or remember having done so; `body_digest` is a collision-free digest of `body`."""
        if len(body) > _MAX_BODY or len(query) > _MAX_BODY:
            return read_call(dialect, query, headers, body)
        place = (dialect.endpoint, query, *behaviour(headers), body_digest)
        call = self._known.get(place)
        if call is None:
            call = self._known[place] = read_call(dialect, query, headers, body)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return call


def digest_of(*parts: bytes) -> bytes:
    """SHA-256 over the parts, each with its length."""
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()
