"""Of all processes that use a file at a time, one does the work that need be done once: whoever holds a lock on it.

The kernel lets go of the lock when its holder ends, however that happens. Blocking; call it in a thread.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Leadership:
    """A candidacy: once held, it stays so until the block of `leadership` is left."""

    def __init__(self, descriptor: int) -> None:
        """Compete by this open file."""
        self._descriptor: int | None = descriptor
        self._held = False
        self._turn = threading.Lock()

    def held(self) -> bool:
        """Whether it is this process's, or becomes so now, because nobody else has it."""
        # After its end, the descriptor's number may be another file's.
        with self._turn:
            if self._descriptor is not None and not self._held:
                with suppress(BlockingIOError):
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._held = True
            return self._held

    def end(self) -> None:
        """Let go of it for good."""
        with self._turn:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor, self._held = None, False


@contextmanager
def leadership(lock: Path) -> Iterator[Leadership]:
    """Compete for the lock on a file, which is made where there is none.

    Raises:
        OSError: it cannot be made or opened.
    """
    candidate = Leadership(os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        yield candidate
    finally:
        candidate.end()
