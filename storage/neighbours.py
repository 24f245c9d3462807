"""Which other processes use a file, told by locks on a file beside it that the kernel lets go of when they end.

Each holds a lock on one byte of its own, far beyond the end of the file, whose place is its number. The locks belong to
open files, not to processes (fcntl(2), "Open file description locks"): asking changes nothing, and two users in one
process are two. Blocking, for microseconds; call it in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.base import StorageBusy

_FLOCK = "hhqqi4x"
"""`struct flock`: type, whence, start, length (0: without end), process, which is 0 for locks of this kind."""
_TURN = 0
_FIRST = 1
_NUMBERS = 1 << 62
_TRIES = 100
_PAUSE_S = 0.01


class Neighbours:
    """All who use the file; `number` is our own among them."""

    def __init__(self, lock: Path) -> None:
        """Be one of them, by a lock on this file, which is made where there is none.

        Raises:
            OSError: it cannot be made, opened or locked.
        """
        self.number = _FIRST + secrets.randbelow(_NUMBERS)
        self._lock = lock
        self._descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            self._set(fcntl.F_WRLCK, self.number)
        except BaseException:
            self.close()
            raise

    def any(self) -> bool:
        """Whether there is anybody but us."""
        return self._is_locked(_FIRST, 0)

    def has(self, number: int) -> bool:
        """Whether the one of this number is still there; of us, it is not known here."""
        return self._is_locked(number, 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Do something that only one of all may do at a time.

        Raises:
            StorageBusy: somebody else is at it for longer than we wait.
        """
        for _ in range(_TRIES):
            try:
                self._set(fcntl.F_WRLCK, _TURN)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                time.sleep(_PAUSE_S)
        else:
            raise StorageBusy(f"{self._lock} is locked by another process")
        try:
            yield
        finally:
            self._set(fcntl.F_UNLCK, _TURN)

    def lost(self) -> bool:
        """Whether the file that is locked is not the one that others find by its name."""
        with suppress(OSError):
            return not os.path.samestat(os.fstat(self._descriptor), self._lock.stat())
        return True

    def close(self) -> None:
        """Be none of them any more."""
        os.close(self._descriptor)

    def _set(self, kind: int, place: int) -> None:
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, place, 1, 0))

    def _is_locked(self, place: int, length: int) -> bool:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, place, length, 0)
        found = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, wanted)
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)
