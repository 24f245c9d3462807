"""`/v1/chat/completions`: what another caller gets of an answer that a server tells in its own way, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.cache.test_choices import CALLS
from tests.conftest import Answer, Proxy, eventually
from tests.fake_model import FakeModel, chat_body, chat_events, chunk, numbered, raw, send, sse, streamed

ANNA: dict[str, Any] = {"metadata": {"ticket": "4711"}, "user": "anna"}
BERT: dict[str, Any] = {"metadata": {"ticket": "4712"}, "user": "bert"}


async def echo(model: FakeModel, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    """Repeat in the answer what the call says of its caller."""
    said = {name: asked[name] for name in ("metadata", "user") if name in asked}
    if not asked.get("stream"):
        return web.json_response(chat_body("Hello", **said))
    events = [sse({**event, **said}, done=False) for event in chat_events("Hello")]
    held = None if model.release.is_set() else 1
    return await send(request, [*events, sse()], model=model, hold_after=held)


def told(answer: Answer) -> Iterator[dict[str, Any]]:
    """The deltas of a stream."""
    lines = (line for line in answer.body.decode().split("\n") if line.startswith("data: {"))
    events = (json.loads(line.removeprefix("data: ")) for line in lines)
    return (choice["delta"] for event in events for choice in event["choices"])


def calls(answer: Answer) -> set[tuple[str, str]]:
    """The tool calls of a stream, told apart by their ids."""
    found = [call for delta in told(answer) for call in delta.get("tool_calls") or ()]
    return {(call["id"], call["function"]["arguments"]) for call in found}


async def test_parallel_calls_of_one_number_reach_everybody_as_they_are(proxy: Proxy, model: FakeModel) -> None:
    first, second = [chunk({"role": "assistant", "tool_calls": [call]}) for call in CALLS]
    model.respond = streamed(sse(first, second, chunk({}, finish="tool_calls")))
    for _ in range(2):
        answer = await proxy.chat("weather", stream=True)
        await proxy.settled()
        assert calls(answer) == {("call_1", '{"city":"Paris"}'), ("call_2", '{"city":"Rome"}')}


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_sees_what_another_said_of_himself(proxy: Proxy, model: FakeModel, stream: bool) -> None:
    model.respond = echo
    model.release.set()
    mine = await proxy.chat(**ANNA, stream=stream)
    await proxy.settled()
    assert b"4711" in mine.body
    other = await proxy.chat(**BERT, stream=stream)
    assert other.outcome == "HIT"
    assert b"4711" not in other.body
    assert b"anna" not in other.body


async def test_nobody_who_joins_sees_what_another_said_of_himself(proxy: Proxy, model: FakeModel) -> None:
    model.respond = echo
    mine = asyncio.create_task(proxy.chat(**ANNA, stream=True))
    await eventually(lambda: model.started == 1)
    joining = asyncio.create_task(proxy.chat(**BERT, stream=True))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    first, other = await asyncio.gather(mine, joining)
    assert b"4711" in first.body
    assert other.outcome == "JOINED"
    assert "".join(delta.get("content") or "" for delta in told(other)) == "Hello"
    assert b"4711" not in other.body
    assert b"anna" not in other.body


@pytest.mark.parametrize(
    ("said", "seen"),
    [({}, {}), ({"metadata": None}, {"metadata": None}), ({"metadata": {"ticket": "4711"}}, {"metadata": {}})],
    ids=["nothing", "null", "something"],
)
async def test_the_official_client_finds_no_field_in_a_replay_that_was_not_there(
    proxy: Proxy, model: FakeModel, said: dict[str, Any], seen: dict[str, Any]
) -> None:
    model.respond = raw(json.dumps(chat_body("Hello", **said)).encode())

    def read() -> Any:
        with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
            hello: Any = [{"role": "user", "content": "hi"}]
            return client.chat.completions.create(model="tiny", messages=hello, temperature=0)

    first = await asyncio.to_thread(read)
    await proxy.settled()
    replay = await asyncio.to_thread(read)
    assert (await proxy.stats())["requests"]["HIT"] == 1
    own = {"id": "", "created": 0}
    assert {**replay.to_dict(), **own} == {**first.to_dict(), **own, **seen}
    assert replay.model_fields_set == first.model_fields_set
    assert replay.metadata == seen.get("metadata")


@pytest.mark.parametrize(
    "fields",
    [
        {"web_search_options": {}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "builtin_function", "function": {"name": "$web_search"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "mcp", "server_label": "x"}]},
    ],
    ids=["options", "search", "built in", "one of two"],
)
async def test_what_the_server_looks_up_is_asked_each_time(
    proxy: Proxy, model: FakeModel, fields: dict[str, Any]
) -> None:
    model.respond = numbered()
    answers = []
    for _ in range(2):
        answers.append(await proxy.chat("Which release of curl is out?", **fields))
        await proxy.settled()
    assert [answer.headers["Cache-Status"] for answer in answers] == ["nearhit; fwd=bypass; detail=background"] * 2
    assert answers[0].json["choices"] != answers[1].json["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"web_search_options": None},
        {"tools": None},
        {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "g"}}]},
        {"tools": [{"function": {"name": "f"}}]},
    ],
    ids=["no options", "none", "of both kinds", "of no kind"],
)
async def test_tools_that_the_caller_runs_are_cached(proxy: Proxy, model: FakeModel, fields: dict[str, Any]) -> None:
    model.respond = numbered()
    outcomes = []
    for _ in range(2):
        outcomes.append((await proxy.chat("Which release of curl is out?", **fields)).outcome)
        await proxy.settled()
    assert outcomes == ["MISS", "HIT"]
