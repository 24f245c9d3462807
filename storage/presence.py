"""Which keys may be stored, known without asking the store: a Bloom filter (Bloom 1970) of constant size.

A call that was never answered before is the usual miss, and asking SQLite costs it a trip to another thread. The filter
never says "absent" of a key that this process stored; of one that another process stored, for `FOLLOW_S` at most.
"""

from __future__ import annotations

import asyncio

from storage.base import Keys, StorageError

FOLLOW_S = 0.25
_BITS = 1 << 24
_SLICES = (0, 3, 6, 9)
_CAPACITY = 1_500_000
"""Keys beyond which too many absent ones would be asked for: at this number one in a hundred."""
_PAGE = 5000


class Presence:
    """The filter. Keys are digests, so that any three of their bytes are a hash of their own."""

    def __init__(self) -> None:
        """Know nothing: every key may be stored."""
        self._bits = bytearray(_BITS // 8)
        self._added = 0
        self._complete = False

    def lacks(self, key: bytes) -> bool:
        """Whether the key is certainly not stored."""
        if not self._complete:
            return False
        bits = self._bits
        for start in _SLICES:
            place = int.from_bytes(key[start : start + 3], "big")
            if not bits[place >> 3] & (1 << (place & 7)):
                return True
        return False

    def add(self, key: bytes) -> None:
        """The key may be stored from now on."""
        self._added += 1
        for start in _SLICES:
            place = int.from_bytes(key[start : start + 3], "big")
            self._bits[place >> 3] |= 1 << (place & 7)

    async def follow(self, keys: Keys) -> None:
        """Learn what is stored, and what other processes store, until cancelled."""
        mark = 0
        while True:
            try:
                mark, page = await keys.keys_after(mark, _PAGE)
            except StorageError:
                self._begin_anew()
                mark, page = 0, []
                await asyncio.sleep(FOLLOW_S)
                continue
            for key in page:
                self.add(key)
            if len(page) < _PAGE:
                self._complete = True
                await asyncio.sleep(FOLLOW_S)
            if self._added > _CAPACITY:
                # Keys of removed entries cannot be taken out one by one.
                self._begin_anew()
                mark = 0

    def _begin_anew(self) -> None:
        self._bits = bytearray(_BITS // 8)
        self._added = 0
        self._complete = False
