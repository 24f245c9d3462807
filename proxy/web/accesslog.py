"""One line for each request, without prompts, answers, queries or credentials; written in batches."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TextIO
from urllib.parse import quote, unquote

from proxy.lines import Lines

_EVERY_S = 0.25
_BATCH = 1000


@dataclass(slots=True)
class Exchange:
    """What is told of one request; filled in while it is served. `target` is path and query as they came.

    `client` is the name of a named client.
    """

    method: str
    target: str
    peer: str
    status: int = 0
    outcome: str = "PASS"
    reason: str = ""
    sent: int = 0
    seconds: float = 0.0
    client: str = ""


def path_of(target: str) -> str:
    """The path for people, without query and fragment, which may hold secrets."""
    return unquote(target.partition("?")[0].partition("#")[0])


def outline(path: str, route: str, known: Container[str]) -> str:
    """What may be told of the path of somebody unknown, who may have put a key there: no more than we knew before.

    `route` is the pattern that it matched, `known` are those of all routes; `…` stands for what the client chose.
    """
    if path in known:
        return path
    fixed, chosen, _ = route.partition("{")
    return fixed + "…" if chosen else fixed


class AccessLog:
    """Gathers lines and hands them over a few times a second: one write each would cost as much as a hit."""

    def __init__(self, format_name: str, out: Lines) -> None:
        """`format_name` is `text` or `json`."""
        self._line = _json_line if format_name == "json" else _text_line
        self._out = out
        self._waiting: list[tuple[float, Exchange]] = []

    def add(self, exchange: Exchange) -> None:
        """Note a finished request."""
        self._waiting.append((time.time(), exchange))
        if len(self._waiting) >= _BATCH:
            self.write()

    def write(self) -> None:
        """Hand over what waits."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._out.put("".join(self._line(when, exchange) for when, exchange in waiting))

    async def run(self) -> None:
        """Hand over again and again until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            self.write()


@asynccontextmanager
async def access_log(format_name: str, out: TextIO | None = None) -> AsyncIterator[AccessLog]:
    """An access log for the life of this block; leaving it writes what waits."""
    waiting = Lines(out or sys.stderr)
    log = AccessLog(format_name, waiting)
    task = asyncio.create_task(log.run(), name="nearhit-access-log")
    try:
        yield log
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        log.write()
        await asyncio.to_thread(waiting.close)


@lru_cache(maxsize=4)
def _second(when: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))


def _stamp(when: float) -> str:
    return f"{_second(int(when))}.{int(when * 1000) % 1000:03d}Z"


@lru_cache(maxsize=256)
def _shown(target: str) -> str:
    path = path_of(target)
    # A path is the client's text: no line breaks, terminal codes or further fields of its making.
    return path if path.isprintable() and " " not in path else quote(path, errors="backslashreplace")


def _text_line(when: float, e: Exchange) -> str:
    reason = f" ({e.reason})" if e.reason else ""
    spent = f"{e.seconds * 1000:.1f} ms"
    return f"{_stamp(when)} {e.peer} {e.method} {_shown(e.target)} {e.status} {e.outcome}{reason} {spent} {e.sent} B\n"


def _json_line(when: float, e: Exchange) -> str:
    fields = {
        "time": _stamp(when),
        "peer": e.peer,
        "method": e.method,
        "path": path_of(e.target),
        "status": e.status,
        "outcome": e.outcome,
        "reason": e.reason,
        "ms": round(e.seconds * 1000, 3),
        "bytes": e.sent,
        **({"client": e.client} if e.client else {}),
    }
    return json.dumps(fields) + "\n"
