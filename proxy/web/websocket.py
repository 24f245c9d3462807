"""WebSockets: passed on byte by byte once the upstream has agreed, so that they are what client and upstream make them.

nearhit takes no part: subprotocols, compression, pings, close codes and sizes are theirs. It reads along where frames
end, and says goodbye for either side when it stops itself.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from proxy.cache.dialects import DIALECTS
from proxy.upstream.client import UpstreamGarbled, UpstreamResponse
from proxy.upstream.switched import Inlet, Switched, Write
from proxy.web.accesslog import Exchange
from proxy.web.errors import error_response
from proxy.web.frames import Frames, close_frame
from proxy.web.headers import to_client
from proxy.web.relay import ABSENT
from proxy.web.stopping import STOPPING, Stopping

SWITCHING = 101
_GOING_AWAY = 1001
_GOODBYE_S = 2.0
"""How long the two sides have to answer nearhit's goodbye; half the time to stop, where that is less."""
_ADDED = ("Date", "Server")
"""What aiohttp adds to an answer without a body."""
_CACHED = frozenset(path for dialect in DIALECTS for path in dialect.paths)


def asks_for_websocket(request: web.Request) -> bool:
    """Whether a request is the opening handshake of a WebSocket (RFC 6455 section 4.1)."""
    headers = request.headers
    if headers.get("Upgrade", "").lower() != "websocket" or request.method != "GET":
        return False
    tokens = ",".join(headers.getall("Connection", ())).lower().split(",")
    return request.version >= HttpVersion11 and "upgrade" in (token.strip() for token in tokens)


def is_answered_here(request: web.Request) -> bool:
    """Whether a path is one that nearhit answers, by itself or from its cache."""
    return request.path in _CACHED


def no_websocket() -> web.Response:
    """The refusal at a path that nearhit answers itself."""
    message = "there is no WebSocket at this path: nearhit answers it over plain HTTP"
    return error_response(400, message, "no_websocket")


def with_upgrade(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The fields of a request that go on to the upstream, with those of this connection that ask for a WebSocket."""
    asking = CIMultiDict(headers)
    asking["Connection"], asking["Upgrade"] = "Upgrade", "websocket"
    return asking


async def bridged(
    request: web.Request, exchange: Exchange, response: UpstreamResponse, shutdown_s: float
) -> web.StreamResponse:
    """Tell the client that the upstream has agreed, and pass on until one of them has left.

    Raises:
        UpstreamGarbled: the upstream agreed to nothing that it was asked for; nothing was sent to the client yet.
    """
    if not asks_for_websocket(request) or response.headers.get("Upgrade", "").lower() != "websocket":
        raise UpstreamGarbled("it switches to a protocol that it was not asked for")
    upstream = response.switched()
    answer = await _agreed(request, exchange, response)
    inlet = Inlet(request.protocol)
    # It asks for a parser of aiohttp's own, and calls what this one has.
    request.protocol.set_parser(cast("Any", inlet))

    async def deliver(data: bytes) -> None:
        exchange.sent += len(data)
        await answer.write(data)

    up = _Way(inlet, upstream.write, close_frame(_GOING_AWAY, "nearhit is stopping", secrets.token_bytes(4)))
    down = _Way(upstream.inlet, deliver, close_frame(_GOING_AWAY, "nearhit is stopping"))
    stopping = request.app[STOPPING]
    try:
        with stopping.farewell():
            in_time = await _carried(up, down, stopping, min(_GOODBYE_S, shutdown_s / 2))
    except asyncio.CancelledError:
        # A client may hang up right behind its last words, and once both have said goodbye it should.
        upstream.leave_with(up.last_words())
        if not up.is_over(down):
            raise
        return answer
    if not in_time:
        _cut(request, upstream)
    return answer


async def _agreed(request: web.Request, exchange: Exchange, response: UpstreamResponse) -> web.StreamResponse:
    headers = to_client(response.headers)
    headers["Connection"], headers["Upgrade"] = "Upgrade", "websocket"
    request[ABSENT] = [name for name in _ADDED if name not in headers]
    answer = web.StreamResponse(status=SWITCHING, reason=response.reason, headers=headers)
    answer.force_close()
    try:
        await answer.prepare(request)
    except ValueError as error:
        raise UpstreamGarbled("a header field that cannot be sent on") from error
    exchange.status = SWITCHING
    return answer


class _Way:
    """One direction."""

    def __init__(self, inlet: Inlet, write: Write, goodbye: bytes) -> None:
        """From `inlet` to `write`; `goodbye` is the frame to send there when nearhit stops."""
        self.inlet = inlet
        self.frames = Frames()
        self.leaving = False
        self._write = write
        self._goodbye = goodbye

    def leave(self) -> None:
        """Say goodbye behind the frame that is on its way, and pass on no other."""
        self.leaving = True
        self.inlet.wake()

    def last_words(self) -> bytes:
        """What has come and is still to be passed on."""
        data = self.inlet.take()
        self.frames.feed(data)
        return b"" if self.leaving else data

    async def carry(self, back: _Way) -> None:
        """Pass on until the sender's connection ends, the receiver's is lost, or both have closed the WebSocket."""
        with suppress(ConnectionError):
            while not self.is_over(back):
                await self.inlet.woken()
                # What came before the end is here now, and nothing comes behind it.
                ended, data = self.inlet.ended, self.inlet.take()
                await self._pass(data)
                if self.frames.closed:
                    back.inlet.wake()
                if ended:
                    return

    def is_over(self, back: _Way) -> bool:
        """Whether the sender has said goodbye, and so has whoever sends the other way."""
        return self.frames.closed and (self.leaving or back.frames.closed)

    async def _pass(self, data: bytes) -> None:
        if not self.leaving:
            self.frames.feed(data)
            await self._send(data)
            return
        ending = self.frames.feed(data, to_the_end=True)
        await self._send(data[:ending] if self._goodbye else b"")
        if self.frames.between and self._goodbye:
            goodbye, self._goodbye = self._goodbye, b""
            await self._send(b"" if self.frames.closed else goodbye)
        self.frames.feed(data[ending:])

    async def _send(self, data: bytes) -> None:
        if data:
            await self._write(data)


async def _carried(up: _Way, down: _Way, stopping: Stopping, goodbye_s: float) -> bool:
    """Carry both ways until they are through; False where they were not by the time that nearhit had to go."""
    upwards, downwards = asyncio.create_task(up.carry(down)), asyncio.create_task(down.carry(up))
    stop = asyncio.create_task(stopping.wait())
    pending: set[asyncio.Task[Any]] = {upwards, downwards, stop}
    until: float | None = None
    try:
        # Whatever the client does, what the upstream said is delivered; a client that leaves cancels us.
        while not downwards.done() or (stop.done() and not upwards.done()):
            limit = None if until is None else max(0, until - time.monotonic())
            done, pending = await asyncio.wait(pending, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return False
            for task in done:
                task.result()
            if stop in done:
                until = time.monotonic() + goodbye_s
                up.leave()
                down.leave()
    finally:
        for task in (upwards, downwards, stop):
            task.cancel()
        await asyncio.gather(upwards, downwards, stop, return_exceptions=True)
    return True


def _cut(request: web.Request, upstream: Switched) -> None:
    upstream.abort()
    if request.transport is not None:
        request.transport.abort()
