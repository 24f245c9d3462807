"""Replays at the pace of a model: evenly, in order, whole, and over at once when somebody leaves or nearhit stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.web.accesslog import Exchange
from proxy.web.listen import listening
from proxy.web.pacing import Schedule, behind, paced, rendered_in_pieces
from proxy.web.stopping import STOPPING, Stopping
from tests.conftest import CLIENT_TIMEOUT, StartProxy, eventually
from tests.fake_model import FakeModel, chat_body, reply

EVENTS = [b"data: %d\n\n" % number for number in range(100)]
BODY = b"".join(EVENTS)
NEVER_S = 1e6

Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Clock:
    """Time that passes while somebody waits, and `late_s` more each time."""

    late_s: float = 0.0
    now: float = 1000.0
    waits: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    async def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.waits.append(seconds)
        self.now += seconds + self.late_s
        await asyncio.sleep(0)
        return False


@asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[tuple[str, web.Application]]:
    """The address of a server that answers like this, as nearhit listens; and its application."""
    app = web.Application()
    app[STOPPING] = Stopping()
    app.router.add_get("/", serve)
    async with listening(app, "127.0.0.1", 0, 5.0) as (host, port):
        yield f"http://{host}:{port}/", app


def exchange() -> Exchange:
    return Exchange("GET", "/", "-")


async def sent_by(clock: Clock, body: bytes, seconds: float) -> tuple[bytes, Exchange]:
    """What a client gets, and what the access log is told."""
    told = exchange()

    async def serve(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream"}
        return await paced(request, told, headers, body, seconds, clock=clock, wait=clock.wait)

    async with (
        served(serve) as (url, _),
        aiohttp.ClientSession(timeout=CLIENT_TIMEOUT) as session,
        session.get(url) as response,
    ):
        assert response.headers["Content-Type"] == "text/event-stream"
        return await response.read(), told


async def test_the_events_come_evenly_and_whole() -> None:
    clock = Clock()
    received, told = await sent_by(clock, BODY, 10.0)
    assert received == BODY
    assert (told.status, told.sent) == (200, len(BODY))
    assert len(clock.waits) == len(EVENTS) - 1, "one before each event but the first"
    assert clock.waits == pytest.approx([0.1] * (len(EVENTS) - 1))


@pytest.mark.parametrize("late_s", [0.03, 0.25, 3.0])
async def test_late_wake_ups_are_made_up_for(late_s: float) -> None:
    clock = Clock(late_s)
    received, _ = await sent_by(clock, BODY, 10.0)
    assert received == BODY
    assert clock.now - 1000.0 <= 10.0 + late_s, "the last event is late by one wake-up, not by all of them"


async def test_a_high_pace_takes_few_writes() -> None:
    clock = Clock()
    received, _ = await sent_by(clock, BODY, 0.05)
    assert received == BODY
    assert len(clock.waits) <= 10


@pytest.mark.parametrize("body", [b"", b"data: 1\n\n"])
async def test_little_is_sent_at_once(body: bytes) -> None:
    clock = Clock()
    assert (await sent_by(clock, body, 10.0))[0] == body
    assert not clock.waits


async def test_no_time_at_all_is_at_once() -> None:
    clock = Clock()
    assert (await sent_by(clock, BODY, 0.0))[0] == BODY
    assert not clock.waits


async def test_what_is_left_goes_at_once_when_nearhit_stops() -> None:
    told = exchange()

    async def serve(request: web.Request) -> web.StreamResponse:
        return await paced(request, told, {}, BODY, NEVER_S)

    async with served(serve) as (url, app), aiohttp.ClientSession(timeout=CLIENT_TIMEOUT) as session:
        response = await session.get(url)
        assert await response.content.readexactly(len(EVENTS[0])) == EVENTS[0]
        assert told.sent == len(EVENTS[0])
        await app[STOPPING].tell()
        assert await response.read() == b"".join(EVENTS[1:])


async def test_a_client_that_leaves_ends_it() -> None:
    told, ended = exchange(), asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        try:
            return await paced(request, told, {}, BODY, NEVER_S)
        finally:
            ended.set()

    async with served(serve) as (url, _), aiohttp.ClientSession(timeout=CLIENT_TIMEOUT) as session:
        response = await session.get(url)
        await response.content.readexactly(len(EVENTS[0]))
        response.close()
        await eventually(ended.is_set)
    assert told.sent == len(EVENTS[0])


@pytest.mark.parametrize("include_usage", [False, True])
async def test_an_answer_in_pieces(include_usage: bool) -> None:
    body = chat_body("One two, three.", message={"reasoning_content": "Four five"})
    made = await rendered_in_pieces(CHAT, json.dumps(body).encode(), include_usage=include_usage)
    assert made.tokens == len(["Four", " five", "One", " two", ",", " three", "."])
    stream = made.wire.render("chatcmpl-new", 7)
    # The role, the end, usage where asked for, and [DONE].
    assert stream.count(b"\n\n") == made.tokens + 3 + include_usage
    assert stream.endswith(b"data: [DONE]\n\n")
    assert stream.count(b'"id":"chatcmpl-new"') == stream.count(b'"created":7') == made.tokens + 2 + include_usage


async def test_a_raw_completion_in_pieces() -> None:
    body = {"choices": [{"index": 0, "text": "One two", "finish_reason": "stop"}]}
    made = await rendered_in_pieces(COMPLETIONS, json.dumps(body).encode(), include_usage=False)
    assert made.tokens == 2


@given(st.integers(1, 5000), st.floats(1e-6, 1e6), st.floats(0, 2))
def test_no_more_is_due_than_there_is_and_all_in_the_end(events: int, seconds: float, part: float) -> None:
    schedule = Schedule(events, seconds)
    due = schedule.due(part * seconds)
    assert 1 <= due <= events
    assert due == events or part < 1
    assert schedule.due(seconds) == events
    if due < events:
        # What is due within a millisecond counts as due.
        assert 0 < schedule.wait_s(due, part * seconds) <= max(0.005, (seconds / events + 0.001) * 1.001)


@given(st.lists(st.integers(0, 8)))
def test_events_are_cut_between_events(steps: list[int]) -> None:
    at = 0
    for step in steps:
        start, at = at, behind(BODY, at, step)
        assert BODY[start:at].count(b"\n\n") == step or at == len(BODY)
        assert at == start or BODY[:at].endswith(b"\n\n")


async def test_a_streamed_hit_comes_in_pieces_and_a_whole_one_at_once(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__replay_tokens_per_second=100_000)
    model.respond = reply("one two three four")
    first = await proxy.chat("x")
    await proxy.settled()
    hit, streamed = await proxy.chat("x"), await proxy.chat("x", stream=True)
    assert (hit.outcome, streamed.outcome) == ("HIT", "HIT")
    assert hit.json["choices"] == first.json["choices"]
    texts = [
        choice["delta"]["content"]
        for event in streamed.body.decode().split("\n\n")
        if event.startswith("data: {")
        for choice in json.loads(event.removeprefix("data: "))["choices"]
        if choice["delta"].get("content")
    ]
    assert texts == ["one", " two", " three", " four"]
    assert streamed.body.endswith(b"data: [DONE]\n\n")
