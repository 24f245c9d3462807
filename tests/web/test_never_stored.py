"""Answers that must not be kept: each reason with a server that really behaves so. The client always gets its bytes."""

from __future__ import annotations

import gzip
import json
from typing import Any

import aiohttp
import pytest

from tests.conftest import Proxy, StartProxy, eventually
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
    "time-out text": ("aborted-by-server", False, whole(chat_body("Aborted inference by Timeout (300 seconds). Try"))),
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
