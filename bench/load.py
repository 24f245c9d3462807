"""The load generator: keep-alive connections over bare sockets, each answer checked, each latency kept."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

from bench.loop import loop_factory
from bench.measure import percentile

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_OUTCOME = re.compile(rb"\r\nX-Cache: *([A-Z]+)")
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Invalid(Exception):
    """What was measured is not what was meant to be measured."""


@dataclass(slots=True)
class Load:
    """What came back. Latencies in milliseconds; `outcomes` counts answers by their X-Cache, "" for none.

    `frames` counts the chunks of chunked bodies, as the server cut them.
    """

    latencies_ms: array[float] = field(default_factory=lambda: array("d"))
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    seconds: float = 0.0

    @property
    def answered(self) -> int:
        """Number of good answers."""
        return len(self.latencies_ms)

    @property
    def per_second(self) -> float:
        """Good answers per second."""
        return self.answered / self.seconds

    @property
    def p50_ms(self) -> float:
        """Median latency."""
        return percentile(self.latencies_ms, 0.5)

    @property
    def p99_ms(self) -> float:
        """Latency that 1 % exceed."""
        return percentile(self.latencies_ms, 0.99)

    def only(self, outcome: str) -> Load:
        """This load.

        Raises:
            Invalid: there were errors, or answers of another outcome.
        """
        if self.errors:
            raise Invalid(f"errors: {dict(self.errors)}")
        if set(self.outcomes) != {outcome}:
            raise Invalid(f"expected answers with X-Cache {outcome!r} alone, got {dict(self.outcomes)}")
        return self


def drive(port: int, requests: Iterable[bytes], *, connections: int, timeout_s: float = 120.0) -> Load:
    """Send every request over some of `connections` to a port of this machine, each as soon as one is idle.

    Raises:
        OSError: the server does not listen.
        TimeoutError: it took longer than `timeout_s`.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_drive(port, iter(requests), connections, timeout_s))


async def _drive(port: int, requests: Iterator[bytes], connections: int, timeout_s: float) -> Load:
    load = Load()
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    async with asyncio.timeout(timeout_s):
        users = [_User(load, requests, loop.create_future()) for _ in range(connections)]
        try:
            for user in users:
                await loop.create_connection(functools.partial(_same, user), "127.0.0.1", port)
            await asyncio.gather(*(user.done for user in users))
        finally:
            for user in users:
                user.leave()
    load.seconds = time.perf_counter() - started
    return load


def _same(user: _User) -> _User:
    return user


class _User(asyncio.Protocol):
    """One connection that asks, waits for the whole answer, and asks again until there are no more requests."""

    def __init__(self, load: Load, requests: Iterator[bytes], done: asyncio.Future[None]) -> None:
        self.done = done
        self._load = load
        self._requests = requests
        self._transport: asyncio.Transport | None = None
        self._asked = 0.0
        self._parts: list[bytes] = []
        self._head = b""
        self._length: int | None = None
        self._have = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._ask(self._transport)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if not self._head:
            self._read_head()
        elif self._length is None:
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        else:
            self._have += len(data)
        if self._head and (self._tail == _LAST_CHUNK if self._length is None else self._have >= self._length):
            self._judge()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's name
        if not self.done.done():
            self._load.errors["connection lost"] += 1
            self.done.set_result(None)

    def leave(self) -> None:
        """Close the connection."""
        if not self.done.done():
            self.done.cancel()
        if self._transport is not None:
            self._transport.close()

    def _begin(self) -> None:
        self._parts, self._head, self._length, self._have, self._tail = [], b"", None, 0, b""

    def _ask(self, transport: asyncio.Transport) -> None:
        request = next(self._requests, None)
        if request is None:
            if not self.done.done():
                self.done.set_result(None)
            return
        self._asked = time.perf_counter()
        transport.write(request)

    def _read_head(self) -> None:
        whole = b"".join(self._parts)
        head, blank, body = whole.partition(b"\r\n\r\n")
        if not blank:
            return
        self._head = head
        self._parts = [body]
        self._have = len(body)
        # The line end of the head counts: a body without chunks is its last chunk alone.
        self._tail = (b"\r\n" + body)[-len(_LAST_CHUNK) :]
        found = _LENGTH.search(head)
        self._length = int(found[1]) if found else None

    def _judge(self) -> None:
        spent_ms = (time.perf_counter() - self._asked) * 1000
        head, length, body = self._head, self._length, b"".join(self._parts)
        self._begin()
        load = self._load
        if length is None:
            body, frames = unchunked(body)
            load.frames += frames
        wrong = _complaint(head, length, body)
        if wrong:
            load.errors[wrong] += 1
        else:
            load.latencies_ms.append(spent_ms)
            outcome = _OUTCOME.search(head)
            load.outcomes[outcome[1].decode() if outcome else ""] += 1
        if self._transport is not None and not self._transport.is_closing():
            self._ask(self._transport)


def _complaint(head: bytes, length: int | None, body: bytes) -> str:
    """What is wrong with an answer; empty where it is good."""
    if not head.startswith(b"HTTP/1.1 200"):
        return f"status {head[9:12].decode('latin-1')}"
    if length is not None and len(body) != length:
        return "more than one answer"
    if b'"finish_reason":"stop"' not in body:
        return "not a whole answer"
    if b"text/event-stream" in head and not body.endswith(b"data: [DONE]\n\n"):
        return "not a whole stream"
    return ""


def unchunked(raw: bytes) -> tuple[bytes, int]:
    """The body in a chunked encoding without trailers, and the number of its chunks."""
    chunks: list[bytes] = []
    place = 0
    while True:
        end = raw.index(b"\r\n", place)
        size = int(raw[place:end], 16)
        if size == 0:
            return b"".join(chunks), len(chunks)
        chunks.append(raw[end + 2 : end + 2 + size])
        place = end + size + 4
