"""Everything that is not a cacheable endpoint passes untouched in both directions."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel

BINARY = bytes(range(256)) * 40


async def echo(request: web.Request) -> web.StreamResponse | None:
    """Say what arrived, headers as they came."""
    if not request.path.startswith("/echo"):
        return None
    names = [name.decode().lower() for name, _ in request.raw_headers]
    told = {"method": request.method, "target": request.raw_path, "size": len(await request.read()), "names": names}
    status = int(request.query.get("status", "200"))
    return web.json_response(told, status=status, headers={"X-Up": "stream", "Server": "llama.cpp"})


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize(
    "target", ["/echo", "/echo/a%2Fb%20c?x=1&y=%7B%7D&x=2", "/echo//double/../dots", "/echo?empty="]
)
async def test_method_path_query_and_status_pass(proxy: Proxy, model: FakeModel, method: str, target: str) -> None:
    model.extra = echo
    import yarl

    async with proxy.session.request(method, yarl.URL(proxy.url + target, encoded=True), data=b"12345") as response:
        told = json.loads(await response.read())
    assert (told["method"], told["target"], told["size"]) == (method, target, 5)
    assert (response.headers["X-Up"], response.headers["Server"]) == ("stream", "llama.cpp")


@pytest.mark.parametrize("status", [200, 201, 206, 302, 400, 404, 410, 418, 429, 500, 501, 503])
async def test_every_status_passes_with_no_header_of_ours(proxy: Proxy, model: FakeModel, status: int) -> None:
    model.extra = echo
    answer = await proxy.send("GET", f"/echo?status={status}")
    assert answer.status == status
    assert not [name for name in answer.headers if name.lower().startswith(("x-nearhit", "x-cache", "cache-status"))]


async def test_no_header_is_invented_on_the_way_up(proxy: Proxy, model: FakeModel) -> None:
    model.extra = echo
    skip = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
    async with proxy.session.get(f"{proxy.url}/echo", skip_auto_headers=skip) as response:
        assert (await response.json())["names"] == ["host"]


async def test_headers_of_one_connection_do_not_pass(proxy: Proxy, model: FakeModel) -> None:
    model.extra = echo
    headers = {
        "Connection": "X-Secret, keep-alive",
        "X-Secret": "1",
        "TE": "trailers",
        "X-Kept": "1",
        "Keep-Alive": "5",
    }
    names = (await proxy.send("GET", "/echo", headers=headers)).json["names"]
    assert "x-kept" in names
    assert not {"x-secret", "te", "keep-alive"} & set(names)


async def test_repeated_headers_pass_in_order_and_cookies_are_not_kept(proxy: Proxy, model: FakeModel) -> None:
    async def cookies(request: web.Request) -> web.StreamResponse | None:
        response = web.Response(text=request.headers.get("Cookie", "none"))
        response.headers.add("Set-Cookie", "a=1; Path=/")
        response.headers.add("Set-Cookie", "b=2; Path=/")
        return response if request.path == "/cookies" else None

    model.extra = cookies
    first = await proxy.send("GET", "/cookies")
    assert first.headers.getall("Set-Cookie") == ["a=1; Path=/", "b=2; Path=/"]
    async with aiohttp.ClientSession() as other, other.get(f"{proxy.url}/cookies") as response:
        assert await response.text() == "none"


async def test_binary_bodies_pass_with_and_without_a_length(proxy: Proxy, model: FakeModel) -> None:
    async def back(request: web.Request) -> web.StreamResponse | None:
        told = request.headers.get("Content-Length", "chunked")
        return web.Response(body=await request.read(), headers={"X-Length": told}) if request.path == "/b" else None

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(BINARY), 1000):
            yield BINARY[start : start + 1000]

    model.extra = back
    known = await proxy.send("POST", "/b", data=BINARY)
    unknown = await proxy.send("POST", "/b", data=pieces())
    assert (known.body, known.headers["X-Length"]) == (BINARY, str(len(BINARY)))
    assert (unknown.body, unknown.headers["X-Length"]) == (BINARY, "chunked")


async def test_encoded_bodies_pass_as_they_are(proxy: Proxy, model: FakeModel) -> None:
    packed = gzip.compress(b"<html>llama.cpp</html>")

    async def page(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/":
            return None
        # llama.cpp's own page exists in one encoding only.
        if "gzip" not in request.headers.get("Accept-Encoding", ""):
            return web.Response(status=415)
        return web.Response(body=packed, headers={"Content-Encoding": "gzip", "Content-Type": "text/html"})

    model.extra = page
    async with aiohttp.ClientSession(auto_decompress=False) as plain:
        async with plain.get(f"{proxy.url}/", headers={"Accept-Encoding": "gzip"}) as response:
            assert (response.headers["Content-Encoding"], await response.read()) == ("gzip", packed)
        async with plain.get(f"{proxy.url}/", skip_auto_headers=("Accept-Encoding",)) as response:
            assert response.status == 415


async def test_a_head_request_tells_the_length_and_no_body(proxy: Proxy, model: FakeModel) -> None:
    async def sized(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=b"x" * 321, content_type="text/plain") if request.path == "/sized" else None

    model.extra = sized
    answer = await proxy.send("HEAD", "/sized")
    assert (answer.status, answer.headers["Content-Length"], answer.body) == (200, "321", b"")
    # The connection is still in step.
    assert len((await proxy.send("GET", "/sized")).body) == 321


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body_pass(proxy: Proxy, model: FakeModel, status: int) -> None:
    async def bodyless(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=status, headers={"ETag": '"1"'}) if request.path == "/none" else None

    model.extra = bodyless
    for _ in range(2):
        answer = await proxy.send("GET", "/none")
        assert (answer.status, answer.headers["ETag"], answer.body) == (status, '"1"', b"")


async def test_bytes_come_as_they_are_sent(proxy: Proxy, model: FakeModel) -> None:
    async def slow(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/slow":
            return None
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        await response.write(b"first")
        await model.release.wait()
        await response.write(b"last")
        return response

    model.extra = slow
    async with proxy.session.get(f"{proxy.url}/slow") as response:
        assert await response.content.readany() == b"first"
        model.release.set()
        assert await response.read() == b"last"


async def test_an_upload_reaches_the_upstream_while_it_is_sent(proxy: Proxy, model: FakeModel) -> None:
    arrived = asyncio.Event()

    async def upload(request: web.Request) -> web.StreamResponse:
        total = 0
        async for piece in request.content.iter_any():
            total += len(piece)
            arrived.set()
        return web.Response(text=str(total))

    app = web.Application()
    app.router.add_post("/upload", upload)
    del app  # the fake reads whole bodies, so this test listens itself
    from aiohttp.test_utils import TestServer

    upstream_app = web.Application()
    upstream_app.router.add_post("/upload", upload)
    server = TestServer(upstream_app)
    await server.start_server()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 10
        await arrived.wait()
        yield b"y" * 10

    try:
        object.__setattr__(proxy.services.backends.first.upstream, "origin", str(server.make_url("/")).rstrip("/"))
        async with asyncio.timeout(60):
            assert (await proxy.send("POST", "/upload", data=pieces())).body == b"20"
    finally:
        await server.close()


async def test_a_large_download_passes_whole(proxy: Proxy, model: FakeModel) -> None:
    megabyte = os.urandom(1 << 20)

    async def download(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/large":
            return None
        response = web.StreamResponse(headers={"Content-Length": str(50 << 20)})
        await response.prepare(request)
        for _ in range(50):
            await response.write(megabyte)
        return response

    model.extra = download
    size = 0
    async with proxy.session.get(f"{proxy.url}/large") as response:
        async for piece in response.content.iter_any():
            size += len(piece)
    assert (size, response.headers["Content-Length"]) == (50 << 20, str(50 << 20))


async def test_other_methods_on_a_cacheable_path_pass(proxy: Proxy, model: FakeModel) -> None:
    model.extra = None
    answer = await proxy.send("GET", "/v1/chat/completions")
    assert (answer.status, answer.json["error"]["message"]) == (404, "File Not Found")
    assert "X-Cache" not in answer.headers


async def test_a_client_that_leaves_ends_the_upstream_request(proxy: Proxy, model: FakeModel) -> None:
    left = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/endless":
            return None
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        try:
            await asyncio.sleep(3600)
        finally:
            left.set()
        return response

    model.extra = endless
    async with proxy.session.get(f"{proxy.url}/endless") as response:
        await response.content.readany()
    async with asyncio.timeout(60):
        await left.wait()


async def test_an_upstream_with_a_path_in_front_is_reached(start: StartProxy, model: FakeModel) -> None:
    model.extra = echo
    for url in (f"{model.url}/echo", f"{model.url}/echo/", f"{model.url}/echo/v1", f"{model.url}/echo/v1/"):
        proxy = await start(url=url, wait=False, cache__persist="off")
        assert (await proxy.send("GET", "/v1/models?x=1")).json["target"] == "/echo/v1/models?x=1"


async def test_a_redirect_is_passed_and_not_followed(proxy: Proxy, model: FakeModel) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=307, headers={"Location": "/else"}) if request.path == "/r" else None

    model.extra = redirect
    answer = await proxy.send("GET", "/r")
    assert (answer.status, answer.headers["Location"]) == (307, "/else")
    assert not [seen for seen in model.seen if seen.target == "/else"]


async def test_a_reused_connection_that_the_server_closed_is_replaced_silently(proxy: Proxy, model: FakeModel) -> None:
    async def close_after(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/close":
            return None
        response = web.Response(text="ok")
        # Say keep-alive and close all the same, as a restarting server does.
        asyncio.get_running_loop().call_later(0.01, request.transport.close)  # type: ignore[union-attr]
        return response

    model.extra = close_after
    for _ in range(5):
        assert (await proxy.send("POST", "/close", data=b"x" * 10)).status == 200
        await asyncio.sleep(0.02)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    assert (await proxy.post("/v1/chat/completions", json=body)).status == 200
    await eventually(lambda: proxy.services.backends.first.tracker.current.confirmed)


async def test_no_header_is_invented_on_the_way_down(proxy: Proxy, model: FakeModel) -> None:
    async def bare(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/bare":
            return None
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        request.transport.close()
        raise ConnectionResetError

    model.extra = bare
    answer = await proxy.send("GET", "/bare")
    assert (answer.body, dict(answer.headers)) == (b"ok", {"Content-Length": "2"})


async def test_a_line_break_in_a_path_is_the_upstreams_to_judge(proxy: Proxy, model: FakeModel) -> None:
    model.extra = echo
    assert (await proxy.send("GET", "/echo/a%0Ab")).json["target"] == "/echo/a%0Ab"


async def test_the_admin_token_does_not_go_upstream(proxy: Proxy, model: FakeModel) -> None:
    for path in ("/v1/models", "/v1/chat/completions"):
        await proxy.send("POST", path, json={"messages": [{}]}, headers={"X-Nearhit-Admin": "secret"})
    assert not [seen for seen in model.seen if "X-Nearhit-Admin" in seen.headers]


@pytest.mark.parametrize(("served_before", "tries"), [(0, 1), (1, 2)])
async def test_only_a_reused_connection_that_drops_is_tried_again(
    start: StartProxy, served_before: int, tries: int
) -> None:
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while head := await reader.readline():
            fields = await reader.readuntil(b"\r\n\r\n")
            if b"Content-Length: 1\r\n" in fields:
                await reader.readexactly(1)
            if not head.startswith(b"POST /counted"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                break
            requests += 1
            if requests > served_before:
                break
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        # No probe of nearhit's own may take the pooled connection.
        proxy = await start(url=f"http://127.0.0.1:{port}", upstream__poll_s=3600)
        statuses = [(await proxy.send("POST", "/counted", data=b"x")).status for _ in range(served_before + 1)]
    assert statuses == [200] * served_before + [502]
    assert requests == served_before + tries
