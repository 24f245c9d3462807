"""nearhit as a program of its own, and what it tells of each request."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tests.clients.asking import LIMIT_S, Reply

Found = TypeVar("Found")

_PAUSE_S = 0.02
_TRIES = 20


class Served:
    """A running nearhit whose log, in JSON Lines, is in a file."""

    def __init__(self, log: Path) -> None:
        """The file may still be empty."""
        self._log = log
        self._read = 0
        self.url = _patiently(self._announced)

    def confirmed(self) -> None:
        """Wait until it knows what its upstream runs: before that, nothing is cached."""
        _patiently(self._is_confirmed)

    def outcomes(self, requests: int = 1) -> list[str]:
        """Where the answers to the requests since the last time came from; there were just so many."""
        return _patiently(lambda: self._told(requests))

    def _announced(self) -> str:
        lines = self._log.read_text(encoding="utf-8").splitlines()
        return next((line.partition("listens on ")[2].split(",")[0] for line in lines if "listens on" in line), "")

    def _is_confirmed(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready") as response:
            return bool(json.load(response)["upstream"]["standing"] == "confirmed")
        return False

    def _told(self, requests: int) -> list[str]:
        lines = self._log.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        told = [json.loads(line) for line in lines[self._read :] if line.startswith("{")]
        outcomes = [one["outcome"] for one in told if one.get("path", "").startswith("/v1/")]
        assert len(outcomes) <= requests, f"asked more often than that: {outcomes}"
        if len(outcomes) < requests:
            return []
        self._read = len(lines)
        return outcomes


@contextmanager
def serving(upstream: str, folder: Path) -> Iterator[Served]:
    """A nearhit in front of `upstream`, with data and log in `folder`; it ends with this process at the latest."""
    options = ("--upstream", upstream, "--port", "0", "--data-dir", str(folder), "--log-format", "json")
    command = [sys.executable, "-m", "proxy.demo.child", "proxy", "serve", *options]
    log = folder / "log"
    with (
        log.open("w") as written,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=written, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield Served(log)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(LIMIT_S)


def _patiently(look: Callable[[], Found]) -> Found:
    ends = time.monotonic() + LIMIT_S
    while not (found := look()):
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(_PAUSE_S)
    return found


def repeated(nearhit: Served, ask: Callable[[], Reply]) -> Reply:
    """Ask until the answer comes from the cache: it is stored a moment after it was given."""
    for _ in range(_TRIES):
        reply = ask()
        if nearhit.outcomes() == ["HIT"]:
            return reply
    raise AssertionError("never a hit")
