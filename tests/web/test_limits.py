"""What a named client may ask at a time and in a minute: the rules, then over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from proxy.web.limits import Allowance, Limit, Limited
from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, chat_events, held, reply, sse, streamed

KEY = {"Authorization": "Bearer the-key-of-ann"}
OTHER = {"Authorization": "Bearer the-key-of-bob"}


async def limited(start: StartProxy, **limits: int) -> Proxy:
    """One client with these limits, and one without."""
    named = [{"name": "ann", "key": "the-key-of-ann", **limits}, {"name": "bob", "key": "the-key-of-bob"}]
    return await start(sharing="clients", clients=named)


async def ask(proxy: Proxy, content: str = "x", headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    return await proxy.chat(content, headers=headers or KEY, **fields)


# The rules


def test_a_minutes_requests_may_come_at_once_and_no_more() -> None:
    allowance = Allowance(3, 0)
    assert [allowance.enter(100.0) for _ in range(3)] == [None] * 3
    assert allowance.enter(100.0) == Limited(Limit.RATE, 20)
    assert allowance.enter(119.9) == Limited(Limit.RATE, 1)
    assert allowance.enter(120.0) is None
    assert allowance.enter(120.0) == Limited(Limit.RATE, 20)


def test_a_quiet_hour_is_no_credit_for_more_than_a_minute() -> None:
    allowance = Allowance(2, 0)
    assert allowance.enter(0.0) is None
    assert [allowance.enter(3600.0) for _ in range(3)] == [None, None, Limited(Limit.RATE, 30)]


def test_so_many_requests_at_a_time() -> None:
    allowance = Allowance(0, 2)
    assert [allowance.enter(0.0) for _ in range(3)] == [None, None, Limited(Limit.CONCURRENCY, 1)]
    allowance.leave()
    assert allowance.in_flight == 1
    assert allowance.enter(0.0) is None


def test_what_is_refused_costs_nothing() -> None:
    allowance = Allowance(2, 1)
    assert allowance.enter(0.0) is None
    assert {allowance.enter(0.0) for _ in range(10)} == {Limited(Limit.CONCURRENCY, 1)}
    allowance.leave()
    assert allowance.enter(0.0) is None


def test_without_limits_everything_enters() -> None:
    allowance = Allowance(0, 0)
    assert {allowance.enter(0.0) for _ in range(1000)} == {None}
    assert allowance.in_flight == 1000


@given(
    per_minute=st.integers(1, 10_000),
    gaps=st.lists(st.floats(0, 90, allow_nan=False), max_size=60),
    begun=st.floats(0, 1e9),
)
def test_the_rate_is_kept_and_whoever_comes_again_when_told_is_let_in(
    per_minute: int, gaps: list[float], begun: float
) -> None:
    allowance, now, entered = Allowance(per_minute, 0), begun, 0
    for gap in gaps:
        now += gap
        told = allowance.enter(now)
        if told is not None:
            assert told.retry_after_s >= 1
            now += told.retry_after_s
            assert allowance.enter(now) is None
        entered += 1
    assert entered <= per_minute + (now - begun) * per_minute / 60 + 1e-3


# Over HTTP


async def test_too_many_in_a_minute_get_429_in_the_openai_shape(start: StartProxy, model: FakeModel) -> None:
    proxy = await limited(start, requests_per_minute=2)
    assert [(await ask(proxy)).status for _ in range(2)] == [200, 200]
    refused = await ask(proxy, "another")
    assert refused.status == 429
    assert refused.json["error"]["code"] == "rate_limit_exceeded"
    assert refused.json["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert len(model.generations) == 1


async def test_another_client_is_not_held_back(start: StartProxy) -> None:
    proxy = await limited(start, requests_per_minute=1)
    assert (await ask(proxy)).status == 200
    assert (await ask(proxy)).status == 429
    assert (await ask(proxy, headers=OTHER)).status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/v1/cache", "/nothing"])
async def test_requests_that_only_pass_count_like_calls(start: StartProxy, path: str) -> None:
    proxy = await limited(start, requests_per_minute=1)
    assert (await proxy.send("GET", path, headers=KEY)).status != 429
    assert (await proxy.send("GET", path, headers=KEY)).status == 429


async def test_hits_and_refused_bodies_count(start: StartProxy) -> None:
    proxy = await limited(start, requests_per_minute=3)
    await ask(proxy)
    await proxy.settled()
    assert (await ask(proxy)).outcome == "HIT"
    assert (await proxy.post("/v1/chat/completions", data=b"{", headers=KEY)).status == 400
    assert (await ask(proxy)).status == 429


async def test_explaining_with_an_own_key_counts(start: StartProxy) -> None:
    proxy = await limited(start, requests_per_minute=1)
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert (await proxy.post("/-/explain", json=body, headers=KEY)).status == 200
    assert (await proxy.post("/-/explain", json=body, headers=KEY)).status == 429


async def test_a_wrong_key_takes_nothing_from_anybody(start: StartProxy) -> None:
    proxy = await limited(start, requests_per_minute=1)
    for key in ("the-key-of-an", "the-key-of-annn", "THE-KEY-OF-ANN"):
        assert (await ask(proxy, headers={"Authorization": f"Bearer {key}"})).status == 401
    assert (await ask(proxy)).status == 200


async def test_a_stream_holds_its_place_until_it_ends(start: StartProxy, model: FakeModel) -> None:
    proxy = await limited(start, max_concurrency=1)
    events = [sse(event, done=False) for event in chat_events("a", "b")]
    model.respond = streamed(*events, sse(), hold_after=2)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
    url = f"{proxy.url}/v1/chat/completions"
    async with proxy.session.post(url, json=body, headers=KEY) as response:
        assert response.status == 200
        refused = await ask(proxy, "another")
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        model.release.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
    await eventually(lambda: in_flight(proxy) == 0)
    model.respond = reply()
    assert (await ask(proxy, "another")).status == 200


async def test_a_client_that_leaves_frees_its_place(start: StartProxy, model: FakeModel) -> None:
    proxy = await limited(start, max_concurrency=1)
    model.respond = held(reply())
    leaving = asyncio.create_task(ask(proxy))
    await eventually(lambda: model.started == 1)
    assert (await ask(proxy, "another")).status == 429
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await eventually(lambda: in_flight(proxy) == 0)
    model.release.set()
    assert (await ask(proxy, "another")).status == 200


async def test_an_upstream_that_fails_frees_the_place(start: StartProxy, model: FakeModel) -> None:
    proxy = await limited(start, max_concurrency=1)
    model.respond = hangs_up
    assert [(await ask(proxy, str(number))).status for number in range(3)] == [502] * 3
    await eventually(lambda: in_flight(proxy) == 0)


async def hangs_up(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def test_a_limited_request_is_refused_before_its_body_comes(start: StartProxy) -> None:
    proxy = await limited(start, requests_per_minute=1)
    await ask(proxy)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer the-key-of-ann\r\n"
    assert (await answer_to_a_head(proxy, f"{head}Content-Length: 9\r\n\r\n".encode())).startswith(b"HTTP/1.1 429 ")


async def answer_to_a_head(proxy: Proxy, head: bytes) -> bytes:
    """The beginning of what comes back although no body follows."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    try:
        writer.write(head)
        async with asyncio.timeout(60):
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()


async def test_what_was_let_in_and_what_was_not_is_counted_by_client(start: StartProxy) -> None:
    proxy = await limited(start, requests_per_minute=3)
    metrics = proxy.services.metrics
    assert metrics.value("nearhit_client_limited_total", {"client": "bob", "limit": "max_concurrency"}) == 0
    await ask(proxy)
    await proxy.settled()
    await ask(proxy)
    await proxy.send("GET", "/v1/models", headers=KEY)
    await ask(proxy)
    await ask(proxy, headers={"Authorization": "Bearer nobody-at-all"})
    counted = [
        metrics.value("nearhit_client_requests_total", {"client": "ann", "outcome": outcome})
        for outcome in ("MISS", "HIT", "PASS")
    ]
    assert counted == [1, 1, 1]
    assert metrics.value("nearhit_client_limited_total", {"client": "ann", "limit": "requests_per_minute"}) == 1
    assert metrics.value("nearhit_unknown_keys_total") == 1
    shown = (await proxy.send("GET", "/metrics")).body
    assert b'nearhit_client_requests_total{client="bob",outcome="HIT"} 0.0' in shown


def in_flight(proxy: Proxy) -> int:
    assert proxy.services.clients is not None
    ann = next(one for one in proxy.services.clients if one.name == "ann")
    return proxy.services.clients.in_flight(ann)
