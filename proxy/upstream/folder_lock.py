"""Which of several processes has a part of a folder: the one that holds its lock (flock(2))."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path


class FolderLock:
    """A lock on a part of a folder's content. Blocking, and for one thread at a time."""

    def __init__(self, folder: Path, part: str) -> None:
        """`part` is any text that says which part it is."""
        mark = hashlib.sha256(part.encode()).hexdigest()[:16]
        self._path = folder / f".{mark}.lock"
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Whether it is this process's, from now on. Raises OSError where the folder does not let anybody tell."""
        if self._descriptor is not None:
            return True
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._descriptor = descriptor
        return True

    def close(self) -> None:
        """Let others have it; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
