"""Servers that work on one call at a time: whose turn it is, who waits, who is sent away, and what nobody waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import PROBE, FakeModel, chat_body, chat_events, error, fake_model, held, raw, sse
from tests.web.test_upstreams import settings as two_upstreams

NO_STORE = {"Cache-Control": "no-store"}
CHAT = "/v1/chat/completions"
OCCUPYING = (CHAT, "/v1/completions", "/v1/embeddings", "/v1/rerank", "/api/chat", "/infill", "/v1/some/new/path")
LIGHT = ("/tokenize", "/detokenize", "/apply-template", "/slots/0?action=save", "/props")


@dataclass
class Desk:
    """A server that counts who is served: `order` by name, `most` at once. Nobody leaves before `go`."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    served: int = 0
    most: int = 0
    order: list[str] = field(default_factory=list)
    left: int = 0
    status: int = 200

    async def handle(self, request: web.Request) -> web.StreamResponse | None:
        is_probe = request.headers.get("Authorization", "").startswith(PROBE) or await request.read() == b"{}"
        if request.method != "POST" or is_probe:
            return None
        if request.raw_path in LIGHT:
            return web.json_response({"light": True})
        asked = await request.json()
        self.order.append(name_of(asked))
        self.served += 1
        self.most = max(self.most, self.served)
        try:
            return await self._answer(request, asked)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.served -= 1

    async def _answer(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        if not asked.get("stream"):
            await self.go.wait()
            return web.json_response(chat_body("fine"), status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        begin, *rest = chat_events("fine", usage=True)
        await response.write(sse(begin, done=False))
        await self.go.wait()
        await response.write(sse(*rest))
        return response


def name_of(asked: dict[str, Any]) -> str:
    """What tells the tests' calls apart."""
    messages = asked.get("messages")
    return str(messages[-1]["content"] if messages else asked.get("prompt"))


@pytest.fixture
def desk(model: FakeModel) -> Desk:
    desk = Desk()
    model.extra = desk.handle
    return desk


Begin = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def begin(start: StartProxy, desk: Desk) -> AsyncIterator[Begin]:
    async def with_queue(**options: Any) -> Proxy:
        chosen = {"upstream__max_concurrency": 1, "cache__mode": "exact", "sharing": "shared", **options}
        return await start(**chosen)

    yield with_queue
    desk.go.set()


@pytest.fixture
async def narrow(begin: Begin) -> Proxy:
    """nearhit in front of a server that works on one call at a time."""
    return await begin()


def call(proxy: Proxy, name: str, path: str = CHAT, **kwargs: Any) -> asyncio.Task[Answer]:
    """A call under way."""
    fields = kwargs.pop("fields", {})
    body = {"messages": [{"role": "user", "content": name}], "prompt": name, "temperature": 0, **fields}
    return asyncio.create_task(proxy.post(path, json=body, **kwargs))


async def waiting(proxy: Proxy, count: int) -> None:
    """Until so many calls wait for their turn."""
    await eventually(lambda: proxy.services.backends.first.lane.waiting == count)


async def occupied(proxy: Proxy, desk: Desk, **kwargs: Any) -> asyncio.Task[Answer]:
    """A call that the server works on until `go`."""
    first = call(proxy, "first", **kwargs)
    await eventually(lambda: desk.served == 1)
    return first


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def sent_away(answer: Answer) -> None:
    """The answer says in OpenAI's shape that there was no room, and when there may be."""
    assert answer.status == 503
    assert answer.json["error"].keys() == {"message", "type", "code"}
    assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("unavailable_error", "upstream_busy")
    assert int(answer.headers["Retry-After"]) >= 1


# One at a time


async def test_whatever_makes_the_model_work_waits_for_its_turn(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk)
    calls = [
        call(narrow, f"{path} {headers}", path, headers=headers) for path in OCCUPYING for headers in ({}, NO_STORE)
    ]
    await waiting(narrow, len(calls))
    assert desk.order == ["first"]
    desk.go.set()
    answers = await asyncio.gather(first, *calls)
    assert {answer.status for answer in answers} == {200}
    assert (desk.most, len(desk.order)) == (1, len(calls) + 1)
    await narrow.settled()


async def test_what_makes_no_model_work_does_not_wait(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk)
    light = [await narrow.post(path, json={"content": "x"}) for path in LIGHT]
    assert [answer.json for answer in light] == [{"light": True}] * len(LIGHT)
    for path in ("/v1/models", "/health", "/-/stats", "/metrics"):
        assert (await narrow.send("GET", path)).status in (200, 404)
    assert not first.done()
    desk.go.set()
    assert (await first).status == 200


async def test_a_stream_keeps_its_place_until_its_end(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk, fields={"stream": True})
    second = call(narrow, "second", fields={"stream": True})
    await waiting(narrow, 1)
    desk.go.set()
    assert [(await one).status for one in (first, second)] == [200, 200]
    assert desk.most == 1
    await narrow.settled()


@pytest.mark.parametrize(("limit", "most"), [(2, 2), (0, 3)])
async def test_as_many_as_the_operator_says(begin: Begin, desk: Desk, limit: int, most: int) -> None:
    proxy = await begin(upstream__max_concurrency=limit)
    calls = [call(proxy, name) for name in ("a", "b", "c")]
    await eventually(lambda: desk.served == most)
    await waiting(proxy, 3 - most)
    desk.go.set()
    await asyncio.gather(*calls)
    assert desk.most == most


async def test_an_error_gives_the_place_back(narrow: Proxy, desk: Desk) -> None:
    desk.go.set()
    for path in (CHAT, "/v1/rerank"):
        for desk.status in (500, 503):
            assert (await narrow.post(path, json={"messages": [], "prompt": "x"})).status == desk.status
    desk.status = 200
    assert (await narrow.chat("hi")).status == 200


async def test_a_server_that_is_gone_leaves_no_queue(begin: Begin) -> None:
    proxy = await begin(url="http://127.0.0.1:9", wait=False)
    answers = await asyncio.gather(*(call(proxy, str(n)) for n in range(3)), call(proxy, "x", "/v1/rerank"))
    assert [answer.status for answer in answers] == [502] * 4
    lane = proxy.services.backends.first.lane
    assert (lane.working, lane.waiting) == (0, 0)


# Whose turn it is


async def test_a_named_client_is_one_client_whatever_it_sends(begin: Begin, desk: Desk) -> None:
    clients = [{"name": name, "key": f"the-key-of-{name}"} for name in ("greedy", "modest")]
    proxy = await begin(sharing="clients", clients=clients)
    greedy, modest = key("the-key-of-greedy"), key("the-key-of-modest")
    calls = [await occupied(proxy, desk, headers=greedy)]
    for number in range(6):
        path = CHAT if number % 2 else "/v1/rerank"
        calls.append(call(proxy, f"{number}", path, headers={**greedy, "Cookie": f"session={number}"}))
        await waiting(proxy, number + 1)
    calls.append(call(proxy, "modest", headers=modest))
    await waiting(proxy, 7)
    desk.go.set()
    await asyncio.gather(*calls)
    # After the one that came first, which had no turn before.
    assert desk.order[:3] == ["first", "0", "modest"]
    await proxy.settled()


async def test_clients_take_turns(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk, headers=key("greedy"))
    calls = []
    for number, (name, who, path) in enumerate(
        [
            ("a1", "greedy", CHAT),
            ("a2", "greedy", "/v1/rerank"),
            ("a3", "greedy", CHAT),
            ("b1", "modest", "/v1/rerank"),
            ("b2", "modest", CHAT),
            ("c1", "third", CHAT),
        ],
        1,
    ):
        calls.append(call(narrow, name, path, headers=key(who)))
        await waiting(narrow, number)
    desk.go.set()
    await asyncio.gather(first, *calls)
    assert desk.order == ["first", "a1", "b1", "c1", "a2", "b2", "a3"]
    await narrow.settled()


async def test_clients_without_a_key_are_told_apart_by_their_address(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk)
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        other = Proxy(narrow.url, narrow.app, session)
        calls = []
        for number, (proxy, name) in enumerate([(narrow, "a1"), (narrow, "a2"), (other, "b1")], 1):
            calls.append(call(proxy, name))
            await waiting(narrow, number)
        desk.go.set()
        await asyncio.gather(first, *calls)
    assert desk.order == ["first", "a1", "b1", "a2"]
    await narrow.settled()


# Who is sent away


async def test_no_more_wait_than_may(begin: Begin, desk: Desk) -> None:
    proxy = await begin(upstream__max_waiting=1)
    first = await occupied(proxy, desk)
    second = call(proxy, "second")
    await waiting(proxy, 1)
    for path in (CHAT, "/v1/completions", "/v1/rerank"):
        for headers, stream in (({}, False), ({}, True), (NO_STORE, False), (NO_STORE, True)):
            sent_away(await call(proxy, "third", path, headers=headers, fields={"stream": stream}))
    desk.go.set()
    assert [(await one).status for one in (first, second)] == [200, 200]
    assert desk.order == ["first", "second"]
    assert (await proxy.chat("third")).status == 200
    await proxy.settled()


async def test_a_full_queue_has_room_for_whoever_has_least_in_it(begin: Begin, desk: Desk) -> None:
    proxy = await begin(upstream__max_waiting=2)
    first = await occupied(proxy, desk, headers=key("greedy"))
    older = call(proxy, "older", headers=key("greedy"))
    await waiting(proxy, 1)
    newer = call(proxy, "newer", headers=key("greedy"))
    await waiting(proxy, 2)
    modest = call(proxy, "modest", headers=key("modest"))
    sent_away(await newer)
    desk.go.set()
    assert [(await one).status for one in (first, older, modest)] == [200, 200, 200]
    await proxy.settled()


async def test_nobody_waits_longer_than_may(begin: Begin, desk: Desk) -> None:
    proxy = await begin(upstream__queue_timeout_s=0.05)
    first = await occupied(proxy, desk)
    # The second of these joins the first.
    for path in (CHAT, CHAT, "/v1/rerank"):
        for answer in await asyncio.gather(call(proxy, "second", path), call(proxy, "second", path)):
            sent_away(answer)
    assert not first.done()
    desk.go.set()
    assert (await first).status == 200
    assert desk.order == ["first"]
    await eventually(lambda: proxy.services.backends.first.lane.working == 0)
    assert (await proxy.chat("second")).status == 200
    await proxy.settled()


@pytest.mark.parametrize("on_disconnect", ["cancel", "drain"])
async def test_whoever_leaves_the_queue_is_not_sent(begin: Begin, desk: Desk, on_disconnect: str) -> None:
    proxy = await begin(upstream__on_disconnect=on_disconnect)
    first = await occupied(proxy, desk)
    leave = [call(proxy, "a"), call(proxy, "b", headers=NO_STORE), call(proxy, "c", "/v1/rerank")]
    stays = call(proxy, "stays")
    await waiting(proxy, 4)
    for number, leaves in enumerate(leave):
        leaves.cancel()
        await waiting(proxy, 3 - number)
    desk.go.set()
    assert [(await one).status for one in (first, stays)] == [200, 200]
    await proxy.settled()
    assert (desk.order, desk.left) == (["first", "stays"], 0)


async def test_a_call_in_the_queue_stays_for_those_who_joined_it(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk)
    leaves = call(narrow, "same")
    await waiting(narrow, 1)
    stays = [call(narrow, "same"), call(narrow, "same", fields={"stream": True})]
    await eventually(lambda: narrow.services.metrics.value("nearhit_joined_total") == 2)
    assert narrow.services.backends.first.lane.waiting == 1
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    desk.go.set()
    assert [(await one).outcome for one in (first, *stays)] == ["MISS", "JOINED", "JOINED"]
    await narrow.settled()
    assert desk.order == ["first", "same"]
    assert (await narrow.chat("same", prompt="same")).outcome == "HIT"


async def test_what_is_known_is_answered_at_once(begin: Begin, desk: Desk) -> None:
    proxy = await begin(upstream__max_waiting=0)
    desk.go.set()
    await proxy.chat("known")
    await proxy.settled()
    desk.go.clear()
    first = await occupied(proxy, desk)
    assert (await proxy.chat("known")).outcome == "HIT"
    assert (await proxy.chat("known", stream=True)).outcome == "HIT"
    sent_away(await proxy.chat("unknown"))
    assert not first.done()
    desk.go.set()
    await first
    await proxy.settled()


@pytest.mark.parametrize("headers", [{}, NO_STORE])
async def test_a_busy_server_is_not_asked_again_for_nobody(
    start: StartProxy, model: FakeModel, headers: dict[str, str]
) -> None:
    proxy = await start(upstream__on_disconnect="drain", cache__mode="exact", upstream__busy_retry_s=2)
    body = error(503, "busy", "server_busy").body
    assert isinstance(body, bytes)
    model.respond = held(raw(body, status=503))
    leaves = call(proxy, "left", headers=headers)
    await eventually(lambda: model.started == 1)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    # Whoever comes later is served later than the news that this one left.
    for _ in range(2):
        await proxy.send("GET", "/-/healthy")
    model.release.set()
    await proxy.settled()
    assert len(model.generations) == 1


# What is told


async def metrics_of(proxy: Proxy) -> str:
    return (await proxy.send("GET", "/metrics")).body.decode()


async def test_the_queue_is_counted_and_timed(narrow: Proxy, desk: Desk) -> None:
    before = narrow.services.metrics.value("nearhit_queue_seconds_count")
    first = await occupied(narrow, desk)
    calls = [call(narrow, "second"), call(narrow, "third", "/v1/rerank")]
    await waiting(narrow, 2)
    assert 'nearhit_queue_depth{upstream="default"} 2.0' in await metrics_of(narrow)
    assert (await narrow.stats())["upstream"]["queue"] == {"working": 1, "waiting": 2, "places": 1}
    waited = time.monotonic()
    await asyncio.sleep(0.05)
    waited = time.monotonic() - waited
    desk.go.set()
    await asyncio.gather(first, *calls)
    await narrow.settled()
    assert 'nearhit_queue_depth{upstream="default"} 0.0' in await metrics_of(narrow)
    value = narrow.services.metrics.value
    assert value("nearhit_queue_seconds_count") == before + 3
    # Both waited for that long.
    assert value("nearhit_queue_seconds_sum") >= 2 * waited


async def test_time_in_the_queue_is_no_time_saved(narrow: Proxy, desk: Desk) -> None:
    first = await occupied(narrow, desk)
    second = call(narrow, "second")
    await waiting(narrow, 1)
    await asyncio.sleep(0.5)
    released = time.monotonic()
    desk.go.set()
    assert (await second).outcome == "MISS"
    await narrow.settled()
    most_ms = (time.monotonic() - released) * 1000
    await first
    hit = await narrow.chat("second", prompt="second")
    assert hit.outcome == "HIT"
    assert int(hit.headers["X-Nearhit-Saved-Ms"]) <= most_ms + 1


async def test_one_servers_queue_holds_up_no_other_server(tmp_path: Path, model: FakeModel, desk: Desk) -> None:
    async with fake_model() as other:
        other.models = ["big"]
        upstream = {"url": model.url, "poll_s": 0.1, "max_concurrency": 1}
        sections: dict[str, Any] = {"upstream": upstream, "sharing": "shared", "cache": {"mode": "exact"}}
        own = await asyncio.to_thread(two_upstreams, tmp_path, model, other, **sections)
        async with running_proxy(own) as proxy:
            for one in proxy.services.backends:
                await one.tracker.looked.wait()
            first = await occupied(proxy, desk, fields={"model": "small"})
            behind = call(proxy, "behind", fields={"model": "small"})
            await waiting(proxy, 1)
            assert (await proxy.chat("hi", model="big")).status == 200
            desk.go.set()
            assert [(await one).status for one in (first, behind)] == [200, 200]
            await proxy.settled()


# The end


@pytest.mark.parametrize("on_disconnect", ["cancel", "drain"])
async def test_stopping_with_a_queue_ends_everything(
    tmp_path: Path, model: FakeModel, desk: Desk, on_disconnect: str
) -> None:
    settings = settings_for(
        tmp_path, model.url, upstream__max_concurrency=1, sharing="shared", upstream__on_disconnect=on_disconnect
    )
    async with aiohttp.ClientSession() as session:
        async with running_proxy(settings) as running:
            proxy = Proxy(running.url, running.app, session)
            first = await occupied(proxy, desk)
            calls = [call(proxy, "chat"), call(proxy, "bypass", headers=NO_STORE), call(proxy, "other", "/v1/rerank")]
            await waiting(proxy, 3)
        answers = await asyncio.gather(first, *calls, return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, aiohttp.ClientError) or (isinstance(answer, Answer) and answer.status == 503)
    assert desk.order == ["first"]
    await eventually(lambda: desk.left == 1)
