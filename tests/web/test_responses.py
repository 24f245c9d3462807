"""`/v1/responses` through the running proxy: hits in both forms, what goes by, and what is never stored."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, Seen, is_nearhits_own, send

PATHS = ("/v1/responses", "/responses")
USAGE = {
    "input_tokens": 3,
    "output_tokens": 4,
    "total_tokens": 7,
    "input_tokens_details": {"cached_tokens": 2},
}
ASKED = "How do I reset the router in the living room?"
ALIKE = "hey, how can I reset the router in the living room? thanks!"
PROPS = {"media_marker": "run-1", "model_path": "/a.gguf", "default_generation_settings": {"params": {}}}

Extra = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def message(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    return {"type": "message", "status": "completed", "id": "msg_up", "role": "assistant", "content": [part]}


def answer(*output: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An answer as llama.cpp sends it."""
    said = list(output) or [message("Hello there.")]
    base = {"completed_at": 2, "created_at": 1, "id": "resp_up", "model": "tiny", "object": "response", "output": said}
    return {**base, "status": "completed", "usage": USAGE, **changes}


def events(*pieces: str) -> list[dict[str, Any]]:
    """The events of a stream as llama.cpp sends them."""
    begun = {"id": "resp_up", "object": "response", "status": "in_progress"}
    whole = message("".join(pieces))
    final = {name: value for name, value in answer(whole).items() if name != "completed_at"}
    return [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "item": {**whole, "status": "in_progress", "content": []}},
        {"type": "response.content_part.added", "item_id": "msg_up", "part": {"type": "output_text", "text": ""}},
        *({"type": "response.output_text.delta", "item_id": "msg_up", "delta": piece} for piece in pieces),
        {"type": "response.output_text.done", "item_id": "msg_up", "text": "".join(pieces)},
        {"type": "response.output_item.done", "item": whole},
        {"type": "response.completed", "response": final, "timings": {"predicted_n": 4}},
    ]


def wire(*told: dict[str, Any]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in told)


def speaking(*pieces: str) -> Extra:
    """Answer calls with this text, in the form that they ask for; without text, with their number."""
    calls = 0

    async def respond(request: web.Request) -> web.StreamResponse | None:
        nonlocal calls
        if request.path not in PATHS:
            return None
        calls += not is_nearhits_own(request.headers, await request.read())
        said = pieces or ("answer ", str(calls))
        if (await request.json()).get("stream"):
            return await send(request, [wire(event) for event in events(*said)])
        return web.json_response(answer(message("".join(said))))

    return respond


def answering(body: bytes, kind: str = "application/json", status: int = 200) -> Extra:
    """Answer calls with exactly these bytes."""

    async def respond(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=body, content_type=kind, status=status) if request.path in PATHS else None

    return respond


def whole(body: Any) -> Extra:
    return answering(json.dumps(body).encode())


def asked(model: FakeModel) -> list[Seen]:
    mine = [seen for seen in model.seen if seen.target in PATHS]
    return [seen for seen in mine if not is_nearhits_own(seen.headers, seen.body)]


async def ask(
    proxy: Proxy, said: Any = "hi", *, path: str = PATHS[0], headers: Mapping[str, str] | None = None, **fields: Any
) -> Answer:
    body = {"model": "tiny", "temperature": 0, "store": False, "input": said, **fields}
    given = await proxy.post(path, json=body, headers=headers)
    await proxy.settled()
    return given


def told(given: Answer) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in given.body.decode().split("\n") if "data: " in line]


def text_of(given: Answer) -> str:
    """The text of an answer in either form."""
    if not given.headers["Content-Type"].startswith("text/event-stream"):
        return str(given.json["output"][-1]["content"][0]["text"])
    return "".join(event["delta"] for event in told(given) if event["type"] == "response.output_text.delta")


async def test_a_repeat_is_a_hit_with_an_id_and_times_of_its_own(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking()
    before = int(time.time())
    miss, hit, again = [await ask(proxy, instructions="Be brief.") for _ in range(3)]
    assert [given.outcome for given in (miss, hit, again)] == ["MISS", "HIT", "HIT"]
    assert hit.headers["Content-Type"] == "application/json; charset=utf-8"
    own = {"id", "created_at", "completed_at"}
    assert {k: v for k, v in hit.json.items() if k not in own} == {k: v for k, v in miss.json.items() if k not in own}
    assert len({given.json["id"] for given in (miss, hit, again)}) == 3
    assert hit.json["id"].startswith("resp_")
    assert before <= hit.json["created_at"] == hit.json["completed_at"]
    assert len(asked(model)) == 1


async def test_another_call_is_none(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking()
    await ask(proxy)
    others: list[dict[str, Any]] = [{"max_output_tokens": 5}, {"instructions": "Be brief."}, {"truncation": "auto"}]
    for changes in others:
        assert (await ask(proxy, **changes)).outcome == "MISS"
    assert (await ask(proxy, [{"role": "user", "content": "hi"}])).outcome == "MISS"
    same: list[dict[str, Any]] = [{"metadata": {"a": "b"}}, {"user": "me"}, {"stream": True}]
    for changes in same:
        assert (await ask(proxy, **changes)).outcome == "HIT"


@pytest.mark.parametrize("streams_first", [False, True])
async def test_a_stream_and_a_whole_answer_share_an_entry(proxy: Proxy, model: FakeModel, streams_first: bool) -> None:
    model.extra = speaking("Hello", " there", ".")
    await ask(proxy, stream=streams_first)
    streamed, plain = await ask(proxy, stream=True), await ask(proxy)
    assert (streamed.outcome, plain.outcome) == ("HIT", "HIT")
    assert text_of(streamed) == text_of(plain) == "Hello there."
    assert plain.json["usage"] == told(streamed)[-1]["response"]["usage"] == USAGE
    assert ("completed_at" in plain.json) == (not streams_first)
    assert streamed.headers["Content-Type"] == "text/event-stream"
    assert told(streamed)[-1]["type"] == "response.completed"
    assert b"[DONE]" not in streamed.body
    assert len({event["response"]["id"] for event in told(streamed) if "response" in event}) == 1
    assert len(asked(model)) == 1


async def test_the_stream_of_a_miss_passes_byte_for_byte(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking("Hello", " there.")
    miss = await ask(proxy, stream=True, stream_options={"include_obfuscation": False})
    assert miss.body == wire(*events("Hello", " there."))


async def test_both_paths_share_entries(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking()
    assert [(await ask(proxy, path=path)).outcome for path in PATHS] == ["MISS", "HIT"]


@pytest.mark.parametrize("parts", [False, True])
async def test_the_same_question_in_other_words_is_near(start: StartProxy, model: FakeModel, parts: bool) -> None:
    def said(text: str) -> Any:
        return [{"role": "user", "content": [{"type": "input_text", "text": text}]}] if parts else text

    proxy = await start()
    await eventually(lambda: proxy.services.near is not None)
    model.extra = speaking()
    first, alike = await ask(proxy, said(ASKED)), await ask(proxy, said(ALIKE), stream=True)
    assert (first.outcome, alike.outcome) == ("MISS", "NEAR")
    assert text_of(alike) == text_of(first)
    assert (await ask(proxy, said(ALIKE), instructions="Be brief.")).outcome == "MISS"
    assert (await ask(proxy, said(ALIKE), include=["message.output_text.logprobs"])).outcome == "MISS"


CALL = {"type": "function_call", "status": "completed", "arguments": '{"room":"hall"}', "call_id": "fc_1", "name": "go"}
REFUSAL = {**message(""), "content": [{"type": "refusal", "refusal": "No."}]}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
HALF = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


@pytest.mark.parametrize(
    "body", [answer(THOUGHT, CALL), answer(REFUSAL), answer(**HALF)], ids=["acts", "refuses", "is cut"]
)
async def test_an_answer_that_acts_or_was_cut_is_for_its_own_words_alone(
    start: StartProxy, model: FakeModel, body: dict[str, Any]
) -> None:
    proxy = await start()
    await eventually(lambda: proxy.services.near is not None)
    model.extra = whole(body)
    assert [(await ask(proxy, said)).outcome for said in (ASKED, ASKED, ALIKE)] == ["MISS", "HIT", "MISS"]


async def test_a_later_turn_that_repeats_a_replayed_call_hits_too(proxy: Proxy, model: FakeModel) -> None:
    model.extra = whole(answer(CALL))
    first, replay = await ask(proxy), await ask(proxy)
    assert (replay.outcome, replay.json["output"]) == ("HIT", first.json["output"])
    model.extra = speaking()
    result = {"type": "function_call_output", "call_id": "fc_1", "output": "done"}
    turns = [[{"role": "user", "content": "hi"}, *one.json["output"], result] for one in (first, replay)]
    assert [(await ask(proxy, turn)).outcome for turn in turns] == ["MISS", "HIT"]


@pytest.mark.parametrize(
    ("said", "fields", "reason"),
    [
        ("hi", {"previous_response_id": "resp_1"}, "previous-response"),
        ("hi", {"prompt": {"id": "pmpt_1"}}, "previous-response"),
        ([{"type": "item_reference", "id": "msg_1"}, {"role": "user", "content": "hi"}], {}, "previous-response"),
        ("hi", {"conversation": {"id": "conv_1"}}, "conversation"),
        ("hi", {"background": True}, "background"),
        ("hi", {"store": True}, "store-true"),
        (["hi"], {}, "not-understood"),
        (7, {}, "not-understood"),
    ],
)
async def test_what_refers_to_what_the_server_keeps_goes_by(
    proxy: Proxy, model: FakeModel, said: Any, fields: dict[str, Any], reason: str
) -> None:
    model.extra = speaking()
    first, second = await ask(proxy, said, **fields), await ask(proxy, said, **fields)
    assert (first.outcome, second.outcome) == ("BYPASS", "BYPASS")
    assert first.headers["Cache-Status"] == f"nearhit; fwd=bypass; detail={reason}"
    assert asked(model)[0].json == {"model": "tiny", "temperature": 0, "store": False, "input": said, **fields}
    assert len(asked(model)) == 2


async def test_a_server_that_may_keep_answers_is_asked_unless_told_not_to(proxy: Proxy, model: FakeModel) -> None:
    model.extra = speaking()
    for store in (None, None):
        given = await ask(proxy, store=store)
        assert given.headers["Cache-Status"] == "nearhit; fwd=bypass; detail=store-true"
    assert [(await ask(proxy, store=False)).outcome for _ in range(2)] == ["MISS", "HIT"]


async def test_llama_cpp_keeps_nothing_so_that_nothing_need_be_said(start: StartProxy, model: FakeModel) -> None:
    model.props, model.extra = PROPS, speaking()
    proxy = await start()
    body = {"model": "tiny", "temperature": 0, "input": "hi"}
    outcomes = []
    for _ in range(2):
        outcomes.append((await proxy.post(PATHS[0], json=body)).outcome)
        await proxy.settled()
    assert [*outcomes, (await ask(proxy, store=False)).outcome] == ["MISS", "HIT", "HIT"]


FAILED = {"type": "response.failed", "response": answer(status="failed", error={"code": "x", "message": "no"})}
ERROR = {"error": {"code": 500, "message": "no", "type": "server_error"}}
SSE = "text/event-stream"
SEARCH = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
SEARCHED: list[dict[str, Any]] = [
    events()[0],
    {"type": "response.output_item.added", "item": {**SEARCH, "status": "in_progress"}},
    {"type": "response.web_search_call.completed", "item_id": "ws_1"},
    {"type": "response.output_item.done", "item": SEARCH},
    *events("It is 8.17.")[2:-1],
    {"type": "response.completed", "response": answer(SEARCH, message("It is 8.17."))},
]
"""A stream as servers send it that look things up although the call names no tool."""

CASES: dict[str, tuple[str, bool, Extra]] = {
    "500": ("status", False, answering(b"{}", status=500)),
    "error in 200": ("error-in-200", False, whole(answer(error={"code": "server_error", "message": "no"}))),
    "failed": ("finish-reason", False, whole(answer(status="failed"))),
    "in progress": ("incomplete", False, whole(answer(status="in_progress"))),
    "filtered": (
        "finish-reason",
        False,
        whole(answer(status="incomplete", incomplete_details={"reason": "content_filter"})),
    ),
    "empty": ("empty", False, whole(answer(message(" ")))),
    "no output": ("not-understood", False, whole({"detail": "busy"})),
    "zero tokens": ("zero-tokens", False, whole(answer(usage={**USAGE, "output_tokens": 0}))),
    "the server acted": ("finish-reason", False, whole(answer({"type": "mcp_call", "id": "mcp_1"}, message("Sent.")))),
    "the server searched unasked": ("finish-reason", False, whole(answer(SEARCH, message("It is 8.17.")))),
    "the server searched unasked in a stream": ("finish-reason", True, answering(wire(*SEARCHED), SSE)),
    "failed in the stream": ("error-in-stream", True, answering(wire(*events("a")[:5], FAILED), SSE)),
    "error in the stream": (
        "error-in-stream",
        True,
        answering(wire(*events("a")[:5]) + b"data: %b\n\n" % json.dumps(ERROR).encode(), SSE),
    ),
    "no end": ("incomplete", True, answering(wire(*events("Hello", " there.")[:-1]), SSE)),
    "another end": ("not-understood", True, answering(wire(*events("Hello")[:-1], events("Bye")[-1]), SSE)),
}


@pytest.mark.parametrize("case", CASES)
async def test_it_is_relayed_and_not_kept(proxy: Proxy, model: FakeModel, case: str) -> None:
    reason, stream, model.extra = CASES[case]
    first, second = await ask(proxy, stream=stream), await ask(proxy, stream=stream)
    async with proxy.session.post(model.url + PATHS[0], json={"input": "hi"}) as direct:
        assert first.body == second.body == await direct.read()
    assert (first.outcome, second.outcome) == ("MISS", "MISS")
    assert (await proxy.stats())["not_stored"] == {reason: 2}


async def test_nobody_sees_what_another_said_of_himself(proxy: Proxy, model: FakeModel) -> None:
    async def echo(request: web.Request) -> web.StreamResponse | None:
        if request.path not in PATHS:
            return None
        said = await request.json()
        return web.json_response(answer(metadata=said["metadata"], user=said["user"]))

    model.extra = echo
    mine = await ask(proxy, metadata={"ticket": "4711"}, user="anna")
    other = await ask(proxy, metadata={"ticket": "4712"}, user="bert")
    assert (mine.json["metadata"], mine.json["user"]) == ({"ticket": "4711"}, "anna")
    assert (other.outcome, other.json["metadata"], other.json["user"]) == ("HIT", {}, None)


async def test_calls_in_flight_share_one_request_in_both_forms(proxy: Proxy, model: FakeModel) -> None:
    speak = speaking("Hello", " there.")

    async def held(request: web.Request) -> web.StreamResponse | None:
        if request.path in PATHS:
            await model.release.wait()
        return await speak(request)

    model.extra = held
    asking = [asyncio.create_task(ask(proxy, stream=stream)) for stream in (True, True, False)]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    model.release.set()
    answers = await asyncio.gather(*asking)
    assert sorted(given.outcome for given in answers) == ["JOINED", "JOINED", "MISS"]
    assert {text_of(given) for given in answers} == {"Hello there."}
    assert len(asked(model)) == 1


@pytest.mark.parametrize(
    "body",
    [answer(THOUGHT, message("Hi.")), answer(CALL, {**CALL, "call_id": "fc_2"}), answer(message("a"), REFUSAL)],
    ids=["reasoning", "calls", "refusal"],
)
async def test_the_official_client_reads_a_replay_as_it_reads_the_answer(
    proxy: Proxy, model: FakeModel, body: dict[str, Any]
) -> None:
    for number, item in enumerate(body["output"]):
        item["id"] = f"item_{number}"
    model.extra = whole(body)

    def read() -> tuple[Any, Any, list[str]]:
        with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
            called: dict[str, Any] = {"model": "tiny", "input": "hi", "temperature": 0, "store": False}
            plain = client.responses.create(**called)
            with client.responses.stream(**called) as stream:
                final = stream.get_final_response()
            return plain, final, [event.type for event in client.responses.create(**called, stream=True)]

    await ask(proxy)
    plain, final, kinds = await asyncio.to_thread(read)
    assert (await proxy.stats())["requests"]["HIT"] == 3
    assert [item.to_dict() for item in plain.output] == body["output"]
    assert [(item.type, item.id) for item in final.output] == [(item.type, item.id) for item in plain.output]
    assert final.output_text == plain.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
