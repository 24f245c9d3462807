"""The vendor's demo: what it answers depends on who asked before, and the emulator shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession

from proxy.upstream.adapter import Seen
from proxy.upstream.rkllm_flask import RkllmFlask as Adapter
from tests.conftest import eventually
from tests.emulators.asking import ask, chat, client, events, post, probing, said
from tests.emulators.rkllm_flask import BUSY, RkllmFlask, rkllm_flask

CHAT = "/v1/chat/completions"


@pytest.fixture
async def server() -> AsyncIterator[RkllmFlask]:
    async with rkllm_flask() as running:
        yield running


@pytest.fixture
async def session(server: RkllmFlask) -> AsyncIterator[ClientSession]:
    async with client(server.url) as asking:
        yield asking


async def test_it_is_known_by_the_name_of_its_model(server: RkllmFlask) -> None:
    async with probing(server.url) as probe:
        seen = await Adapter("").look(probe)
    assert isinstance(seen, Seen)
    assert (seen.models, seen.loaded) == ((server.model,), server.model)


def test_its_answers_are_not_kept_unless_somebody_says_so() -> None:
    assert not Adapter("").capabilities.cached
    assert Adapter("").prefixing is None


async def test_the_same_request_is_another_after_somebody_elses(server: RkllmFlask, session: ClientSession) -> None:
    tools = [{"role": "tool", "content": text} for text in ("a", "b")]
    body = {"messages": [{"role": "user", "content": "hi"}, *tools]}
    fed = []
    for somebody_else in ((), ("hello",)):
        server.previous = []
        if somebody_else:
            await ask(session, *somebody_else)
        await post(session, CHAT, body)
        fed.append(server.npu.runs[-1].fed)
    assert fed == ["b", '["a", "b"]']


async def test_the_history_never_reaches_the_model(server: RkllmFlask, session: ClientSession) -> None:
    assert await ask(session, "one", "answer", "and then?") == await ask(session, "other", "answer", "and then?")
    assert server.npu.runs[-1].fed == "and then?"


async def test_the_system_prompt_reaches_the_model_only_with_tools(server: RkllmFlask, session: ClientSession) -> None:
    system = {"role": "system", "content": "Be brief. "}
    for tools, fed in ((None, "hi"), ([{"type": "function"}], "Be brief. hi")):
        server.previous = []
        await post(session, CHAT, {"messages": [system, {"role": "user", "content": "hi"}], "tools": tools})
        assert server.npu.runs[-1].fed == fed


async def test_whoever_comes_while_it_works_is_told_that_it_is_busy(server: RkllmFlask, session: ClientSession) -> None:
    server.npu.go.clear()
    first = asyncio.create_task(ask(session, "hi"))
    await eventually(lambda: server.blocking)
    status, answer = await post(session, CHAT, chat("next"))
    assert (status, answer["error"]["message"], answer["error"]["type"]) == (503, BUSY, "server_error")
    server.npu.go.set()
    assert await first == "You said hi."
    assert await ask(session, "next") == "You said next."


async def test_an_abandoned_stream_keeps_it_busy_until_its_end(server: RkllmFlask, session: ClientSession) -> None:
    server.npu.free = 1
    server.npu.go.clear()
    async with session.post(CHAT, json=chat("hi", stream=True)) as response:
        await response.content.readany()
        await eventually(lambda: server.running)
    assert (await post(session, CHAT, chat("next")))[0] == 503
    server.npu.go.set()
    await eventually(lambda: not server.running)
    assert await ask(session, "next") == "You said next."


async def test_one_that_left_before_the_first_token_speaks_in_the_next_answer(
    server: RkllmFlask, session: ClientSession
) -> None:
    server.npu.go.clear()
    async with session.post(CHAT, json=chat("first", stream=True)) as response:
        await response.content.readany()
    next_call = asyncio.create_task(ask(session, "next"))
    await eventually(lambda: len(server.npu.runs) == 2)
    server.npu.go.set()
    mixed = await next_call
    assert "first" in mixed
    assert "next" in mixed


async def test_a_stream_begins_with_the_role_and_has_no_usage(session: ClientSession) -> None:
    _, stream = await post(session, CHAT, chat("hi", stream=True))
    *chunks, done = events(stream)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop"}
    assert len({chunk["id"] for chunk in chunks}) == len(chunks)
    assert not any("usage" in chunk for chunk in chunks)
    assert said(stream) == "You said hi."


async def test_usage_counts_words_and_a_cut_says_stop(session: ClientSession) -> None:
    _, answer = await post(session, CHAT, chat("hi there", max_tokens=2))
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_what_it_does_not_know(session: ClientSession) -> None:
    status, answer = await post(session, CHAT, {"prompt": "hi"})
    assert (status, answer["error"]["message"]) == (400, "Missing 'messages' in request body.")
    async with session.get("/health") as response:
        assert (response.status, response.content_type) == (404, "text/html")
