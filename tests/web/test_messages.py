"""`/v1/messages` through the running proxy: hits, streams, keys, and what is never stored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anthropic
import pytest
from aiohttp import web

from proxy.upstream import sharing
from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, Seen, is_nearhits_own, send

PATH = "/v1/messages"
MINE, OTHER = {"X-Api-Key": "mine"}, {"X-Api-Key": "other"}
ONLY = {"Cache-Control": "only-if-cached"}
USAGE = {"cache_read_input_tokens": 2, "input_tokens": 3, "output_tokens": 4}

Extra = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def message(*blocks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An answer as a server sends it."""
    content = list(blocks) or [{"type": "text", "text": "Hello there."}]
    base = {"id": "chatcmpl-up", "type": "message", "role": "assistant", "content": content, "model": "tiny"}
    return {**base, "stop_reason": "end_turn", "stop_sequence": None, "usage": USAGE, **changes}


def events(*pieces: str, **changes: Any) -> list[dict[str, Any]]:
    """The events of a stream as llama.cpp sends them."""
    begun = message(stop_reason=None, usage={**USAGE, "output_tokens": 0}, content=[])
    text = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}} for piece in pieces
    ]
    delta = {"stop_reason": "end_turn", "stop_sequence": None, **changes}
    return [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *text,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 4}},
        {"type": "message_stop"},
    ]


def wire(*told: dict[str, Any]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in told)


def speaking(*pieces: str) -> Extra:
    """Answer calls with this text, in the form that they ask for; without text, with their number."""
    calls = 0

    async def respond(request: web.Request) -> web.StreamResponse | None:
        nonlocal calls
        if request.path != PATH:
            return None
        calls += not is_nearhits_own(request.headers, await request.read())
        said = pieces or ("answer ", str(calls))
        if (await request.json()).get("stream"):
            return await send(request, [wire(event) for event in events(*said)])
        return web.json_response(message({"type": "text", "text": "".join(said)}))

    return respond


def answering(body: bytes, kind: str = "application/json", status: int = 200) -> Extra:
    """Answer calls with exactly these bytes."""

    async def respond(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=body, content_type=kind, status=status) if request.path == PATH else None

    return respond


def asked(model: FakeModel) -> list[Seen]:
    mine = [seen for seen in model.seen if seen.target.startswith(PATH)]
    return [seen for seen in mine if not is_nearhits_own(seen.headers, seen.body)]


async def ask(
    proxy: Proxy, content: Any = "hi", *, path: str = PATH, headers: Mapping[str, str] | None = None, **fields: Any
) -> Answer:
    body = {"model": "tiny", "max_tokens": 9, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    answer = await proxy.post(path, json={**body, **fields}, headers=headers)
    await proxy.settled()
    return answer


def told(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.body.decode().split("\n") if "data: " in line]


def text_of(answer: Answer) -> str:
    deltas = [event["delta"] for event in told(answer) if event["type"] == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas)


async def test_a_repeat_is_a_hit_with_an_id_of_its_own(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking()
    miss, hit, again = [await ask(proxy, system="Be brief.") for _ in range(3)]
    assert [answer.outcome for answer in (miss, hit, again)] == ["MISS", "HIT", "HIT"]
    assert {**hit.json, "id": ""} == {**miss.json, "id": ""}
    assert len({answer.json["id"] for answer in (miss, hit, again)}) == 3
    assert hit.json["id"].startswith("msg_")
    assert hit.headers["Content-Type"] == "application/json; charset=utf-8"
    assert len(asked(model)) == 1


@pytest.mark.parametrize("streams_first", [False, True])
async def test_a_stream_and_a_whole_answer_share_an_entry(proxy: Proxy, model: FakeModel, streams_first: bool) -> None:
    model.extra = speaking("Hello", " there", ".")
    await ask(proxy, stream=streams_first)
    streamed, whole = await ask(proxy, stream=True), await ask(proxy)
    assert (streamed.outcome, whole.outcome) == ("HIT", "HIT")
    assert text_of(streamed) == whole.json["content"][0]["text"] == "Hello there."
    assert whole.json["usage"] == USAGE
    assert streamed.headers["Content-Type"] == "text/event-stream"
    assert [event["type"] for event in told(streamed)][-2:] == ["message_delta", "message_stop"]
    assert len(asked(model)) == 1


async def test_the_stream_of_a_miss_passes_byte_for_byte(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking("Hello", " there.")
    miss = await ask(proxy, stream=True)
    assert miss.body == wire(*events("Hello", " there."))


async def test_the_short_path_is_the_same_dialect(proxy: Proxy, model: FakeModel) -> None:
    async def short(request: web.Request) -> web.StreamResponse | None:
        return web.json_response(message()) if request.path == "/messages" else None

    model.extra = short
    assert [(await ask(proxy, path="/messages")).outcome for _ in range(2)] == ["MISS", "HIT"]


async def test_the_same_question_in_other_words_is_near(proxy: Proxy, model: FakeModel) -> None:
    await eventually(lambda: proxy.services.near is not None)
    model.extra = speaking()
    await ask(proxy, "What is the capital of France?")
    near = await ask(proxy, [{"type": "text", "text": "what is the capital of france"}])
    # The form of a message's content is part of the call.
    assert near.outcome == "MISS"
    near = await ask(proxy, "what is the capital of france")
    assert near.outcome == "NEAR"
    assert near.json["content"][0]["text"] == "answer 1"


async def test_a_call_of_a_tool_answers_no_other_words(proxy: Proxy, model: FakeModel) -> None:
    await eventually(lambda: proxy.services.near is not None)
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"where": "France"}}
    model.extra = answering(json.dumps(message(use, stop_reason="tool_use")).encode())
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    await ask(proxy, "What is the capital of France?", tools=tools)
    assert (await ask(proxy, "what is the capital of france", tools=tools)).outcome == "MISS"
    hit = await ask(proxy, "What is the capital of France?", tools=tools)
    assert (hit.outcome, hit.json["content"]) == ("HIT", [use])


@pytest.mark.parametrize("name", ["anthropic-version", "anthropic-beta"])
async def test_headers_that_choose_behaviour_are_part_of_the_key(proxy: Proxy, model: FakeModel, name: str) -> None:
    model.extra = speaking()
    outcomes = [(await ask(proxy, headers=h)).outcome for h in ({}, {name: "a"}, {name: "b"}, {name: "a"}, {})]
    assert outcomes == ["MISS", "MISS", "MISS", "HIT", "HIT"]


async def test_a_prefilled_answer_is_kept_in_each_form_by_itself(proxy: Proxy, model: FakeModel) -> None:
    # llama.cpp repeats what it was given in a whole answer, and not in a stream.
    async def respond(request: web.Request) -> web.StreamResponse | None:
        if request.path != PATH:
            return None
        if (await request.json()).get("stream"):
            return await send(request, [wire(*events(" an apple."))])
        return web.json_response(message({"type": "text", "text": "It is an apple."}))

    model.extra = respond
    messages = [{"role": "user", "content": "a fruit?"}, {"role": "assistant", "content": "It is"}]
    for outcome in ("MISS", "HIT"):
        streamed, whole = await ask(proxy, messages=messages, stream=True), await ask(proxy, messages=messages)
        assert (streamed.outcome, whole.outcome) == (outcome, outcome)
        assert (text_of(streamed), whole.json["content"][0]["text"]) == (" an apple.", "It is an apple.")


async def test_followers_get_the_answer_each_in_its_form(proxy: Proxy, model: FakeModel) -> None:
    respond = speaking("Hello", " there.")

    async def held(request: web.Request) -> web.StreamResponse | None:
        if request.path == PATH:
            await model.release.wait()
        return await respond(request)

    model.extra = held
    tasks = [asyncio.create_task(ask(proxy, stream=stream)) for stream in (True, False, True)]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    model.release.set()
    first, whole, second = await asyncio.gather(*tasks)
    assert text_of(first) == text_of(second) == "Hello there."
    assert (whole.json["content"][0]["text"], whole.json["usage"]) == ("Hello there.", USAGE)
    assert len(asked(model)) == 1


ERROR = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
CURL = {"type": "text", "text": "It is 8.17."}
SEARCHED: list[dict[str, Any]] = [
    events()[0],
    {"type": "content_block_start", "index": 0, "content_block": SEARCH},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"query":"a"}'}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": FOUND},
    {"type": "content_block_stop", "index": 1},
    {"type": "content_block_start", "index": 2, "content_block": CURL},
    {"type": "content_block_stop", "index": 2},
    *events()[-2:],
]
"""A stream as servers send it that look things up although the call names no tool."""
NEVER: dict[str, tuple[str, bool, Extra]] = {
    "500": ("status", False, answering(json.dumps(ERROR).encode(), status=500)),
    "error in 200": ("error-in-200", False, answering(json.dumps(ERROR).encode())),
    "not a message": ("not-understood", False, answering(b'{"choices": []}')),
    "not JSON": ("not-json", False, answering(b"<html>", "text/html")),
    "no reason to stop": ("no-finish-reason", False, answering(json.dumps(message(stop_reason=None)).encode())),
    "paused": ("finish-reason", False, answering(json.dumps(message(stop_reason="pause_turn")).encode())),
    "broken off by a filter": ("finish-reason", False, answering(json.dumps(message(stop_reason="refusal")).encode())),
    "searched unasked": ("finish-reason", False, answering(json.dumps(message(SEARCH, FOUND, CURL)).encode())),
    "searched unasked in a stream": ("finish-reason", True, answering(wire(*SEARCHED), "text/event-stream")),
    "empty": ("empty", False, answering(json.dumps({**message(), "content": []}).encode())),
    "zero tokens": ("zero-tokens", False, answering(json.dumps(message(usage={**USAGE, "output_tokens": 0})).encode())),
    "error in the stream": ("error-in-stream", True, answering(wire(*events("a")[:3], ERROR), "text/event-stream")),
    "no end": ("incomplete", True, answering(wire(*events("a")[:-1]), "text/event-stream")),
    "stream without text": ("empty", True, answering(wire(*events()), "text/event-stream")),
    "unknown event": ("not-understood", True, answering(wire({"type": "new"}, *events("a")), "text/event-stream")),
    "paused stream": (
        "finish-reason",
        True,
        answering(wire(*events("a", stop_reason="pause_turn")), "text/event-stream"),
    ),
}


@pytest.mark.parametrize("case", NEVER)
async def test_what_is_never_stored_reaches_the_client_all_the_same(proxy: Proxy, model: FakeModel, case: str) -> None:
    reason, stream, model.extra = NEVER[case]
    direct = await proxy.session.post(model.url + PATH, json={"messages": [], "stream": stream})
    first, second = await ask(proxy, stream=stream), await ask(proxy, stream=stream)
    assert (first.outcome, second.outcome) == ("MISS", "MISS")
    assert (first.status, first.body) == (direct.status, await direct.read())
    assert proxy.services.metrics.value("nearhit_not_stored_total", {"reason": reason}) == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"container": "c"}, "conversation"),
        ({"mcp_servers": [{"type": "url", "url": "https://mcp.example", "name": "a"}]}, "background"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "background"),
        ({"messages": "hi"}, "not-understood"),
    ],
)
async def test_calls_that_more_depends_on_pass_by(
    proxy: Proxy, model: FakeModel, fields: dict[str, Any], reason: str
) -> None:
    model.extra = speaking()
    answers = [await ask(proxy, **fields) for _ in range(2)]
    assert [answer.outcome for answer in answers] == ["BYPASS", "BYPASS"]
    assert reason in answers[0].headers["Cache-Status"]
    assert answers[0].json["content"] != answers[1].json["content"]


@pytest.mark.parametrize("path", [f"{PATH}/count_tokens", f"{PATH}/batches"])
async def test_what_is_beside_it_passes_untouched(proxy: Proxy, model: FakeModel, path: str) -> None:
    async def respond(request: web.Request) -> web.StreamResponse | None:
        return web.json_response({"input_tokens": len(asked(model))}) if request.path == path else None

    model.extra = respond
    body = b'{ "messages": [{"role": "user", "content": "hi"}], "cache": {"no-store": true} }'
    for number in (1, 2):
        answer = await proxy.post(path, data=body)
        assert (answer.json, answer.outcome) == ({"input_tokens": number}, "")
        assert "Cache-Status" not in answer.headers
    assert [seen.body for seen in asked(model)] == [body, body]


def keyed(*keys: str, respond: Extra, chat: bool = True) -> Extra:
    """A server that takes these values of `x-api-key`; without `chat`, one that has no other way to be asked."""

    async def check(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST" or (request.path != PATH and not chat):
            return None if request.method != "POST" else web.json_response(ERROR, status=404)
        if request.headers.get("X-Api-Key") not in keys:
            return web.json_response({"type": "error", "error": {"type": "authentication_error"}}, status=401)
        if request.path != PATH or "messages" not in await request.json():
            return web.json_response(ERROR, status=400)
        return await respond(request)

    return check


@pytest.mark.parametrize("chat", [True, False])
async def test_keys_never_share_answers(start: StartProxy, model: FakeModel, chat: bool) -> None:
    model.extra = keyed("mine", "other", respond=speaking(), chat=chat)
    proxy = await start()
    assert not proxy.services.backends.first.gate.shared
    answers = [await ask(proxy, headers=headers) for headers in (MINE, OTHER, MINE, OTHER)]
    assert [answer.outcome for answer in answers] == ["MISS", "MISS", "HIT", "HIT"]
    texts = [answer.json["content"][0]["text"] for answer in answers]
    assert texts == ["answer 1", "answer 2", "answer 1", "answer 2"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("setting", ["auto", "shared", "per-credential"])
async def test_a_wrong_key_gets_nothing_from_the_cache(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, setting: str, chat: bool
) -> None:
    model.extra = keyed("mine", respond=speaking(), chat=chat)
    proxy = await start(sharing=setting)
    await ask(proxy, headers=MINE)
    assert (await ask(proxy, headers=MINE)).outcome == "HIT"
    for headers in (OTHER, {}, {"Authorization": "Bearer mine"}):
        assert (await ask(proxy, headers=headers)).status == 401
        assert (await ask(proxy, headers={**headers, **ONLY})).status == 504
    # A key that was taken back gets nothing any more, once it is believed no longer.
    monkeypatch.setattr(sharing, "CONFIRMED_S", 0.0)
    await proxy.services.backends.first.gate.heard(MINE, 200, generation=True, path=PATH)
    model.extra = keyed("new", respond=speaking(), chat=chat)
    assert (await ask(proxy, headers=MINE)).status == 401


@pytest.mark.parametrize("name", ["anthropic-workspace-id", "anthropic-user-profile-id"])
async def test_one_key_in_two_places_is_two_callers(start: StartProxy, model: FakeModel, name: str) -> None:
    # The official client sends these parameters of its calls as headers.
    async def respond(request: web.Request) -> web.StreamResponse | None:
        return web.json_response(message({"type": "text", "text": f"for {request.headers[name]}"}))

    model.extra = keyed("mine", respond=respond)
    proxy = await start()
    places = ("one", "one", "other")
    answers = [await ask(proxy, headers={**MINE, name: place}) for place in places]
    assert [answer.json["content"][0]["text"] for answer in answers] == [f"for {place}" for place in places]
    assert [answer.outcome for answer in answers] == ["MISS", "HIT", "MISS"]


async def the_client_says(proxy: Proxy, **fields: Any) -> anthropic.APIStatusError:
    """What a person sees of a failure in the official client."""

    def called() -> Any:
        with anthropic.Anthropic(base_url=proxy.url, api_key="k", max_retries=0) as client:
            hello: Any = [{"role": "user", "content": "hi"}]
            return client.messages.create(model="tiny", max_tokens=9, messages=hello, **fields)

    with pytest.raises(anthropic.APIStatusError) as failure:
        await asyncio.to_thread(called)
    return failure.value


async def test_our_own_errors_are_told_by_the_official_client(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(limits__max_request_bytes=2000)
    model.extra = speaking()
    missing = await the_client_says(proxy, extra_headers=ONLY)
    assert missing.status_code == 504
    assert "only-if-cached" in missing.message
    large = await the_client_says(proxy, system="x" * 2000)
    assert large.status_code == 413
    assert "limits.max_request_bytes" in large.message


async def test_an_upstream_that_is_away_is_told_by_the_official_client(start: StartProxy) -> None:
    proxy = await start(wait=False, url="http://127.0.0.1:9")
    gone = await the_client_says(proxy)
    assert gone.status_code == 502
    assert "the LLM server cannot be reached" in gone.message


@pytest.mark.parametrize("keys", [True, False])
async def test_a_server_that_speaks_messages_alone_is_asked_there(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, keys: bool
) -> None:
    monkeypatch.setattr(sharing, "CONFIRMED_S", 0.0)

    async def alone(request: web.Request) -> web.StreamResponse | None:
        if request.method == "POST" and request.path != PATH:
            return web.json_response(ERROR, status=404)
        return await speaking_always(request)

    speaking_always = speaking()
    model.extra = keyed("mine", "other", respond=speaking(), chat=False) if keys else alone
    proxy = await start()
    assert proxy.services.backends.first.gate.shared is not keys
    answers = [await ask(proxy, headers=headers) for headers in (MINE, MINE, OTHER)]
    assert [answer.outcome for answer in answers] == ["MISS", "HIT", "MISS" if keys else "HIT"]
    assert (await ask(proxy, headers={"X-Api-Key": "wrong"})).status == (401 if keys else 200)
