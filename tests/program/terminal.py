"""The installed program on a terminal of its own, as a person has it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.program.test_cli import PROGRAM, environment

_LIMIT_S = 180.0
"""Ends a test that has failed."""


class Terminal:
    """A running program, what it has shown so far, and the keyboard. Every method blocks."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self.shown = ""

    @property
    def lines(self) -> list[str]:
        """What is shown, without styles."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown).splitlines()

    def until(self, text: str) -> str:
        """All that is shown until this text appears, which was not shown before this call."""
        before = len(self.shown)
        ends = time.monotonic() + _LIMIT_S
        while text not in self.shown[before:]:
            assert time.monotonic() < ends, self.shown
            assert self._read(), self.shown
        return self.shown[before:]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        while self._read():
            pass
        return self._process.wait(_LIMIT_S)

    def _read(self) -> bool:
        """Take what comes; whether more may come."""
        ready, _, _ = select.select([self._master], [], [], _LIMIT_S)
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:
            # Linux says so when the other side is closed.
            return False
        self.shown += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


@contextmanager
def terminal(home: Path, *arguments: str, **changes: str) -> Iterator[Terminal]:
    """Run the program on a terminal of 100 columns for the life of this block."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [str(PROGRAM), *arguments],
        env=environment(home, TERM="xterm", **changes),
        cwd=home,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
