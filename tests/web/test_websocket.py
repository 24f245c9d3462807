"""WebSockets pass through byte by byte; other switches of protocol are ignored or refused, as HTTP allows."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from proxy.cache.dialects import DIALECTS
from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, fake_model, held, reply
from tests.web.test_upstreams import settings as several

LARGE = 8 * 1024 * 1024
ENDLESS = 64 * 1024 * 1024
"""Bytes that no socket buffers hold."""
ENDLESS_FRAME = b"\x82\xff" + struct.pack("!Q", 1 << 62) + bytes(4)
"""How a frame begins whose end nobody will see."""
HANDSHAKE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@dataclass
class Far:
    """The upstream's end of the WebSockets that were opened, and what it heard there."""

    requests: list[web.Request] = field(default_factory=list)
    sockets: list[web.WebSocketResponse] = field(default_factory=list)
    heard: list[tuple[WSMsgType, Any, Any]] = field(default_factory=list)
    closed: list[int | None] = field(default_factory=list)
    sent: int = 0

    async def serve(self, request: web.Request) -> web.StreamResponse | None:
        if not request.path.startswith("/ws"):
            return None
        socket = web.WebSocketResponse(
            protocols=("llm.v2",), autoping=False, max_msg_size=0, compress="deflate" in request.query_string
        )
        await socket.prepare(request)
        self.requests.append(request)
        self.sockets.append(socket)
        try:
            await (self._flood(socket) if request.path == "/ws/flood" else self._echo(socket))
        finally:
            self.closed.append(socket.close_code)
        return socket

    async def _flood(self, socket: web.WebSocketResponse) -> None:
        while self.sent < ENDLESS:
            await socket.send_bytes(b"x" * 65_536)
            self.sent += 65_536
        await socket.close(code=4000, message=b"all said")

    async def _echo(self, socket: web.WebSocketResponse) -> None:
        async for message in socket:
            self.heard.append((message.type, message.data, message.extra))
            match message.type:
                case WSMsgType.TEXT if message.data == "hang up":
                    self.transport.abort()
                case WSMsgType.TEXT if message.data.startswith("close "):
                    _, code, reason = message.data.split(" ", 2)
                    await socket.close(code=int(code), message=reason.encode())
                case WSMsgType.TEXT:
                    await socket.send_str(message.data)
                case WSMsgType.BINARY:
                    await socket.send_bytes(message.data)
                case WSMsgType.PING:
                    await socket.pong(message.data + b" heard")

    @property
    def transport(self) -> Any:
        transport = self.requests[-1].transport
        assert transport is not None
        return transport


@pytest.fixture
def far(model: FakeModel) -> Far:
    far = Far()
    model.extra = far.serve
    return far


async def raw(proxy: Proxy, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which this was sent."""
    place = urlsplit(proxy.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    writer.write(f"{head}\r\nHost: {place.netloc}\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def opened(proxy: Proxy, path: str = "/ws") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket in the raw, after its handshake."""
    reader, writer = await raw(proxy, f"GET {path} HTTP/1.1", f"{HANDSHAKE}\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    return reader, writer


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """A client's frame, with a mask that changes nothing."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack("!H", size)
    return bytes([(0x80 if final else 0) | opcode]) + length + bytes(4) + payload


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """An HTTP answer with a length: status, header fields in lower case, JSON body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(fields["content-length"]))
    return int(first.split()[1]), fields, json.loads(body)


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
AGREED = b"HTTP/1.1 101 OK\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"


@asynccontextmanager
async def tcp_server(serve: Serve) -> AsyncIterator[str]:
    """A server that does at `/ws` what it is told, once it has read the request's head, and knows no other path."""
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            if (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /ws "):
                await serve(reader, writer)
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await end(writer)

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        tasks.add(asyncio.create_task(one(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *map(end, writers), return_exceptions=True)


async def stalled(count: Callable[[], int]) -> int:
    """What a count has come to when it rises no more for a while; a slow machine only makes the test weaker."""
    last, still = -1, 0
    async with asyncio.timeout(60):
        while still < 40:
            last, still = (last, still + 1) if count() == last else (count(), 0)
            await asyncio.sleep(0.005)
    return last


def logged(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """The requests that the access log is told of from now on: method, target, status, bytes."""
    lines: list[tuple[str, str, int, int]] = []
    monkeypatch.setattr(
        proxy.services.access, "add", lambda e: lines.append((e.method, e.target, e.status, e.sent)), raising=True
    )
    return lines


async def test_texts_and_bytes_pass_both_ways(proxy: Proxy, far: Far) -> None:
    async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
        for text in ("hello", "", "żółw 🐢", "x" * 70_000):
            await socket.send_str(text)
            assert await socket.receive_str() == text
        for data in (b"", os.urandom(300), bytes(126), bytes(65_536)):
            await socket.send_bytes(data)
            assert await socket.receive_bytes() == data


async def test_the_handshake_passes_as_it_is(proxy: Proxy, far: Far) -> None:
    headers = {"Authorization": "Bearer sk-mine", "X-Own": "1", "Cookie": "a=b", "X-Nearhit-Admin": "secret"}
    async with proxy.session.ws_connect(
        f"{proxy.url}/ws/a%2Fb?x=1&y=%7B%7D",
        protocols=("llm.v1", "llm.v2"),
        origin="https://page.example",
        headers=headers,
    ) as socket:
        assert socket.protocol == "llm.v2"
        (request,) = far.requests
    assert request.raw_path == "/ws/a%2Fb?x=1&y=%7B%7D"
    shown = {name: request.headers.get(name) for name in ("Authorization", "X-Own", "Cookie", "Origin")}
    assert shown == {
        "Authorization": "Bearer sk-mine",
        "X-Own": "1",
        "Cookie": "a=b",
        "Origin": "https://page.example",
    }
    assert "X-Nearhit-Admin" not in request.headers
    assert request.headers["Host"] != urlsplit(proxy.url).netloc


async def test_the_answer_to_the_handshake_has_no_field_of_ours(proxy: Proxy, far: Far) -> None:
    reader, writer = await raw(proxy, "GET /ws HTTP/1.1", f"{HANDSHAKE}\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert head.startswith("http/1.1 101 switching protocols\r\n")
    assert "\r\nsec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n" in head
    assert not {"cache-status", "x-cache", "content-length", "transfer-encoding"} & {
        line.partition(":")[0] for line in head.split("\r\n")
    }
    await end(writer)


async def test_compression_is_agreed_on_by_the_two_ends(proxy: Proxy, far: Far) -> None:
    async with proxy.session.ws_connect(f"{proxy.url}/ws?deflate", compress=15) as socket:
        assert socket.compress == 15
        for _ in range(3):
            await socket.send_str("again and " * 5000)
            assert await socket.receive_str() == "again and " * 5000
    async with proxy.session.ws_connect(f"{proxy.url}/ws", compress=15) as socket:
        assert not socket.compress, "the upstream does not want it"


async def test_pings_and_pongs_are_the_other_sides(proxy: Proxy, far: Far) -> None:
    async with proxy.session.ws_connect(f"{proxy.url}/ws", autoping=False) as socket:
        await socket.ping(b"you?")
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.PONG, b"you? heard")
        await far.sockets[0].ping(b"and you?")
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.PING, b"and you?")
        await socket.pong(b"fine")
        await eventually(lambda: (WSMsgType.PONG, b"fine", "") in far.heard)


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "bye"), (1011, "oh"), (4321, "own: ż")])
async def test_the_clients_close_reaches_the_upstream(proxy: Proxy, far: Far, code: int, reason: str) -> None:
    async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
        await socket.close(code=code, message=reason.encode())
    await eventually(lambda: far.closed == [code])


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "bye"), (1013, "busy"), (4321, "own: ż")])
async def test_the_upstreams_close_reaches_the_client(proxy: Proxy, far: Far, code: int, reason: str) -> None:
    async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
        await socket.send_str(f"close {code} {reason}")
        message = await socket.receive()
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, code, reason)
    await eventually(lambda: len(far.closed) == 1)


async def test_a_close_is_one_line_in_the_access_log(proxy: Proxy, far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(proxy, monkeypatch)
    async with proxy.session.ws_connect(f"{proxy.url}/ws?secret=1") as socket:
        await socket.send_str("12345")
        assert await socket.receive_str() == "12345"
    await eventually(lambda: len(lines) == 1)
    # Two bytes before each payload, and two of the code that closes.
    assert lines == [("GET", "/ws?secret=1", 101, 2 + 5 + 2 + 2)]


async def test_a_huge_message_passes(proxy: Proxy, far: Far) -> None:
    data = os.urandom(LARGE)
    async with proxy.session.ws_connect(f"{proxy.url}/ws", max_msg_size=0) as socket:
        await socket.send_bytes(data)
        assert await socket.receive_bytes() == data


async def test_a_frame_that_never_ends_arrives_as_it_comes(start: StartProxy) -> None:
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(AGREED)
        while data := await reader.read(65_536):
            seen.extend(data)

    async with tcp_server(serve) as url:
        proxy = await start(url=url)
        _, writer = await opened(proxy)
        beginning = ENDLESS_FRAME + b"the first of many bytes"
        writer.write(beginning)
        await eventually(lambda: bytes(seen) == beginning)
        await end(writer)


async def test_a_flood_of_empty_frames_passes(proxy: Proxy, far: Far) -> None:
    reader, writer = await opened(proxy)
    writer.write(frame(2, b"") * 20_000 + frame(8, struct.pack("!H", 1000)))
    assert await reader.read() == b"\x82\x00" * 20_000 + b"\x88\x02\x03\xe8"
    await end(writer)


async def test_a_client_that_does_not_read_stops_the_upstream_and_nobody_else(proxy: Proxy, far: Far) -> None:
    whole = ENDLESS + ENDLESS // 65_536 * 10
    """With the heads of the frames."""
    reader, writer = await opened(proxy, "/ws/flood")
    async with asyncio.timeout(60):
        await eventually(lambda: far.sent > 0)
        assert await stalled(lambda: far.sent) < ENDLESS // 2
        async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
            await socket.send_str("hello")
            assert await socket.receive_str() == "hello"
        await reader.readexactly(whole)
    assert far.sent == ENDLESS
    await end(writer)


async def test_an_upstream_that_does_not_read_stops_the_client(start: StartProxy) -> None:
    go, sent, seen = asyncio.Event(), 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        writer.write(AGREED)
        await go.wait()
        while data := await reader.read(1 << 20):
            seen += len(data)

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < ENDLESS:
            writer.write(bytes(65_536))
            sent += 65_536
            await writer.drain()

    async with tcp_server(serve) as url:
        proxy = await start(url=url)
        _, writer = await opened(proxy)
        writer.write(ENDLESS_FRAME)
        pouring = asyncio.create_task(pour(writer))
        assert await stalled(lambda: sent) < ENDLESS // 2
        go.set()
        await pouring
        await end(writer)
        await eventually(lambda: seen == len(ENDLESS_FRAME) + ENDLESS)


async def test_an_upstream_that_hangs_up_is_gone_for_the_client_too(proxy: Proxy, far: Far) -> None:
    async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
        await socket.send_str("first")
        await socket.send_str("hang up")
        assert await socket.receive_str() == "first"
        message = await socket.receive()
        assert message.type in (WSMsgType.CLOSED, WSMsgType.ERROR)
        assert socket.close_code == 1006, "nobody said why, and nearhit invents nothing"


async def test_a_client_that_hangs_up_is_gone_for_the_upstream_too(
    proxy: Proxy, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = logged(proxy, monkeypatch)
    _, writer = await opened(proxy)
    writer.transport.abort()
    await eventually(lambda: far.closed == [None])
    await eventually(lambda: lines == [("GET", "/ws", 499, 0)])


async def test_what_a_client_said_before_it_left_arrives(proxy: Proxy, far: Far) -> None:
    _, writer = await opened(proxy)
    writer.write(b"".join(frame(2, bytes(60_000)) for _ in range(5)) + frame(8, struct.pack("!H", 4007)))
    await writer.drain()
    await end(writer)
    await eventually(lambda: far.closed == [4007])
    assert [kind for kind, *_ in far.heard] == [WSMsgType.BINARY] * 5


async def test_a_client_may_send_before_the_handshake_is_answered(proxy: Proxy, far: Far) -> None:
    reader, writer = await raw(proxy, "GET /ws HTTP/1.1", f"{HANDSHAKE}\r\n".encode() + frame(1, b"hasty"))
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(7) == b"\x81\x05hasty"
    await end(writer)


async def test_a_hundred_come_and_go(proxy: Proxy, far: Far) -> None:
    async def one(number: int) -> None:
        async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
            await socket.send_str(f"number {number}")
            assert await socket.receive_str() == f"number {number}"

    async def rude() -> None:
        _, writer = await opened(proxy)
        writer.transport.abort()

    await asyncio.gather(*(one(number) for number in range(70)), *(rude() for _ in range(30)))
    await eventually(lambda: len(far.closed) == 100)
    assert (far.closed.count(1000), far.closed.count(None)) == (70, 30)


@pytest.mark.parametrize("status", [200, 301, 401, 404, 426, 503])
async def test_an_upstream_that_refuses_is_heard_as_it_is(proxy: Proxy, model: FakeModel, status: int) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse | None:
        refusal = web.json_response({"error": {"message": "no"}}, status=status, headers={"X-Why": "because"})
        return refusal if request.path == "/ws" else None

    model.extra = refuse
    reader, writer = await raw(proxy, "GET /ws HTTP/1.1", f"{HANDSHAKE}\r\n".encode())
    told, fields, body = await answer_of(reader)
    assert (told, fields["x-why"], body) == (status, "because", {"error": {"message": "no"}})
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await answer_of(reader))[0] == 200, "the connection is still in step"
    await end(writer)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await proxy.session.ws_connect(f"{proxy.url}/ws")
    assert refused.value.status == status


async def test_an_upstream_that_is_away_is_told(start: StartProxy) -> None:
    proxy = await start(url="http://127.0.0.1:9", wait=False)
    reader, writer = await raw(proxy, "GET /ws HTTP/1.1", f"{HANDSHAKE}\r\n".encode())
    status, _, body = await answer_of(reader)
    assert (status, body["error"]["code"]) == (502, "upstream_unreachable")
    await end(writer)


@pytest.mark.parametrize(
    "switch",
    [
        b"HTTP/1.1 101 OK\r\n\r\n",
        b"HTTP/1.1 101 OK\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\n\r\n",
    ],
)
@pytest.mark.parametrize("asked", [HANDSHAKE, "Connection: keep-alive\r\n"])
async def test_a_switch_that_nobody_asked_for_is_not_passed_on(start: StartProxy, switch: bytes, asked: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switch)
        await reader.read()

    async with tcp_server(serve) as url:
        proxy = await start(url=url, upstream__read_timeout_s="30")
        reader, writer = await raw(proxy, "GET /ws HTTP/1.1", f"{asked}\r\n".encode())
        status, _, body = await answer_of(reader)
        assert (status, body["error"]["code"]) == (502, "upstream_garbled")
        await end(writer)


async def test_a_silence_is_no_timeout(start: StartProxy, far: Far) -> None:
    proxy = await start(upstream__read_timeout_s="1")
    async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
        # Longer than the limit, in which nothing may happen.
        await asyncio.sleep(1.2)
        await socket.send_str("still here")
        assert await socket.receive_str() == "still here"


async def test_it_takes_no_place_in_the_queue(start: StartProxy, model: FakeModel, far: Far) -> None:
    proxy = await start(upstream__max_concurrency="1")
    async with proxy.session.ws_connect(f"{proxy.url}/ws") as socket:
        assert (await proxy.chat("one")).status == 200
        model.respond = held(reply("two"))
        waiting = asyncio.create_task(proxy.chat("two"))
        await eventually(lambda: model.started == 2)
        async with proxy.session.ws_connect(f"{proxy.url}/ws") as another:
            await another.send_str("hello")
            assert await another.receive_str() == "hello"
        model.release.set()
        assert (await waiting).status == 200
        await socket.send_str("still here")
        assert await socket.receive_str() == "still here"


async def test_stopping_says_goodbye_to_both(
    tmp_path: Path, model: FakeModel, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aiohttp.ClientSession() as session:
        async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
            socket = await session.ws_connect(f"{proxy.url}/ws")
            await socket.send_str("hello")
            assert await socket.receive_str() == "hello"
            lines = logged(proxy, monkeypatch)
            goodbye = asyncio.create_task(socket.receive())
        message = await goodbye
        assert [line[:3] for line in lines] == [("GET", "/ws", 101)]
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 1001, "nearhit is stopping")
        await eventually(lambda: far.closed == [1001])


async def test_stopping_does_not_wait_for_those_who_do_not_answer(tmp_path: Path, far: Far, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        reader, writer = await opened(proxy)
    told = await reader.read()
    assert told == b"\x88" + bytes([21]) + struct.pack("!H", 1001) + b"nearhit is stopping"
    await end(writer)
    await eventually(lambda: far.closed == [1001])


async def test_stopping_puts_nothing_into_a_frame(tmp_path: Path) -> None:
    half = b"\x82\x0ahalf a"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(AGREED + half)
        await reader.read()

    async with tcp_server(serve) as url:
        async with running_proxy(settings_for(tmp_path, url)) as proxy:
            reader, writer = await opened(proxy)
            assert await reader.readexactly(len(half)) == half
        # It is closed without a word, politely or not.
        with suppress(ConnectionError):
            assert await reader.read() == b""
        await end(writer)


async def test_the_named_model_decides_where_there_are_several_upstreams(tmp_path: Path, model: FakeModel) -> None:
    near, there = Far(), Far()
    async with fake_model() as other:
        model.extra, other.extra = near.serve, there.serve
        other.models = ["big"]
        own = await asyncio.to_thread(several, tmp_path, model, other, models={"assistant": "big"})
        async with running_proxy(own) as proxy:
            for one in proxy.services.backends:
                await one.tracker.looked.wait()
            async with proxy.session.ws_connect(f"{proxy.url}/ws?model=assistant&x=1") as socket:
                await socket.send_str("hello")
                assert await socket.receive_str() == "hello"
            async with proxy.session.ws_connect(f"{proxy.url}/ws"):
                pass
    assert [request.raw_path for request in there.requests] == ["/ws?model=big&x=1"]
    assert [request.raw_path for request in near.requests] == ["/ws"]


async def test_named_clients_show_their_key_and_the_upstream_hears_nearhits(start: StartProxy, far: Far) -> None:
    clients = [{"name": "ann", "key": "key-of-ann-0001", "max_concurrency": 1}]
    proxy = await start(sharing="clients", clients=clients, upstream__api_key="the-key-of-nearhit")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await proxy.session.ws_connect(f"{proxy.url}/ws", headers={"Authorization": "Bearer somebody-else"})
    assert (refused.value.status, far.requests) == (401, [])
    hers = {"Authorization": "Bearer key-of-ann-0001"}
    async with proxy.session.ws_connect(f"{proxy.url}/ws", headers=hers) as socket:
        await socket.send_str("hello")
        assert await socket.receive_str() == "hello"
        assert (await proxy.chat(headers=hers)).status == 429, "an open WebSocket is one of her requests"
    (request,) = far.requests
    assert request.headers["Authorization"] == "Bearer the-key-of-nearhit"
    assert "key-of-ann" not in repr(request.raw_headers)


@pytest.mark.parametrize(
    "path",
    [
        *(path for dialect in DIALECTS for path in dialect.paths),
        "/v1/models",
        "/v1/cache",
        "/metrics",
        "/-/healthy",
        "/-/stats",
        "/-/entries",
        "/-/none",
    ],
)
async def test_there_is_none_where_nearhit_answers_itself(proxy: Proxy, model: FakeModel, path: str) -> None:
    model.seen.clear()
    reader, writer = await raw(proxy, f"GET {path}?x=1 HTTP/1.1", f"{HANDSHAKE}\r\n".encode())
    status, _, body = await answer_of(reader)
    assert (status, body["error"]["code"]) == (400, "no_websocket")
    assert not [seen for seen in model.seen if "x=1" in seen.target]
    writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
    await end(writer)


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("1.1", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"),
        ("1.1", "Connection: upgrade\r\nUpgrade: foo/2\r\n"),
        ("1.1", "Connection: upgrade\r\nUpgrade: tcp\r\n"),
        ("1.1", "Connection: upgrade\r\nUpgrade: websocket, h2c\r\n"),
        ("1.1", "Connection: upgrade\r\n"),
        ("1.1", "Connection: keep-alive\r\nUpgrade: websocket\r\n"),
        ("1.0", "Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\n"),
    ],
)
async def test_other_switches_are_not_made(proxy: Proxy, model: FakeModel, version: str, fields: str) -> None:
    model.seen.clear()
    reader, writer = await raw(proxy, f"GET /other HTTP/{version}", f"{fields}\r\n".encode())
    assert (await answer_of(reader))[0] == 404, "the upstream's own word"
    (seen,) = [seen for seen in model.seen if seen.target == "/other"]
    assert not {"upgrade", "http2-settings", "connection"} & {name.lower() for name in seen.headers}
    await end(writer)


@pytest.mark.parametrize("protocol", ["h2c", "foo", "websocket", "tcp"])
async def test_a_call_that_offers_another_protocol_is_answered_and_cached(proxy: Proxy, protocol: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 0}'
    fields = f"Connection: Upgrade\r\nUpgrade: {protocol}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    reader, writer = await raw(proxy, "POST /v1/chat/completions HTTP/1.1", fields + body)
    assert (await answer_of(reader))[1]["x-cache"] == "MISS"
    await proxy.settled()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + fields + body)
    assert (await answer_of(reader))[1]["x-cache"] == "HIT"
    await end(writer)


@pytest.mark.parametrize(
    "target", ["example.com:443", "127.0.0.1:80", "/v1/models", "/v1/chat/completions", "/-/stats"]
)
async def test_nearhit_is_no_tunnel_to_elsewhere(proxy: Proxy, model: FakeModel, target: str) -> None:
    model.seen.clear()
    after = b"\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    reader, writer = await raw(proxy, f"CONNECT {target} HTTP/1.1", after)
    status, _, body = await answer_of(reader)
    assert (status, body["error"]["code"]) == (501, "connect_not_supported")
    assert await reader.read() == b"", "nothing behind it is taken for HTTP"
    assert not [seen for seen in model.seen if seen.target == "/smuggled" or seen.method == "CONNECT"]
    await end(writer)


async def test_a_target_without_a_path_is_told_in_the_usual_shape(proxy: Proxy) -> None:
    reader, writer = await raw(proxy, "OPTIONS * HTTP/1.1", b"\r\n")
    status, _, body = await answer_of(reader)
    assert (status, body["error"]["code"]) == (404, "not_found")
    await end(writer)
