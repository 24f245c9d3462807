"""One-at-a-time servers and clients that dawdle: nobody else waits for them."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from proxy.upstream.client import _watch
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, Json

LARGE = b"x" * 2_000_000


@pytest.fixture
async def queued(start: StartProxy, model: FakeModel) -> Proxy:
    async def passed_on(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=LARGE) if request.path in ("/api/chat", "/v1/audio/speech") else None

    model.extra = passed_on
    return await start(upstream__max_concurrency="1", upstream__queue_timeout_s="30")


async def raw(proxy: Proxy, head: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which this was sent, and of whose answer little is read."""
    place = urlsplit(proxy.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1024)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.write(f"{head}\r\nHost: {place.netloc}\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_a_client_that_sends_half_a_body_holds_no_place(queued: Proxy, model: FakeModel) -> None:
    body = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    _, writer = await raw(queued, "POST /api/chat HTTP/1.1", body)
    assert (await queued.chat()).status == 200
    assert "/api/chat" not in [seen.target for seen in model.seen]
    writer.close()


async def test_a_body_that_is_broken_is_told_and_not_passed_on(queued: Proxy, model: FakeModel) -> None:
    reader, writer = await raw(
        queued, "POST /api/chat HTTP/1.1", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n"
    )
    assert b" 400 " in await reader.readline()
    assert "/api/chat" not in [seen.target for seen in model.seen]
    writer.close()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/audio/speech"])
async def test_a_client_that_does_not_read_holds_no_place(queued: Proxy, model: FakeModel, path: str) -> None:
    _, writer = await raw(queued, f"POST {path} HTTP/1.1", b"Content-Length: 2\r\n\r\n{}")
    await eventually(lambda: path in [seen.target for seen in model.seen])
    assert (await queued.chat()).status == 200
    writer.close()


async def test_nor_does_one_whose_call_passes_the_cache_by(queued: Proxy, model: FakeModel) -> None:
    async def long(_model: FakeModel, _request: web.Request, _asked: Json) -> web.StreamResponse:
        return web.Response(body=LARGE)

    model.respond = long
    body = b'{"messages": []}'
    head = f"Cache-Control: no-store\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    _, writer = await raw(queued, "POST /v1/chat/completions HTTP/1.1", head + body)
    await eventually(lambda: model.finished == 1 or model.started == 1)
    model.respond = None
    assert (await queued.chat()).status == 200
    writer.close()


def test_a_server_that_lost_its_power_is_noticed() -> None:
    with socket.socket() as connection:
        _watch(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert 0 < connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": [{"type": "text", "text": 5}]}, {"role": "user", "content": "hi"}],
        [{"role": ["system"], "content": "x"}, {"role": "user", "content": "hi"}],
        [{"role": "system", "content": {"a": 1}}, {"role": "user", "content": "hi"}],
        [{"role": "system"}, {"role": "user", "content": "hi"}],
    ],
)
async def test_system_prompts_of_odd_shapes_are_answered_as_before(proxy: Proxy, messages: list[Json]) -> None:
    assert (await proxy.post("/v1/chat/completions", json={"messages": messages})).status == 200


@pytest.mark.parametrize("depth", [900, 985, 995, 2000])
async def test_tools_that_are_nested_deeply_are_passed_on_as_before(proxy: Proxy, model: FakeModel, depth: int) -> None:
    tools = b"[" * depth + b"]" * depth
    body = b'{"messages": [{"role": "system", "content": "s"}], "tools": ' + tools + b"}"
    answer = await proxy.post("/v1/chat/completions", data=body, headers={"Content-Type": "application/json"})
    assert answer.status in (200, 400), "the fake model reads it, or refuses to"
    assert body in [seen.body for seen in model.seen]
