"""A connection to the upstream that no longer speaks HTTP: bytes in both directions, nobody faster than the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp.client_proto import ResponseHandler
from aiohttp.http import StreamWriter

_FULL = 65_536
"""Bytes that wait in one direction before the sender has to."""

Write = Callable[[bytes], Awaitable[None]]
"""Sends bytes; returns once not too many wait to be sent.

Raises:
    ConnectionError: the connection is lost.
"""


class Pausable(Protocol):
    """A connection that can be told to stop reading."""

    def pause_reading(self) -> None:
        """Leave what comes to the system, which makes the sender wait."""
        ...

    def resume_reading(self) -> None:
        """Read on."""
        ...


class Inlet:
    """What arrives on a connection whose protocol was switched, given to aiohttp as its parser."""

    def __init__(self, connection: Pausable) -> None:
        """Nothing has come yet."""
        self.ended = False
        """Whether the connection is lost or closed; something may still lie here."""
        self._connection = connection
        self._held = bytearray()
        self._paused = False
        self._woken = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """See aiohttp's `WebSocketReader`: whether this is the end, and what is left over."""
        self._held += data
        if len(self._held) >= _FULL and not self._paused:
            self._paused = True
            self._connection.pause_reading()
        self._woken.set()
        return False, b""

    def feed_eof(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._woken.set()

    def wake(self) -> None:
        """Have `woken` return, whether or not something has come."""
        self._woken.set()

    async def woken(self) -> None:
        """Wait for something to come, the end, or `wake`."""
        await self._woken.wait()
        self._woken.clear()

    def take(self) -> bytes:
        """All that has come."""
        taken = bytes(self._held)
        self._held.clear()
        if self._paused:
            self._paused = False
            self._connection.resume_reading()
        return taken


class Switched:
    """The upstream's end. `inlet` has what it sends; `write` sends."""

    def __init__(self, connection: ResponseHandler) -> None:
        """Read from now on; a silence of any length is no fault."""
        self.inlet = Inlet(connection)
        self._connection = connection
        self._writer = StreamWriter(connection, asyncio.get_running_loop())
        connection.read_timeout = None
        connection.set_parser(self.inlet, None)

    async def write(self, data: bytes) -> None:
        """See `Write`."""
        await self._writer.write(data)

    def leave_with(self, data: bytes) -> None:
        """Send these last bytes as far as the connection takes them, without waiting."""
        transport = self._connection.transport
        if data and transport is not None and not transport.is_closing():
            transport.write(data)

    def abort(self) -> None:
        """Close at once; what waits to be sent is lost."""
        self._connection.abort()
