"""What a review tried against namespaces, keys and several processes, and must not work again."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, chat_events, held, numbered, reply, sse
from tests.web.test_clients import CLIENTS, OURS, ask, by, named
from tests.web.test_sharing import keyed
from tests.web.test_two_leases import others_know

__all__ = ["named"]


pytestmark = pytest.mark.usefixtures("patient_leases")


async def with_variants(start: StartProxy, model: FakeModel) -> Proxy:
    model.extra, model.respond = keyed(OURS), numbered()
    options: dict[str, Any] = {"sharing": "clients", "clients": CLIENTS, "upstream__api_key": OURS}
    return await start(cache__variants=2, **options)


async def test_whose_turn_it_is_tells_nothing_of_another_namespace(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_variants(start, model)
    body = {"messages": [{"role": "user", "content": "secret?"}], "temperature": 1}

    async def key() -> str:
        return str((await proxy.post("/-/explain", json=body, headers=by("cat"))).json["key"]["digest"])

    before = await key()
    await ask(proxy, "ann", "secret?", temperature=1)
    await proxy.settled()
    assert await key() == before


async def test_another_namespace_takes_no_turn_away(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_variants(start, model)
    outcomes = []
    for _ in range(4):
        for who in ("cat", "ann"):
            outcomes.append((await ask(proxy, who, "x", temperature=1)).outcome)
            await proxy.settled()
    assert outcomes == ["MISS"] * 4 + ["HIT"] * 4


async def test_who_joins_a_reader_has_the_answer_kept(named: Proxy, model: FakeModel) -> None:
    model.respond = held(numbered())
    reader = asyncio.create_task(named.chat("x", headers=by("reader")))
    await eventually(lambda: model.started == 1)
    ann = asyncio.create_task(named.chat("x", headers=by("ann")))
    await eventually(lambda: named.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    await asyncio.gather(reader, ann)
    await named.settled()
    assert (await ask(named, "ann", "x")).outcome == "HIT"


async def test_a_trace_does_not_show_nearhits_key(named: Proxy, model: FakeModel) -> None:
    async def echo(request: web.Request) -> web.StreamResponse | None:
        return web.Response(text=repr(request.raw_headers)) if request.method == "TRACE" else None

    model.extra = echo
    answer = await named.send("TRACE", "/", headers=by("ann"))
    assert answer.status == 405
    assert OURS.encode() not in answer.body


async def test_the_query_of_a_preflight_goes_no_further(named: Proxy, model: FakeModel) -> None:
    asks = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    await named.send("OPTIONS", "/v1/models?key=planted", headers=asks)
    (seen,) = [seen for seen in model.seen if seen.method == "OPTIONS"]
    assert seen.target == "/v1/models"


async def test_nobody_elsewhere_waits_for_what_will_not_be_kept(tmp_path: Path, model: FakeModel) -> None:
    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": " + b"z" * 5000 + b"\n\n")
        await model.release.wait()
        await response.write(sse(*chat_events("done")))
        return response

    model.respond = respond
    settings = settings_for(tmp_path, model.url, cache__max_answer_bytes=1024)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await eventually(lambda: others_know(one) and others_know(other))
        first = asyncio.create_task(one.chat("x", stream=True))
        await eventually(lambda: model.started == 1)
        second = asyncio.create_task(other.chat("x", stream=True))
        await eventually(lambda: model.started == 2)
        model.release.set()
        assert {answer.status for answer in await asyncio.gather(first, second)} == {200}


async def test_what_cannot_be_written_is_fetched_side_by_side(tmp_path: Path, model: FakeModel) -> None:
    model.respond = held(reply("a"))
    settings = settings_for(tmp_path, model.url, cache__flush_s=0.01)

    def spoil() -> None:
        with closing(sqlite3.connect(tmp_path / "nearhit.db")) as database:
            database.execute("CREATE TRIGGER no BEFORE INSERT ON entry BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
            database.commit()

    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(running_proxy(settings)) for _ in range(3)]
        await eventually(lambda: all(map(others_know, proxies)))
        await asyncio.to_thread(spoil)
        calls = [asyncio.create_task(proxies[0].chat("x"))]
        await eventually(lambda: model.started == 1)
        calls += [asyncio.create_task(proxy.chat("x")) for proxy in proxies[1:]]
        model.release.set()
        await calls[0]
        model.release.clear()
        # Both are with the server at once: neither waits for the other.
        await eventually(lambda: model.started == 3)
        model.release.set()
        assert {answer.status for answer in await asyncio.gather(*calls)} == {200}
