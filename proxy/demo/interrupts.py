"""Ctrl-C and SIGTERM: only where the work is, so that starting and stopping things is never cut in half."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupts:
    """While entered, a signal raises inside `allowed()` only; elsewhere it waits for the next place where it may.

    SIGINT raises KeyboardInterrupt; SIGTERM and SIGHUP raise SystemExit with 128 + the signal's number, as shells do.
    For the main thread.
    """

    def __init__(self) -> None:
        self._open = False
        self._pending: int | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            # Under nohup the hang-up is to be ignored.
            if number is not signal.SIGHUP or before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if error is None:
            self.check()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Signals raise in this block, one that waited at once."""
        with self._switched(on=True):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait for the end of this block."""
        with self._switched(on=False):
            yield

    def check(self) -> None:
        """Raise for a signal that has arrived.

        Raises:
            KeyboardInterrupt: it was SIGINT.
            SystemExit: it was another one.
        """
        if self._pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self._pending is not None:
            raise SystemExit(128 + self._pending)

    @contextmanager
    def _switched(self, *, on: bool) -> Iterator[None]:
        before, self._open = self._open, on
        try:
            if on:
                self.check()
            yield
        finally:
            self._open = before
        if before:
            self.check()

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self._pending = self._pending or number
        if self._open:
            self.check()
