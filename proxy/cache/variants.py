"""Several answers to one call to which the model would answer differently each time, given in turn. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace

from proxy.cache.dialects.call import Call

_REMEMBERED = 4096


class Variants:
    """Which of the answers to a call is next.

    The first is found as the only one would be; each other has a digest of its own, so that it is looked up, shared,
    kept and removed like the answer to a call of its own, and is compared with no other words. Whose turn it is is this
    process's memory alone: what is stored is found again after a restart.
    """

    def __init__(self, count: int) -> None:
        """`count` answers to each call."""
        self._count = count
        self._next: OrderedDict[bytes, int] = OrderedDict()

    def of(self, call: Call, namespace: bytes) -> Call:
        """The variant of the call whose turn it is."""
        number = self._next.get(namespace + call.digest, 0)
        if not number:
            return call
        digest = hashlib.sha256(b"variant %d of " % number + call.digest).digest()
        return replace(call, digest=digest, words=None)

    def served(self, call: Call, namespace: bytes) -> None:
        """The variant whose turn it was has been given or stored; `call` is the call itself."""
        place = namespace + call.digest
        number = self._next.pop(place, 0)
        self._next[place] = (number + 1) % self._count
        if len(self._next) > _REMEMBERED:
            self._next.popitem(last=False)
