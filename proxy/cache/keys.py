"""Where the answer to a call is found: digests that no two different calls share. Pure."""

from __future__ import annotations

import hashlib

from proxy.cache.dialects.call import Call
from proxy.cache.hot import Place
from proxy.cache.ports import Identity


class Keys:
    """The keys of one upstream."""

    def __init__(self, upstream: str) -> None:
        """`upstream` names the server."""
        self._origin = upstream.encode()

    def key(self, call: Call, namespace: bytes, identity: Identity) -> bytes:
        """Of the one call, 32 bytes."""
        return self._digest(b"key", namespace, identity, call.digest)

    def space(self, call: Call, namespace: bytes, identity: Identity) -> bytes:
        """What two calls must share to be compared: all of the key but the words."""
        return self._digest(b"space", namespace, identity, call.space_digest)

    def place(self, call: Call, namespace: bytes, fingerprint: bytes | None) -> Place:
        """The same as the key, without its price, for the hot tier."""
        return namespace, self._origin + (fingerprint or b""), call.digest

    def _digest(self, kind: bytes, namespace: bytes, identity: Identity, call_digest: bytes) -> bytes:
        return _digest(kind, namespace, self._origin, identity.fingerprint or b"", call_digest)


def topic(call: Call, namespace: bytes) -> int:
    """What calls with one system prompt to one model have in common, as a signed 64-bit integer."""
    return int.from_bytes(_digest(namespace, call.model.encode(), call.system)[:8], "big", signed=True)


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()
