"""Log lines written from a thread of their own: whoever stops reading them must not stop the service."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_MAX_WAITING = 1000
_CLOSE_S = 2.0


class Lines:
    """A queue of texts on their way to a stream; beyond `_MAX_WAITING` they are lost."""

    def __init__(self, out: TextIO) -> None:
        """Start the thread; `close` ends it."""
        self._write_out = _writer(out)
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A daemon: a stream that blocks for ever must not keep the program from ending.
        self._thread = threading.Thread(target=self._write, name="nearhit-lines", daemon=True)
        self._thread.start()

    def put(self, text: str) -> None:
        """Write soon; never waits."""
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put(text)

    def close(self) -> None:
        """Write what waits, for two seconds at most. Blocks."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        while (text := self._waiting.get()) is not None:
            # Where nobody reads any more, lines are lost and the service goes on.
            with suppress(OSError, ValueError):
                self._write_out(text)


def _writer(out: TextIO) -> Callable[[str], None]:
    try:
        descriptor = out.fileno()
    except (OSError, ValueError):
        return lambda text: _write_text(out, text)

    def write(text: str) -> None:
        # Past the stream's own buffer: a write that blocks would hold its lock when the interpreter wants to flush it.
        rest = text.encode("utf-8", "backslashreplace")
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    return write


def _write_text(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


@contextmanager
def lines(out: TextIO) -> Iterator[Lines]:
    """Lines for the life of this block."""
    waiting = Lines(out)
    try:
        yield waiting
    finally:
        waiting.close()
