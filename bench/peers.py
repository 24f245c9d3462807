"""Servers that can be measured: a peer is a name and the command that starts it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r"listens on http://127\.0\.0\.1:(\d+)")
_START_S = 30.0
_STOP_S = 10.0
_POLL_S = 0.002
_LOADING_POLL_S = 0.1


class NotStarted(Exception):
    """A server ended, or took too long to begin."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `log` is its stderr; `spawned` the monotonic time in seconds at which its process began."""

    name: str
    port: int
    pid: int
    log: Path
    spawned: float

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind of server; `command` takes the upstream's URL and a folder of its own.

    The server must say `listens on http://127.0.0.1:PORT` on stderr and stop at SIGTERM. `ready` returns once it is
    fit to be measured.
    """

    name: str
    command: Callable[[str, Path], Sequence[str]]
    ready: Callable[[Server], None] = lambda _server: None


@contextmanager
def running(peer: Peer, upstream: str, folder: Path) -> Iterator[Server]:
    """The server, ready, for the life of this block.

    Raises:
        NotStarted: it did not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{peer.name}.log"
    # What is set for somebody's own nearhit must not change what is measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEARHIT_")}
    with log.open("ab") as stderr:
        log.write_bytes(b"")
        spawned = time.monotonic()
        process = subprocess.Popen(
            peer.command(upstream, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
        )
    try:
        server = Server(peer.name, _port(process, log), process.pid, log, spawned)
        peer.ready(server)
        yield server
    finally:
        _stop(process)


def get(server: Server, path: str) -> tuple[int, Any]:
    """Status and JSON of a GET; status 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        found = _ADDRESS.search(text)
        if found:
            return int(found[1])
        if process.poll() is not None:
            raise NotStarted(f"{log.stem} ended with {process.returncode}: {text[-500:].strip()}")
        time.sleep(_POLL_S)
    raise NotStarted(f"{log.stem} did not listen within {_START_S:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _until_ready(server: Server) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        status, _ = get(server, "/-/ready")
        if status == 200:
            _, told = get(server, "/-/stats")
            if told["upstream"]["standing"] != "confirmed" or told["sharing"]["namespaces"] != "shared":
                raise NotStarted(f"nearhit does not recognise the fake upstream: {told}")
            return
        time.sleep(_POLL_S)
    raise NotStarted(f"nearhit was not ready within {_START_S:g} s")


def until_loaded(server: Server) -> None:
    """Wait until nearhit has loaded what it loads in the background: that is not the price of a request.

    Raises:
        NotStarted: it does not end.
    """
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        status, told = get(server, "/-/stats")
        if status == 200 and told["near"]["state"] != "loading":
            return
        time.sleep(_LOADING_POLL_S)
    raise NotStarted(f"nearhit's near tier was not loaded within {_START_S:g} s")


def _reference(name: str) -> Callable[[str, Path], Sequence[str]]:
    return lambda upstream, _folder: [sys.executable, "-m", "bench.servers", name, "--upstream", upstream]


def nearhit(*flags: str) -> Peer:
    """nearhit as people start it, with these flags beside; its default settings count."""

    def command(upstream: str, folder: Path) -> Sequence[str]:
        serve = [sys.executable, "-m", "proxy", "serve", "--upstream", upstream, "--port", "0"]
        return [*serve, "--data-dir", str(folder), *flags]

    return Peer("nearhit", command, _until_ready)


UPSTREAM = Peer("upstream", _reference("upstream"))
ONE_AT_A_TIME = Peer("one-at-a-time", _reference("one-at-a-time"))
BARE = Peer("bare", _reference("bare"))
PASS_THROUGH = Peer("passthrough", _reference("passthrough"))
