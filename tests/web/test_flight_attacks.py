"""Attacks on answers under way: nobody gets another's secrets, another model's words, or no answer at all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.web import services
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import (
    FakeModel,
    chat_events,
    error,
    held,
    numbered,
    raw,
    reply,
    send,
    sse,
    streamed,
)
from tests.web.test_exact_tier import said
from tests.web.test_identity import props
from tests.web.test_responses import answer, events, message, wire
from tests.web.test_stale import HOUR_S, Later, stored

ASKED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
SAMPLED: dict[str, Any] = {"temperature": 0.8}
FORMS: list[dict[str, Any]] = [{}, {"stream": True}, ASKED]


def joined(proxy: Proxy) -> float:
    return proxy.services.metrics.value("nearhit_joined_total")


def ask(proxy: Proxy, content: str = "x", **fields: Any) -> asyncio.Task[Answer]:
    return asyncio.create_task(proxy.chat(content, **fields))


def asked_about(model: FakeModel, content: str) -> int:
    """How many requests with this question have reached the server."""
    return sum(seen.json["messages"][-1]["content"] == content for seen in model.generations)


# What an answer repeats of its call, and what servers say that nobody expects


async def repeating(model: FakeModel, request: web.Request) -> web.StreamResponse | None:
    """Stream answers that repeat what their calls say of the caller, as api.openai.com and vLLM do."""
    if request.path != "/v1/responses":
        return None
    asked = await request.json()
    model.started += "input" in asked
    own = {name: asked.get(name) for name in ("metadata", "user")}
    told = [{**e, "response": {**e["response"], **own}} if "response" in e else e for e in events("Hi")]
    return await send(request, [wire(event) for event in told], model=model, hold_after=1)


async def test_who_joins_a_stream_does_not_see_what_the_other_call_says_of_its_caller(
    proxy: Proxy, model: FakeModel
) -> None:
    model.extra = lambda request: repeating(model, request)
    call = {"model": "tiny", "input": "Hello", "store": False, "stream": True}
    alice = {**call, "metadata": {"patient": "Alice"}, "user": "alice@example.org"}
    bob = {**call, "metadata": {"patient": "Bob"}, "user": "bob@example.org"}
    leader = asyncio.create_task(proxy.post("/v1/responses", json=alice))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.post("/v1/responses", json=bob))
    await eventually(lambda: joined(proxy) == 1)
    model.release.set()
    one, other = await asyncio.gather(leader, follower)
    assert b"alice@example.org" in one.body
    assert (other.status, other.outcome) == (200, "JOINED")
    assert b'"Hi"' in other.body
    assert b"lice" not in other.body


async def test_who_joins_an_odd_answer_gets_an_answer(proxy: Proxy, model: FakeModel) -> None:
    odd = message("Hi.")
    odd["content"][0]["annotations"] = 1

    async def respond(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/v1/responses" or "input" not in await request.json():
            return None
        model.started += 1
        await model.release.wait()
        return web.json_response(answer(odd))

    model.extra = respond
    call = {"model": "tiny", "input": "Hello", "store": False}
    leader = asyncio.create_task(proxy.post("/v1/responses", json=call))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.post("/v1/responses", json={**call, "stream": True}))
    await eventually(lambda: joined(proxy) == 1)
    model.release.set()
    answers = await asyncio.gather(leader, follower)
    assert [(a.status, json.loads(a.body)["output"]) for a in answers] == [(200, [odd])] * 2


# What is stored, while an equal call is under way or the server is not known yet


async def test_what_is_fetched_for_a_stale_answer_is_not_kept_for_a_model_that_was_swapped_meanwhile(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.props = old = props()
    monkeypatch.setattr(services, "_LOOKUP_TIMEOUT_S", 60.0)
    options = {"cache__stale_while_revalidate_s": HOUR_S, "cache__hot_bytes": 0}
    proxy, _ = await stored(start, model, monkeypatch, **options)
    tracker, buffer = proxy.services.backends.first.tracker, proxy.services.backends.first.answers._buffer
    seen, read, reached, goes_on = tracker.current.fingerprint, buffer.get, asyncio.Event(), asyncio.Event()

    async def slow(key: bytes, now_ms: int) -> Any:
        entry = await read(key, now_ms)
        reached.set()
        await goes_on.wait()
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(buffer, "get", slow)
        first = ask(proxy)
        await reached.wait()
    model.props = props("run-2", "/other.gguf")
    await eventually(lambda: tracker.current.confirmed and tracker.current.fingerprint != seen)
    goes_on.set()
    stale = await first
    assert (said(stale), stale.outcome) == ("answer 1", "STALE")
    await proxy.settled()
    model.props = old
    await eventually(lambda: tracker.current.confirmed and tracker.current.fingerprint == seen)
    again = await proxy.chat("x")
    assert (said(again), again.outcome) == ("answer 1", "STALE")
    await proxy.settled()


@pytest.mark.parametrize("directives", [None, "only-if-cached"])
async def test_an_answer_in_the_file_is_given_while_an_equal_call_fetches_its_own(
    start: StartProxy, model: FakeModel, directives: str | None
) -> None:
    proxy = await start(cache__hot_bytes=0)
    model.respond = numbered()
    await proxy.chat("x")
    await proxy.settled()
    model.respond = held(numbered())
    own = ask(proxy, headers={"Cache-Control": "no-cache"})
    await eventually(lambda: model.started == 2)
    other = ask(proxy, headers={"Cache-Control": directives} if directives else None)
    try:
        await eventually(other.done)
    finally:
        model.release.set()
        stored_one, _ = await asyncio.gather(other, own)
    assert (stored_one.status, said(stored_one), stored_one.outcome) == (200, "answer 1", "HIT")


async def test_before_the_first_look_a_server_is_asked_rather_than_stood_in_for(
    tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.props, model.respond = props(), numbered()
    settings = settings_for(tmp_path, model.url, cache__ttl_hours=1)
    async with running_proxy(settings) as proxy:
        await proxy.chat("x")
        await proxy.settled()

    async def shows_nothing_yet(request: web.Request) -> web.StreamResponse | None:
        if request.method == "GET":
            await model.release.wait()
        return None

    model.extra = shows_nothing_yet
    async with running_proxy(settings, wait=False) as proxy:
        Later(proxy, monkeypatch).seconds = HOUR_S + 60
        early = ask(proxy)
        await eventually(lambda: model.started == 2 or early.done())
        model.release.set()
        fresh = await early
        assert (said(fresh), fresh.outcome) == ("answer 2", "MISS")


# Waiting: nobody hangs, nobody asks in vain


@pytest.mark.parametrize("leading", FORMS)
@pytest.mark.parametrize("following", FORMS)
async def test_equal_calls_of_any_forms_get_an_answer_that_is_too_large_to_keep(
    start: StartProxy, model: FakeModel, leading: dict[str, Any], following: dict[str, Any]
) -> None:
    proxy = await start(cache__max_answer_bytes=20_000)
    model.respond = held(reply(*["x" * 1000] * 300))
    leader = ask(proxy, **leading)
    await eventually(lambda: model.started == 1)
    follower = ask(proxy, **following)
    await eventually(lambda: joined(proxy) + model.started == 2)
    model.release.set()
    async with asyncio.timeout(60):
        answers = await asyncio.gather(leader, follower)
    assert [(a.status, len(said(a))) for a in answers] == [(200, 300_000)] * 2


async def test_different_callers_of_a_failure_ask_once_together_although_retries_ask_anew(
    start: StartProxy, model: FakeModel
) -> None:
    options = {"cache__retry_window_s": 30, "cache__join_failures": "retry", "upstream__busy_retry_s": 0}
    proxy = await start(**options)

    async def fail_first(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        first = model.started == 1
        return error(500, "no", "server_error") if first else await numbered()(model, request, asked)

    model.respond = held(fail_first)
    callers = [ask(proxy, headers={"Authorization": f"Bearer {number}"}, **SAMPLED) for number in range(6)]
    await eventually(lambda: joined(proxy) == 5)
    model.release.set()
    answers = await asyncio.gather(*callers)
    assert sorted(a.status for a in answers) == [200] * 5 + [500]
    assert {said(a) for a in answers if a.status == 200} == {"answer 2"}
    assert model.started == 2


async def test_nobody_waits_for_a_later_variant_whose_answers_cannot_be_shared(
    start: StartProxy, model: FakeModel
) -> None:
    proxy = await start(cache__variants=2)
    assert (await proxy.chat("x", **SAMPLED)).status == 200
    await proxy.settled()
    model.respond = held(raw(b'{"error": {"message": "slow down"}}', status=429))
    first = [ask(proxy, **SAMPLED) for _ in range(2)]
    await eventually(lambda: joined(proxy) == 1)
    model.release.set()
    assert [a.status for a in await asyncio.gather(*first)] == [429, 429]
    model.release.clear()
    before = model.started
    later = [ask(proxy, **SAMPLED) for _ in range(3)]
    try:
        await eventually(lambda: model.started == before + 3)
    finally:
        model.release.set()
        await asyncio.gather(*later)


async def test_who_waits_for_the_end_of_an_answer_that_has_begun_waits_as_long_as_it_takes(
    start: StartProxy, model: FakeModel
) -> None:
    proxy = await start(cache__join_timeout_s=0.05)
    parts = [sse(*chat_events("a", usage=True)[:1], done=False), sse(*chat_events("a", usage=True)[1:])]

    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        begins = asked["messages"][-1]["content"] == "begins"
        return await (streamed(*parts, hold_after=1) if begins else held(reply()))(model, request, asked)

    model.respond = respond
    body = {"messages": [{"role": "user", "content": "begins"}], "temperature": 0, **ASKED}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as leader:
        assert await leader.content.readany()
        follower = ask(proxy, "begins")
        await eventually(lambda: joined(proxy) == 1)
        # Who began to wait later, for an answer that does not begin, has had enough: so much time has passed.
        others = [ask(proxy, "does not begin")]
        await eventually(lambda: asked_about(model, "does not begin") == 1)
        others.append(ask(proxy, "does not begin"))
        await eventually(lambda: asked_about(model, "does not begin") == 2)
        model.release.set()
        await asyncio.gather(leader.read(), *others)
        whole = await follower
    assert (said(whole), whole.outcome) == ("a", "JOINED")
    assert asked_about(model, "begins") == 1
