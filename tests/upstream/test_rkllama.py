"""rkllama: identity by the files of its models, and the emulator that imitates its faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from aiohttp import ClientSession

from proxy.upstream.adapter import Seen
from proxy.upstream.rkllama import Rkllama as Adapter
from tests.conftest import eventually
from tests.emulators.asking import ask, chat, client, events, post, probing, said
from tests.emulators.rkllama import TIMEOUT_TEXT, Rkllama, rkllama

CHAT = "/v1/chat/completions"
MODEL = "qwen3:0.6b"


@pytest.fixture
async def server() -> AsyncIterator[Rkllama]:
    async with rkllama() as running:
        yield running


@pytest.fixture
async def session(server: Rkllama) -> AsyncIterator[ClientSession]:
    async with client(server.url) as asking:
        yield asking


async def test_what_is_loaded_at_a_moment_identifies_nothing(server: Rkllama, session: ClientSession) -> None:
    async with probing(server.url) as probe:
        before = await Adapter("").look(probe)
        await ask(session, "hi", model=MODEL)
        assert server.loaded == {MODEL}
        assert await Adapter("").look(probe) == before
        assert isinstance(before, Seen)
        assert before.models == (MODEL, "tiny:0.1b")


async def test_a_change_to_any_of_its_models_is_another_identity(server: Rkllama) -> None:
    async with probing(server.url) as probe:
        before = await Adapter("").look(probe)
        server.models[1] = replace(server.models[1], size=1)
        after = await Adapter("").look(probe)
        server.models.reverse()
        assert await Adapter("").look(probe) == after
    assert isinstance(before, Seen)
    assert isinstance(after, Seen)
    assert before.fingerprint != after.fingerprint


async def test_the_order_of_its_list_is_no_identity(server: Rkllama) -> None:
    async with probing(server.url) as probe:
        before = await Adapter("").look(probe)
        server.models.reverse()
        assert await Adapter("").look(probe) == before


def test_a_warm_up_would_be_of_no_use() -> None:
    assert Adapter("").prefixing is None


async def test_the_same_system_prompt_is_computed_again_for_other_questions(
    server: Rkllama, session: ClientSession
) -> None:
    """Why a warm-up would be of no use."""
    system = {"role": "system", "content": "Be brief."}

    async def computed(*texts: str) -> tuple[int, int]:
        body = chat(*texts, model=MODEL)
        await post(session, CHAT, {**body, "messages": [system, *body["messages"]]})
        return server.npu.runs[-1].computed, len(server.npu.runs[-1].fed)

    for texts in (("one",), ("two",), ("one",)):
        done, fed = await computed(*texts)
        assert done == fed, "a miss"
    done, fed = await computed("one", "answer", "more")
    assert done < fed, "a follow-up turn"


async def test_the_last_token_of_a_cut_answer_begins_the_next(server: Rkllama, session: ClientSession) -> None:
    server.answer = lambda prompt: ["a", "b", "c"]
    assert await ask(session, "hi", model=MODEL, max_tokens=2) == "ab"
    assert await ask(session, "next", model=MODEL) == "babc"
    assert await ask(session, "next", model=MODEL) == "abc"
    assert await ask(session, "hi", model=MODEL, max_tokens=0) == "abc", "no limit at all"


async def test_a_cut_answer_says_stop_and_counts_tokens(server: Rkllama, session: ClientSession) -> None:
    server.answer = lambda prompt: ["one two ", "three ", "four"]
    _, answer = await post(session, CHAT, chat("hi", model=MODEL, max_tokens=2))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


async def test_a_stream_has_a_new_id_for_each_chunk_and_usage_at_the_end(session: ClientSession) -> None:
    _, stream = await post(session, CHAT, chat("hi", model=MODEL, stream=True))
    *chunks, done = events(stream)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == len(chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    _, stream = await post(session, "/v1/completions", {"model": MODEL, "prompt": "hi", "stream": True})
    assert events(stream)[0]["object"] == "chat.completion.chunk"
    assert "text" in events(stream)[0]["choices"][0]


async def test_a_timeout_is_an_answer_like_any_other(server: Rkllama, session: ClientSession) -> None:
    server.times_out = True
    assert await ask(session, "hi", model=MODEL) == TIMEOUT_TEXT
    _, stream = await post(session, CHAT, chat("hi", model=MODEL, stream=True))
    assert said(stream) == ""
    assert events(stream)[-1] == "[DONE]"


async def test_an_abandoned_stream_goes_on_and_leaks(server: Rkllama, session: ClientSession) -> None:
    server.answer = lambda prompt: ["a", "b", "c"]
    server.npu.free = 1
    server.npu.go.clear()
    async with session.post(CHAT, json=chat("hi", model=MODEL, stream=True)) as response:
        await response.content.readany()
    next_call = asyncio.create_task(ask(session, "next", model=MODEL))
    await eventually(lambda: len(server.bodies(CHAT)) == 2)
    assert len(server.npu.runs) == 1
    server.npu.go.set()
    assert await next_call == "cabc"


async def test_requests_wait_for_each_other(server: Rkllama, session: ClientSession) -> None:
    server.npu.go.clear()
    calls = [asyncio.create_task(ask(session, str(number), model=MODEL)) for number in range(3)]
    await eventually(lambda: len(server.bodies(CHAT)) == 3)
    assert len(server.npu.runs) == 1
    server.npu.go.set()
    assert len(set(await asyncio.gather(*calls))) == 3


async def test_errors_are_flat(server: Rkllama, session: ClientSession) -> None:
    status, answer = await post(session, CHAT, chat("hi", model="nope"))
    assert (status, answer) == (500, {"error": "Failed to load model 'nope': Model directory 'nope' not found."})
    assert await post(session, "/unload_model", {"model_name": "nope"}) == (
        400,
        {"error": "No model nope are currently loaded."},
    )
    await post(session, "/load_model", {"model_name": MODEL})
    again = await post(session, "/load_model", {"model_name": MODEL})
    assert again == (200, {"error": "A model is already loaded. Nothing to do."})
    async with session.post(CHAT, data=b"{") as response:
        assert response.status == 500
        assert isinstance((await response.json())["error"], str)
    async with session.get("/health") as response:
        assert (response.status, response.content_type) == (404, "text/html")


async def test_ollamas_chat_streams_lines_by_default(session: ClientSession) -> None:
    _, text = await post(session, "/api/chat", chat("hi", model=MODEL, options={"num_predict": 2}))
    lines = text.splitlines() if isinstance(text, str) else []
    assert len(lines) == 3
    assert '"done": true' in lines[-1]
    _, whole = await post(session, "/api/chat", chat("hi", model=MODEL, stream=False))
    assert whole["done"] is True
