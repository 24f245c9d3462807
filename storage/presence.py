"""Which keys may be stored, known without asking the store: a Bloom filter (Bloom 1970) of constant size.

A call that was never answered before is the usual miss, and asking SQLite costs it a trip to another thread. The filter
never says "absent" of a key that this process stored; of one that another process stored, for `FOLLOW_S` at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storage.base import Keys, StorageError

FOLLOW_S = 0.25
_BITS = 1 << 24
_SLICES = (0, 3, 6, 9)
_SHIFTS = (72, 48, 24, 0)
"""The same three bytes, in the number that the first twelve make."""
_CAPACITY = 1_500_000
"""Keys beyond which too many absent ones would be asked for: at this number one in a hundred."""
_PAGE = 250
"""Keys learned at once: everybody else in the event loop waits meanwhile, less than a millisecond."""


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
        self._learn((key,))

    async def follow(self, keys: Keys) -> None:
        """Learn what is stored, and what other processes store, until cancelled."""
        mark, learned, most = 0, 0, _CAPACITY
        while True:
            try:
                mark, page = await keys.keys_after(mark, _PAGE)
            except StorageError:
                self._begin_anew()
                mark, learned = 0, 0
                await asyncio.sleep(FOLLOW_S)
                continue
            self._learn(page)
            learned += len(page)
            if len(page) == _PAGE:
                continue
            if not self._complete:
                # Where more are stored than it is made for, many are asked for; to begin anew would not help.
                most = max(_CAPACITY, 2 * learned)
                self._complete = True
            await asyncio.sleep(FOLLOW_S)
            if self._added > most:
                # Keys of removed entries cannot be taken out one by one.
                self._begin_anew()
                mark, learned = 0, 0

    def _learn(self, keys: Sequence[bytes]) -> None:
        self._added += len(keys)
        bits = self._bits
        for key in keys:
            number = int.from_bytes(key[:12], "big")
            for shift in _SHIFTS:
                place = number >> shift & _BITS - 1
                bits[place >> 3] |= 1 << (place & 7)

    def _begin_anew(self) -> None:
        self._bits = bytearray(_BITS // 8)
        self._added = 0
        self._complete = False
