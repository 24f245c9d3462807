"""Whatever arrives gets a clear answer: the upstream's where it is the upstream's to judge, else ours. Never a 500."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import Proxy, StartProxy
from tests.fake_model import FakeModel

CHAT = "/v1/chat/completions"
MALFORMED: dict[str, bytes] = {
    "no JSON": b"hello",
    "nothing": b"",
    "cut": b'{"messages": [{"role": "user"',
    "duplicate keys": b'{"messages": [{"role":"user","content":"a"}], "messages": []}',
    "NaN": b'{"messages": [{"role":"user","content":"a"}], "temperature": NaN}',
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "wrong types": b'{"messages": {"role": 7}, "stream": "maybe", "temperature": []}',
    "a list": b"[1, 2]",
    "a huge number": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 6000 + b"}",
    "1e999": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "NUL": b'{"messages": [{"role": "user", "content": "\\u0000"}], "model": "\\u0000\\n"}',
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_the_upstream_gets_the_very_bytes_and_its_answer_comes_back(
    proxy: Proxy, model: FakeModel, case: str
) -> None:
    body = MALFORMED[case]
    for _ in range(2):
        direct = await proxy.session.post(model.url + CHAT, data=body)
        before = len(model.seen)
        through = await proxy.post(CHAT, data=body)
        assert through.status == direct.status != 500
        if through.outcome != "HIT":
            assert through.body == await direct.read()
            # nearhit looks at the server meanwhile.
            assert body in [seen.body for seen in model.seen[before:] if seen.method == "POST"]
        await proxy.settled()


async def test_a_body_above_the_limit_is_refused(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(limits__max_request_bytes=4096)

    async def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    for data in (b"x" * 100_000, pieces()):
        answer = await proxy.post(CHAT, data=data)
        assert (answer.status, answer.json["error"]["code"]) == (413, "request_too_large")
    assert model.generations == []
    assert (await proxy.chat("still fine")).status == 200


async def test_a_hundred_megabytes_are_refused_before_they_are_read(proxy: Proxy, model: FakeModel) -> None:
    reader, writer = await connect(proxy)
    writer.write(head("POST", CHAT, "Content-Length: 104857600"))
    answer = await reader.readuntil(b"\r\n\r\n")
    assert b" 413 " in answer.partition(b"\r\n")[0]
    writer.close()


async def test_a_chunked_body_without_a_length_is_read(proxy: Proxy) -> None:
    async def pieces() -> Any:
        yield b'{"messages": [{"role": "user", '
        yield b'"content": "x"}], "temperature": 0}'

    assert (await proxy.post(CHAT, data=pieces())).outcome == "MISS"
    await proxy.settled()
    assert (await proxy.post(CHAT, data=pieces())).outcome == "HIT"


@pytest.mark.parametrize("encoding", ["gzip", "br", "nonsense"])
async def test_encoded_bodies_go_upstream_as_they_are(proxy: Proxy, model: FakeModel, encoding: str) -> None:
    answer = await proxy.post(CHAT, data=b"\x1f\x8bwhatever", headers={"Content-Encoding": encoding})
    assert answer.headers["Cache-Status"] == "nearhit; fwd=bypass; detail=content-encoding"
    (seen,) = [seen for seen in model.seen if seen.body == b"\x1f\x8bwhatever"]
    assert seen.headers["Content-Encoding"] == encoding


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=[
        "TLS",
        "no version",
        "version",
        "header",
        "long header",
        "long line",
        "header bomb",
        "length",
        "both",
        "chunk",
    ],
)
async def test_malformed_http_is_refused_in_the_openai_shape(proxy: Proxy, request_bytes: bytes) -> None:
    reader, writer = await connect(proxy)
    writer.write(request_bytes)
    async with asyncio.timeout(60):
        answer = await reader.read()
    first, _, _ = answer.partition(b"\r\n")
    assert b" 400 " in first or b" 431 " in first or b" 414 " in first, answer[:200]
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "code"}
    writer.close()
    assert (await proxy.chat("still fine")).status == 200


async def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    bodies = [
        json.dumps({"messages": [{"role": "user", "content": str(i)}], "temperature": 0}).encode() for i in (1, 2, 1)
    ]
    requests = [head("POST", CHAT, f"Content-Length: {len(body)}") + body for body in bodies]
    writer.write(b"".join([*requests, head("GET", "/-/healthy", "Connection: close")]))
    async with asyncio.timeout(60):
        answer = await reader.read()
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.rstrip().endswith(b"}")
    writer.close()


async def test_a_client_too_slow_with_its_body_is_told_so(start: StartProxy) -> None:
    proxy = await start(limits__request_timeout_s=0.05)
    reader, writer = await connect(proxy)
    writer.write(head("POST", CHAT, "Content-Length: 100") + b"{")
    async with asyncio.timeout(60):
        answer = await reader.readuntil(b"}}")
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert b"request_timeout" in answer
    writer.close()


async def test_a_client_that_hangs_up_in_its_body_disturbs_nobody(proxy: Proxy) -> None:
    for _ in range(20):
        _, writer = await connect(proxy)
        writer.write(head("POST", CHAT, "Content-Length: 100") + b"{")
        await writer.drain()
        writer.transport.abort()
    assert (await proxy.chat("x")).status == 200


async def test_a_target_in_absolute_form_is_understood(proxy: Proxy, model: FakeModel) -> None:
    reader, writer = await connect(proxy)
    writer.write(b"GET http://anything/v1/models?x=1 HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
    assert b" 200 " in (await reader.read()).partition(b"\r\n")[0]
    assert "/v1/models?x=1" in [seen.target for seen in model.seen]
    writer.close()


def head(method: str, target: str, *fields: str) -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *fields, "", ""]).encode()


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(proxy.url)
    return await asyncio.open_connection(address.hostname, address.port)
