"""The demo's two servers as processes: started, waited for, stopped, their output in files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

from proxy.demo.errors import DemoError
from proxy.demo.interrupts import Interrupts

START_LIMIT_S = 60.0
_STOP_LIMIT_S = 7.0
_POLL_S = 0.02
_LOG_LINES = 12
_ADDRESS = re.compile(r"listens on (http://[^\s,]+)[\s,]")
_ROOT = Path(__file__).parents[2]

T = TypeVar("T")


class Child:
    """A running server and its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self._log = log

    def address(self, limit_s: float = START_LIMIT_S) -> str:
        """Wait for the line in which the server says where it listens; `http://HOST:PORT`.

        Raises:
            DemoError: it ended, or `limit_s` seconds passed; with the end of its log.
        """
        return self._until(self._told_address, limit_s)

    def ready(self, url: str, path: str, limit_s: float = START_LIMIT_S) -> None:
        """Wait until the server answers 200 there.

        Raises:
            DemoError: as for `address`.
        """
        self._until(lambda: answers(url, path) or None, limit_s)

    def failed(self, what: str) -> DemoError:
        """An error that says what happened and quotes the end of the log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        quoted = "".join(f"\n  | {line}" for line in lines) or " (empty)"
        return DemoError(f"{self.name} {what}; the end of its log:{quoted}")

    def stop(self) -> None:
        """End it in good order, by force if that takes too long."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _until(self, attempt: Callable[[], T | None], limit_s: float) -> T:
        end = time.monotonic() + limit_s
        while (found := attempt()) is None:
            if self.process.poll() is not None:
                raise self.failed(f"ended while it started (exit code {self.process.returncode})")
            if time.monotonic() > end:
                raise self.failed(f"did not start within {limit_s:g} s")
            time.sleep(_POLL_S)
        return found

    def _told_address(self) -> str | None:
        match = _ADDRESS.search(self._log.read_text(encoding="utf-8", errors="replace"))
        return match[1] if match else None


class Children:
    """Starts servers; leaving it stops them, the last one first."""

    def __init__(self, folder: Path, interrupts: Interrupts) -> None:
        self._folder = folder
        self._interrupts = interrupts
        self._running: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._running:
            self._running.pop().stop()

    def start(self, name: str, module: str, *arguments: str) -> Child:
        """Run a module of Python as a program that ends when this process does; its output goes to a file."""
        log = self._folder / f"{name}.log"
        command = [sys.executable, "-P", "-m", "proxy.demo.child", module, *arguments]
        with self._interrupts.held(), log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own modules
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ),
                # The terminal's Ctrl-C is for the demo, which stops its servers in order.
                start_new_session=True,
            )
            child = Child(name, process, log)
            self._running.append(child)
        return child


def answers(url: str, path: str) -> bool:
    """Whether a GET is answered with 200."""
    at = urlsplit(url)
    connection = HTTPConnection(at.hostname or "", at.port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    # A person's own settings of nearhit, such as a cache that is off, would spoil the demo.
    kept = {name: value for name, value in ours.items() if not name.startswith("NEARHIT_")}
    # The same code as here, whatever lies in the current directory.
    path = [str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "NEARHIT_LIMITS_SHUTDOWN_S": "1"}
