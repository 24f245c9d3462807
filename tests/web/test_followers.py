"""Who joins another's request is not worse off for it: nothing garbled, no needless waiting, no needless asking."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from proxy.cache import flight
from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import (
    USAGE,
    FakeModel,
    Respond,
    chat_body,
    chat_events,
    error,
    held,
    numbered,
    raw,
    send,
    sse,
)
from tests.web.test_exact_tier import said
from tests.web.test_flight_attacks import ASKED, SAMPLED, ask, joined

PACKED = {"Content-Encoding": "gzip"}


async def led_and_followed(
    proxy: Proxy, model: FakeModel, leading: dict[str, Any], following: dict[str, Any]
) -> tuple[Answer, Answer]:
    """What two equal calls of these forms get, the second of which joined the first before it was answered."""
    leader = ask(proxy, **leading)
    await eventually(lambda: model.started == 1)
    follower = ask(proxy, **following)
    await eventually(lambda: joined(proxy) == 1)
    model.release.set()
    return await leader, await follower


# Answers that are encoded, although nearhit asks for plain ones


async def packed(model: FakeModel, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    """Answer with gzip whatever was asked."""
    if not asked.get("stream"):
        body, kind = json.dumps(chat_body("Hello there.")).encode(), "application/json"
    else:
        body, kind = sse(*chat_events("Hello", " there.", usage="stream_options" in asked)), "text/event-stream"
    return web.Response(body=gzip.compress(body), headers={"Content-Type": kind, **PACKED})


async def test_who_joins_an_encoded_stream_can_read_it(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(packed)
    leader, follower = await led_and_followed(proxy, model, {"stream": True}, {"stream": True})
    assert follower.outcome == "JOINED"
    assert leader.body == follower.body == sse(*chat_events("Hello", " there."))


async def test_who_joins_an_encoded_refusal_can_read_it(proxy: Proxy, model: FakeModel) -> None:
    refusal = error(400, "context too long", "invalid_request_error").body
    assert isinstance(refusal, bytes)

    async def refuse(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", **PACKED}
        return web.Response(status=400, body=gzip.compress(refusal), headers=headers)

    model.respond = held(refuse)
    for answer in await led_and_followed(proxy, model, {}, {}):
        assert (answer.status, answer.body) == (400, refusal)
    assert model.started == 1


@pytest.mark.parametrize("following", [{}, {"stream": True}])
async def test_who_needs_an_encoded_answer_in_another_form_asks_for_it(
    proxy: Proxy, model: FakeModel, following: dict[str, Any]
) -> None:
    model.respond = held(packed)
    leader, follower = await led_and_followed(proxy, model, ASKED, following)
    assert (follower.status, follower.outcome, model.started) == (200, "BYPASS", 2)
    assert said(leader) == said(follower) == "Hello there."
    assert json.dumps(USAGE).encode() in leader.body
    assert (json.dumps(USAGE).encode() in follower.body) is (following == {})


# Failures


def failing_slowly(rest: asyncio.Event) -> Respond:
    """Fail the first request, whose error is not told in full before `rest`; answer all others."""

    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        if model.started > 1:
            return await numbered()(model, request, asked)
        await model.release.wait()
        response = web.StreamResponse(status=500, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"error": ')
        await rest.wait()
        await response.write(b'{"message": "out of memory"}}')
        return response

    return respond


async def test_who_joined_a_failure_asks_again_without_waiting_for_all_of_the_error(
    start: StartProxy, model: FakeModel
) -> None:
    proxy, rest = await start(cache__join_failures="retry"), asyncio.Event()
    model.respond = failing_slowly(rest)
    leader = ask(proxy)
    await eventually(lambda: model.started == 1)
    follower = ask(proxy)
    await eventually(lambda: joined(proxy) == 1)
    model.release.set()
    try:
        await eventually(follower.done)
    finally:
        rest.set()
        failed, answered = await asyncio.gather(leader, follower)
    assert (failed.status, answered.status, said(answered)) == (500, 200, "answer 2")


async def test_nobody_joins_a_request_that_is_known_to_have_failed(proxy: Proxy, model: FakeModel) -> None:
    rest = asyncio.Event()
    model.respond = failing_slowly(rest)
    model.release.set()
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as leader:
        assert leader.status == 500
        later = ask(proxy)
        try:
            await eventually(later.done)
        finally:
            rest.set()
            answer = await later
    assert (answer.status, answer.outcome, said(answer)) == (200, "MISS", "answer 2")


# Readers who stand still

BEGINNING = [b": " + b"x" * 65_000 + b"\n\n"] * 150
REST = [b": " + b"y" * 65_000 + b"\n\n"] * 50
LIMIT = 11_000_000
"""More than the beginning, which a connection cannot hold if nobody reads it, and less than the whole."""


async def standing_still(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a stream of which only the first bytes are read."""
    body = b'{"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": true}'
    place = urlsplit(proxy.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1024)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    while await reader.readline() != b"\r\n":
        pass
    assert await reader.read(1)
    return reader, writer


async def test_who_stands_still_does_not_hold_up_who_reads_on(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However short: who reads on is never behind the other, so it is never the one who is given up.
    monkeypatch.setattr(flight, "STANDSTILL_S", 0.05)
    proxy = await start(cache__max_answer_bytes=LIMIT)

    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        return await send(request, [*BEGINNING, *REST, sse()], model=model, hold_after=len(BEGINNING))

    model.respond = respond
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": True}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as leader:
        received = len(await leader.content.readexactly(len(b"".join(BEGINNING))))
        reader, writer = await standing_still(proxy)
        assert joined(proxy) == 1
        model.release.set()
        received += len(await leader.read())
    assert received == len(b"".join([*BEGINNING, *REST, sse()]))
    # What it missed is not passed over in silence: its stream breaks off.
    told = await reader.read()
    assert len(told) < received
    assert not told.endswith(b"0\r\n\r\n")
    writer.close()


# Asking once more


async def test_who_asks_at_the_same_time_is_not_taken_for_one_who_tries_again(
    start: StartProxy, model: FakeModel
) -> None:
    proxy = await start(cache__retry_window_s=3600)
    model.respond = held(numbered())
    answers = await led_and_followed(proxy, model, SAMPLED, SAMPLED)
    assert [(said(a), a.outcome) for a in answers] == [("answer 1", "MISS"), ("answer 1", "JOINED")]
    await proxy.settled()
    again = await proxy.chat("x", **SAMPLED)
    assert (said(again), again.outcome) == ("answer 2", "MISS")


async def test_who_joins_a_redirect_can_follow_it(proxy: Proxy, model: FakeModel) -> None:
    location = "https://elsewhere.example/v1/chat/completions"
    model.respond = held(raw(b"", status=308, headers={"Location": location}))
    leader, follower = await led_and_followed(proxy, model, {}, {})
    assert [(one.status, one.headers.get("Location")) for one in (leader, follower)] == [(308, location)] * 2


@pytest.mark.parametrize("name", ["x-should-retry", "retry-after-ms"])
async def test_who_joins_an_error_hears_when_to_try_again(proxy: Proxy, model: FakeModel, name: str) -> None:
    model.respond = held(raw(b"{}", status=529, headers={name: "1"}))
    leader, follower = await led_and_followed(proxy, model, {}, {})
    assert follower.outcome == "JOINED"
    assert (leader.headers[name], follower.headers.get(name)) == ("1", "1")


async def test_who_needs_only_the_end_of_what_is_too_large_cuts_nobody(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "STANDSTILL_S", 0.05)
    proxy = await start(cache__max_answer_bytes=LIMIT)

    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        if not asked.get("stream"):
            return await numbered()(model, request, asked)
        return await send(request, [*BEGINNING, *REST, sse()], model=model, hold_after=len(BEGINNING))

    model.respond = respond
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": True}
    url = f"{proxy.url}/v1/chat/completions"
    async with proxy.session.post(url, json={**body, "stream_options": {"include_usage": True}}) as leader:
        first = await leader.content.readany()
        follower = ask(proxy)
        await eventually(lambda: joined(proxy) == 1)
        model.release.set()
        # It is told at once that there is nothing for it, while the leader reads nothing.
        assert (await follower).status == 200
        rest = await leader.content.read()
        assert len(first) + len(rest) == len(b"".join([*BEGINNING, *REST, sse()]))


async def test_whom_a_failure_failed_ask_once_more_in_all(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__join_failures="retry")
    model.respond = held(raw(b"{}", status=500))
    tasks = [ask(proxy) for _ in range(20)]
    await eventually(lambda: joined(proxy) == 19)
    model.release.set()
    assert {(await task).status for task in tasks} == {500}
    assert model.started == 2
