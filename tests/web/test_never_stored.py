"""Answers that must not be kept: each reason with a server that really behaves so. The client always gets its bytes."""

from __future__ import annotations

import gzip
import json
from typing import Any

import aiohttp
import pytest

from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import (
    FakeModel,
    Respond,
    chat_body,
    chat_events,
    chunk,
    error,
    raw,
    reply,
    sse,
    streamed,
)


def whole(body: Any) -> Respond:
    return raw(json.dumps(body).encode())


def no_finish() -> dict[str, Any]:
    return chat_body(finish_reason=None)


EMPTY_STREAM = [chunk({"role": "assistant", "content": None}), chunk({}, finish="stop")]
ERROR_EVENT = {"error": {"message": "rkllm_run failed", "type": "internal_error"}}
ZERO = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
TIMED_OUT = "Aborted inference by Timeout (300 seconds). Try again."
NO_TOKENS = {**ZERO, "cached_prompts": None, "cache_hit": False}

CASES: dict[str, tuple[str, bool, Respond]] = {
    "500": ("status", False, raw(error(500, "boom", "server_error").body, status=500)),  # type: ignore[arg-type]
    "404 to a stream": ("status", True, raw(b"{}", status=404)),
    "redirect": ("status", False, raw(b"", status=302, headers={"Location": "/elsewhere"})),
    "error in 200": ("error-in-200", False, whole({"error": {"message": "no", "code": 500}})),
    "error beside choices": ("error-in-200", False, whole({**chat_body(), "error": "out of memory"})),
    "not JSON": ("not-json", False, raw(b"<html>oops</html>", kind="text/html")),
    "NaN": ("not-json", False, raw(json.dumps({**chat_body(), "x": float("nan")}).encode())),
    "cut JSON": ("not-json", False, raw(json.dumps(chat_body()).encode()[:-5])),
    "not an object": ("not-understood", False, whole([1])),
    "no choices": ("not-understood", False, whole({"object": "chat.completion"})),
    "empty choices": ("empty", False, whole({**chat_body(), "choices": []})),
    "empty content": ("empty", False, whole(chat_body(""))),
    "blank content": ("empty", False, whole(chat_body(" \n"))),
    "null content": ("empty", False, whole(chat_body(None))),
    "reasoning alone": ("empty", False, whole(chat_body("", message={"reasoning_content": "hmm"}))),
    "empty stream": ("empty", True, streamed(sse(*EMPTY_STREAM))),
    "zero tokens": ("zero-tokens", False, whole(chat_body(usage=ZERO))),
    "zero tokens predicted": ("zero-tokens", False, whole({**chat_body(), "timings": {"predicted_n": 0}})),
    "no finish reason": ("no-finish-reason", False, whole(no_finish())),
    "stream without finish reason": ("no-finish-reason", True, streamed(sse(*chat_events("hi")[:-1]))),
    "strange finish reason": ("finish-reason", False, whole(chat_body(finish_reason="abort"))),
    "content filter": ("finish-reason", False, whole(chat_body(finish_reason="content_filter"))),
    "time-out text": ("aborted-by-server", False, whole(chat_body(TIMED_OUT))),
    "time-out text behind the end of another answer": (
        "aborted-by-server",
        False,
        whole(chat_body(f" end{TIMED_OUT}")),
    ),
    "time-out text in a stream": (
        "aborted-by-server",
        True,
        streamed(sse(*chat_events("Aborted inference", TIMED_OUT[17:]))),
    ),
    "time-out without a text (rkllama)": (
        "empty",
        True,
        streamed(sse(chunk({"role": "assistant", "content": ""}, finish="stop"), chunk(None, usage=ZERO))),
    ),
    "run that failed (RockchipLlama)": (
        "empty",
        False,
        whole(chat_body("", message={"name": None}, usage=NO_TOKENS)),
    ),
    "run that failed in a stream (RockchipLlama)": (
        "error-in-stream",
        True,
        streamed(sse(chunk({"content": "half"}, usage=None), ERROR_EVENT, done=False)),
    ),
    "error before the first word of a stream": ("error-in-stream", True, streamed(sse(ERROR_EVENT, done=False))),
    "error in the stream, and its end mark": ("error-in-stream", True, streamed(sse(*chat_events("a"), ERROR_EVENT))),
    "zero tokens in a stream": ("zero-tokens", True, streamed(sse(*chat_events("a"), chunk(None, usage=ZERO)))),
    "blank stream": ("empty", True, streamed(sse(*chat_events(" ", "\n")))),
    "error as a text in 200": ("error-in-200", False, whole({"error": "Failed to load model 'nope'"})),
    "error in 200 to a stream": ("error-in-200", True, whole({"error": {"message": "busy", "code": 503}})),
    "error in 200 as a stream": (
        "error-in-stream",
        True,
        raw(json.dumps({"error": "busy"}, indent=2).encode(), kind="text/event-stream"),
    ),
    "error of another shape in 200": ("not-understood", False, whole({"object": "error", "message": "busy"})),
    "detail in 200 to a stream": ("not-understood", True, whole({"detail": "Model not found"})),
    "text in 200": ("not-json", False, raw(b"Internal Server Error", kind="text/plain")),
    "text in 200 to a stream": ("error-in-stream", True, raw(b"Internal Server Error", kind="text/plain")),
    "error in the stream": ("error-in-stream", True, streamed(sse(chat_events("hi")[0], ERROR_EVENT, done=False))),
    "error line": (
        "error-in-stream",
        True,
        streamed(sse(*chat_events("a"), done=False), b'error: {"code":500}\n\n', sse()),
    ),
    "no [DONE]": ("incomplete", True, streamed(sse(*chat_events("hi"), done=False))),
    "nothing at all": ("incomplete", True, streamed()),
    "stream that is no JSON": ("not-understood", True, streamed(b"data: {oops\n\n", sse())),
    "stream that is no UTF-8": ("not-understood", True, streamed(b"data: \xff\n\n", sse())),
    "encoded": (
        "content-encoding",
        False,
        raw(gzip.compress(json.dumps(chat_body()).encode()), headers={"Content-Encoding": "gzip"}),
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_it_is_relayed_and_not_kept(proxy: Proxy, model: FakeModel, case: str) -> None:
    reason, stream, model.respond = CASES[case]
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": stream}
    async with aiohttp.ClientSession(auto_decompress=False) as plain:
        answers: list[Any] = []
        outcomes: list[str | None] = []
        for url in (model.url, proxy.url, proxy.url):
            post = plain.post(f"{url}/v1/chat/completions", json=body, allow_redirects=False)
            async with post as response:
                answers.append((response.status, response.headers.get("Content-Type"), await response.read()))
                outcomes.append(response.headers.get("X-Cache"))
            await proxy.settled()
    assert answers[1] == answers[2] == answers[0]
    assert outcomes == [None, "MISS", "MISS"]
    assert (await proxy.stats())["not_stored"] == {reason: 2}


async def test_a_connection_cut_in_the_middle_is_passed_on_as_such(proxy: Proxy, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("half an")[:2], done=False), hang_up=True)
    for _ in range(2):
        with pytest.raises(aiohttp.ClientPayloadError):
            await proxy.chat("x", stream=True)
        await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"upstream-gone": 2}


async def test_a_length_that_was_promised_and_not_kept_is_not_stored(proxy: Proxy, model: FakeModel) -> None:
    async def short(model: FakeModel, request: Any, asked: Any) -> Any:
        from aiohttp import web

        body = json.dumps(chat_body()).encode()
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(body) + 9)}
        )
        await response.prepare(request)
        await response.write(body)
        request.transport.abort()
        return response

    model.respond = short
    with pytest.raises(aiohttp.ClientError):
        await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"upstream-gone": 1}


async def test_an_answer_above_the_limit_is_relayed_whole_and_not_kept(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__max_answer_bytes=4096)
    pieces = ["word " * 100] * 50
    model.respond = reply(*pieces)
    for stream in (True, False):
        answer = await proxy.chat("x", stream=stream)
        assert answer.body.count(b"word ") == 5000
        await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"too-large": 2}


async def test_a_client_that_leaves_gets_nothing_stored(proxy: Proxy, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("a")[:2], done=False), sse(), hold_after=1)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
    await eventually(lambda: model.gone == 1)
    await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"client-gone": 1}
    assert (await proxy.stats())["cache.size"] == 0


async def test_a_failure_does_not_hide_the_next_good_answer(proxy: Proxy, model: FakeModel) -> None:
    model.respond = whole(chat_body(""))
    await proxy.chat("x")
    await proxy.settled()
    model.respond = reply("good")
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"


# How servers for Rockchip NPUs tell good answers: an id for each chunk, the role in every delta or in none, a usage of
# null, a usage nobody asked for, the wrong object, counts of words, media types of other things.

CACHE_HIT = {
    "prompt_tokens": 40,
    "completion_tokens": 3,
    "total_tokens": 43,
    "cached_prompts": ["s"],
    "cache_hit": True,
}
SPEEDS = {
    "prompt_tokens": 16,
    "completion_tokens": 3,
    "total_tokens": 19,
    "tokens_per_second": 7.5,
    "eval_duration": 0.4,
}
SAID = ("It is", " a 🦙", ".")


def one(choice: dict[str, Any], number: int = 0, kind: str = "chat.completion.chunk", **fields: Any) -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}", "object": kind, "created": number, "model": "q", "choices": [choice], **fields}


def rockchip_chat() -> bytes:
    said = [one({"index": 0, "delta": {"content": text}, "finish_reason": None}, usage=None) for text in SAID]
    return sse(*said, one({"index": 0, "delta": {}, "finish_reason": "stop"}, usage=CACHE_HIT))


def rockchip_raw() -> bytes:
    kind = "text_completion"
    texts = [{"index": 0, "text": text, "logprobs": None, "finish_reason": None} for text in SAID]
    end = {"index": 0, "text": "", "finish_reason": "length"}
    return sse(*(one(choice, kind=kind, usage=None) for choice in texts), one(end, kind=kind, usage=CACHE_HIT))


def rkllama_chat() -> bytes:
    deltas = [{"content": text, "role": "assistant"} for text in SAID]
    said = [one({"index": 0, "delta": delta, "finish_reason": None}, n) for n, delta in enumerate(deltas)]
    end = one({"index": 0, "delta": {"content": "", "role": "assistant"}, "finish_reason": "stop"}, 7)
    return sse(*said, end, {**one({}, 8), "choices": [], "usage": SPEEDS})


def rkllama_raw() -> bytes:
    said = [one({"index": 0, "text": text, "finish_reason": None}, n) for n, text in enumerate(SAID)]
    end = one({"index": 0, "text": "", "finish_reason": "stop"}, 7)
    return sse(*said, end, {**one({}, 8), "choices": [], "usage": SPEEDS})


def flask_chat() -> bytes:
    deltas = [{"role": "assistant"}, *({"content": text} for text in SAID)]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
    ]
    end = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop"}
    return sse(*(one(choice, n) for n, choice in enumerate([*choices, end])))


def with_heartbeats(wire: bytes) -> bytes:
    return b": keepalive\n\n" + wire.replace(b"\n\n", b"\n\n: keepalive\n\n", 2)


def message(usage: dict[str, Any], **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "".join(SAID), **fields}, "finish_reason": "stop"}
    return json.dumps(one(choice, kind="chat.completion", usage=usage)).encode()


def text_answer() -> bytes:
    choice = {"text": "".join(SAID), "index": 0, "finish_reason": "length"}
    return json.dumps(one(choice, kind="text_completion", usage=CACHE_HIT)).encode()


CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
EVENTS = "text/event-stream; charset=utf-8"
KEPT: dict[str, tuple[str, bool, Respond]] = {
    "RockchipLlama, chat": (CHATS, False, raw(message(CACHE_HIT, name=None))),
    "RockchipLlama, chat stream": (CHATS, True, raw(rockchip_chat(), kind=EVENTS)),
    "RockchipLlama, completion": (TEXTS, False, raw(text_answer())),
    "RockchipLlama, completion stream": (TEXTS, True, raw(rockchip_raw(), kind=EVENTS)),
    "rkllama, chat": (CHATS, False, raw(message(SPEEDS))),
    "rkllama, chat stream": (CHATS, True, raw(rkllama_chat(), kind=EVENTS)),
    "rkllama, completion stream": (TEXTS, True, raw(rkllama_raw(), kind=EVENTS)),
    "vendor demo, chat": (CHATS, False, raw(message(SPEEDS))),
    "vendor demo, chat stream": (CHATS, True, raw(flask_chat(), kind="text/event-stream")),
    "stream of another media type": (CHATS, True, raw(rkllama_chat(), kind="text/plain")),
    "stream with heartbeats": (CHATS, True, raw(with_heartbeats(rkllama_chat()), kind=EVENTS)),
}


def told(path: str, answer: Answer) -> dict[str, Any]:
    """What an official client makes of an answer in either form."""
    if not answer.body.startswith((b"data: ", b": ")):
        (choice,) = answer.json["choices"]
        text = choice["text"] if path == TEXTS else choice["message"]["content"]
        role = None if path == TEXTS else choice["message"]["role"]
        return {"text": text, "role": role, "end": choice["finish_reason"], "usage": answer.json["usage"]}
    lines = [line for line in answer.body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice.get("delta", choice) for choice in choices]
    return {
        "text": "".join(delta.get("text" if path == TEXTS else "content") or "" for delta in deltas),
        # Clients of chats take the assistant's part for granted.
        "role": None if path == TEXTS else "assistant",
        "end": next(choice["finish_reason"] for choice in choices if choice["finish_reason"]),
        "usage": next((event["usage"] for event in events if event.get("usage")), None),
    }


@pytest.mark.parametrize("case", KEPT)
async def test_a_good_answer_is_kept_however_strangely_it_is_told(proxy: Proxy, model: FakeModel, case: str) -> None:
    path, stream, model.respond = KEPT[case]
    asked: dict[str, Any] = {"prompt": "x"} if path == TEXTS else {"messages": [{"role": "user", "content": "x"}]}
    body = {**asked, "temperature": 0, "stream": stream}
    first = await proxy.post(path, json=body)
    assert first.outcome == "MISS"
    await proxy.settled()
    got = told(path, first)
    assert got["text"] == "".join(SAID)
    again = await proxy.post(path, json=body)
    # A stream tells its usage to those who ask for it, and a whole answer to everybody.
    assert (again.outcome, told(path, again)) == ("HIT", {**got, "usage": None} if stream else got)
    if got["usage"] is not None:
        for form in ({"stream": False}, {"stream": True, "stream_options": {"include_usage": True}}):
            other = await proxy.post(path, json={**body, **form})
            assert (other.outcome, told(path, other)) == ("HIT", got)
    assert len(model.generations) == 1


async def test_a_time_out_text_in_place_of_a_raw_completion_is_not_kept(proxy: Proxy, model: FakeModel) -> None:
    model.respond = whole(one({"text": TIMED_OUT, "index": 0, "finish_reason": "stop"}, kind="text_completion"))
    for _ in range(2):
        assert (await proxy.post(TEXTS, json={"prompt": "x", "temperature": 0})).outcome == "MISS"
        await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"aborted-by-server": 2}
