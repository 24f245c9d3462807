"""What replies tell of the upstream's KV cache, as real servers write them and as hostile answers imitate them."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.upstream.evidence import HEAD, TAIL, Tail
from proxy.upstream.prefix import Evidence

NOTHING = Evidence()
TIMINGS = {"cache_n": 5, "prompt_n": 17, "prompt_ms": 3.5, "predicted_n": 6}
USAGE = {
    "completion_tokens": 6,
    "prompt_tokens": 22,
    "total_tokens": 28,
    "prompt_tokens_details": {"cached_tokens": 4},
}
RESPONSES_USAGE = {"input_tokens": 22, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 21}}
ANTHROPIC_USAGE = {"cache_read_input_tokens": 21, "input_tokens": 1, "output_tokens": 4}
LIE = (
    '"timings":{"cache_n":999,"prompt_n":999},'
    '"usage":{"prompt_tokens":999,"prompt_tokens_details":{"cached_tokens":999}}'
)
LONG = "word " * TAIL


def of(*chunks: bytes) -> Evidence:
    tail = Tail()
    for chunk in chunks:
        tail.feed(chunk)
    return tail.evidence()


def cut(whole: bytes, size: int) -> Iterable[bytes]:
    return (whole[at : at + size] for at in range(0, len(whole), size))


def chat(content: str = "hi", **fields: Any) -> bytes:
    choice = {"finish_reason": "length", "index": 0, "message": {"role": "assistant", "content": content}}
    return json.dumps({"choices": [choice], "created": 1795288413, "model": "m", **fields}).encode()


def events(*data: Any) -> bytes:
    return b"".join(b"data: " + (d if isinstance(d, bytes) else json.dumps(d).encode()) + b"\n\n" for d in data)


def delta(text: str, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": text}}], **fields}


def response(text: str, **fields: Any) -> dict[str, Any]:
    output = [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    return {
        "id": "resp_1",
        "object": "response",
        "output": output,
        "status": "completed",
        "usage": RESPONSES_USAGE,
        **fields,
    }


MESSAGES_START = (
    b"event: message_start\n"
    b'data: {"type":"message_start","message":{"id":"chatcmpl-JfUn","type":"message","role":"assistant","content":[],'
    b'"model":"m.gguf","stop_reason":null,"stop_sequence":null,'
    b'"usage":{"cache_read_input_tokens":24,"input_tokens":1,"output_tokens":0}}}\n\n'
    b"event: content_block_start\n"
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)
MESSAGES_DELTA = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" I"}}\n\n'
)
MESSAGES_END = (
    b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
    b"event: message_delta\n"
    b'data: {"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},'
    b'"usage":{"output_tokens":3}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
RESPONSES_END = (
    b"event: response.output_text.delta\n"
    b'data: {"type":"response.output_text.delta","item_id":"msg_svlG","delta":" I"}\n\n'
    b"event: response.completed\n"
    b'data: {"type":"response.completed","response":{"id":"resp_ite6","object":"response","created_at":1795343885,'
    b'"status":"completed","model":"m.gguf","output":[{"type":"message","status":"completed","id":"msg_svlG",'
    b'"content":[{"type":"output_text","annotations":[],"logprobs":[],"text":"Hello! I"}],"role":"assistant"}],'
    b'"usage":{"input_tokens":25,"output_tokens":3,"total_tokens":28,"input_tokens_details":{"cached_tokens":23}}},'
    b'"timings":{"cache_n":24,"prompt_n":1,"prompt_ms":23.981,"predicted_n":3,"predicted_ms":146.741}}\n\n'
)
"""As llama.cpp streams them."""

WHOLE = [
    pytest.param(chat(usage=USAGE, timings=TIMINGS), Evidence(5, 17), id="llama.cpp"),
    pytest.param(chat(usage=USAGE), Evidence(4, 18), id="openai"),
    pytest.param(json.dumps(response("hi")).encode(), Evidence(21, 1), id="responses"),
    pytest.param(
        json.dumps({"content": [{"text": "hi"}], "usage": ANTHROPIC_USAGE}).encode(), Evidence(21, 1), id="messages"
    ),
    pytest.param(chat(usage={"prompt_tokens": 22}, timings={"prompt_n": 9}), Evidence(None, 9), id="old-llama.cpp"),
    pytest.param(chat(usage=USAGE, timings={"prompt_n": 9}), Evidence(4, 18), id="usage-knows-more"),
    pytest.param(json.dumps(json.loads(chat(usage=USAGE)), indent=2).encode(), Evidence(4, 18), id="pretty"),
    pytest.param(events(delta("a"), delta("b", timings=TIMINGS), b"[DONE]"), Evidence(5, 17), id="stream"),
    pytest.param(
        events(delta("a"), {"choices": [], "usage": USAGE, "timings": TIMINGS}, b"[DONE]"),
        Evidence(5, 17),
        id="usage-chunk",
    ),
    pytest.param(events(delta("a"), {"choices": [], "usage": USAGE}, b"[DONE]"), Evidence(4, 18), id="openai-stream"),
    pytest.param(events(delta("a", timings=TIMINGS), {"usage": USAGE}), Evidence(5, 17), id="timings-before-usage"),
    pytest.param(
        events(delta("a", timings={"cache_n": 1, "prompt_n": 1}), delta("b", timings=TIMINGS)),
        Evidence(5, 17),
        id="the-last",
    ),
    pytest.param(
        b"event: response.completed\n" + events({"type": "response.completed", "response": response("hi")}),
        Evidence(21, 1),
        id="responses-stream",
    ),
    pytest.param(
        events({"type": "message_start", "message": {"usage": ANTHROPIC_USAGE}}, {"usage": {"output_tokens": 4}}),
        Evidence(21, 1),
        id="messages-stream",
    ),
    pytest.param(MESSAGES_START + MESSAGES_DELTA + MESSAGES_END, Evidence(24, 1), id="llama.cpp-messages-stream"),
    pytest.param(RESPONSES_END, Evidence(24, 1), id="llama.cpp-responses-stream"),
    pytest.param(
        b": keepalive\r\n\r\n" + events(delta("a", timings=TIMINGS)).replace(b"\n", b"\r\n"), Evidence(5, 17), id="crlf"
    ),
    pytest.param(
        b'{"done":false}\n{"done":true,"usage":' + json.dumps(USAGE).encode() + b"}\n", Evidence(4, 18), id="ndjson"
    ),
]


@pytest.mark.parametrize(("reply", "expected"), WHOLE)
@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_replies_however_they_are_cut(reply: bytes, expected: Evidence, size: int) -> None:
    assert of(*cut(reply, size)) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        pytest.param(chat(LONG, usage=USAGE, timings=TIMINGS), Evidence(5, 17), id="llama.cpp"),
        pytest.param(chat(LONG, usage=USAGE, system_fingerprint="b0"), Evidence(4, 18), id="openai"),
        pytest.param(json.dumps(json.loads(chat(LONG, usage=USAGE)), indent=2).encode(), Evidence(4, 18), id="pretty"),
        pytest.param(json.dumps(response(LONG, user=None, metadata={})).encode(), Evidence(21, 1), id="responses"),
        pytest.param(
            events(*[delta("word") for _ in range(1000)], delta("", timings=TIMINGS), b"[DONE]"),
            Evidence(5, 17),
            id="stream",
        ),
        pytest.param(
            events({"type": "response.completed", "response": response(LONG)}), Evidence(21, 1), id="one-long-event"
        ),
        pytest.param(
            events({"type": "response.completed", "response": response(LONG), "timings": TIMINGS}),
            Evidence(5, 17),
            id="one-long-event-with-timings",
        ),
        pytest.param(
            events(
                {"message": {"usage": ANTHROPIC_USAGE}},
                *[delta("word") for _ in range(1000)],
                {"usage": {"output_tokens": 4}},
            ),
            Evidence(21, 1),
            id="told-at-the-start",
        ),
        pytest.param(
            MESSAGES_START + 1000 * MESSAGES_DELTA + MESSAGES_END, Evidence(24, 1), id="llama.cpp-messages-stream"
        ),
        pytest.param(
            RESPONSES_END.replace(b"Hello! I", LONG.encode()), Evidence(24, 1), id="llama.cpp-responses-stream"
        ),
    ],
)
@pytest.mark.parametrize("size", [100, 4096, 10**7])
def test_long_replies(reply: bytes, expected: Evidence, size: int) -> None:
    assert len(reply) > TAIL
    assert of(*cut(reply, size)) == expected


@pytest.mark.parametrize("padding", ["", LONG])
@pytest.mark.parametrize(
    "content",
    [
        "{" + LIE + "}",
        "}]," + LIE + "}",
        "\\" + LIE,
        '\\"' + LIE + "\\",
        "\n\ndata: {" + LIE + "}\n\n",
        '"}}],' + LIE + "}\\\\",
        "ends with a backslash \\",
    ],
)
def test_what_the_model_says_is_no_evidence(content: str, padding: str) -> None:
    for text in (content + padding, padding + content):
        assert of(chat(text, model="m")) == NOTHING
        assert of(chat(text, usage=USAGE)) == Evidence(4, 18)
        assert of(chat("hi", usage=USAGE, echo=text)) in (Evidence(4, 18), NOTHING)
        assert of(events(delta(text), b"[DONE]")) == NOTHING
        assert of(events(delta(text), delta("", timings=TIMINGS))) == Evidence(5, 17)
        assert of(events({"response": response(text, usage=None)})) == NOTHING


@pytest.mark.parametrize("padding", ["", LONG])
def test_what_the_model_hands_to_a_tool_is_no_evidence(padding: str) -> None:
    """Anthropic's tool calls hold JSON that the model wrote, with plain quotes."""
    call = {"type": "tool_use", "input": {"usage": USAGE, "timings": TIMINGS}}
    for content in ([{"text": padding}, call], [call, {"text": padding}], [{"text": padding}, call, *[call] * 40]):
        assert of(json.dumps({"content": content, "stop_reason": "tool_use"}).encode()) == NOTHING
        assert of(json.dumps({"content": content, "usage": ANTHROPIC_USAGE}).encode()) == Evidence(21, 1)
        assert of(events({"response": {"output": content, "metadata": {"a": {"b": call["input"]}}}})) == NOTHING


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\n\n",
        b"plain text",
        b"data: [DONE]\n\n",
        gzip.compress(chat(LONG, usage=USAGE, timings=TIMINGS)),
        gzip.compress(chat(usage=USAGE)),
        chat(usage=USAGE, timings=TIMINGS)[:-1],
        chat(usage=None, timings=None),
        chat(usage=[USAGE], timings="fast"),
        chat(usage={"prompt_tokens": 22, "cached_prompts": ["sys"], "cache_hit": True}),
        chat(timings={"cache_n": True, "prompt_n": -1}),
        chat(timings={"cache_n": 2**31, "prompt_n": 5.0}),
        chat(usage={"prompt_tokens": 22, "prompt_tokens_details": {"cached_tokens": None}}),
        b'{"timings":{"cache_n":' + b"9" * 6000 + b"}}",
        b'{"usage":' * 3000,
        b'data: {"usage":' + b"[" * 15000,
        b"\n" * 50_000,
        b'"usage":{' * 5000,
        b'[{"timings":{"cache_n":1,"prompt_n":1}}]',
    ],
)
def test_replies_that_say_nothing(reply: bytes) -> None:
    assert of(reply) == NOTHING
    assert of(*cut(reply, 5)) == NOTHING


def test_cached_without_a_sensible_total() -> None:
    assert of(chat(usage={"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}})) == Evidence(4, None)
    assert of(chat(usage={"cache_read_input_tokens": 4})) == Evidence(4, None)
    written = {"cache_read_input_tokens": 4, "cache_creation_input_tokens": 10, "input_tokens": 2}
    assert of(chat(usage=written)) == Evidence(4, 12)


@settings(deadline=None)
@given(
    st.text(),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(1, 3000),
    st.booleans(),
    st.integers(0, 3 * TAIL),
)
@example('\\"' + LIE, 3, 4, 1, False, 0)
def test_any_answer_cut_anywhere(text: str, cached: int, computed: int, size: int, stream: bool, padding: int) -> None:
    timings = {"timings": {"cache_n": cached, "prompt_n": computed}}
    text = text + "p" * padding + text
    reply = events(delta(text), delta(LIE), delta("", **timings), b"[DONE]") if stream else chat(text + LIE, **timings)
    assert of(*cut(reply, size)) == Evidence(cached, computed)
    silent = events(delta(text), delta(LIE), b"[DONE]") if stream else chat(text + LIE)
    assert of(*cut(silent, size)) == NOTHING


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200)))
@example([b"data:", b'{"timings":{"cache_n":1}}', b"\xff"])
def test_any_bytes(chunks: list[bytes]) -> None:
    evidence = of(*chunks)
    assert evidence.cached is None or evidence.cached >= 0


def test_little_is_kept_of_much() -> None:
    tail = Tail()
    chunk, big = b"x" * 1000, b"y" * 10_000_000
    tracemalloc.start()
    try:
        for _ in range(20_000):
            tail.feed(bytes(chunk))
        tail.feed(b"%s" % big)
        assert tracemalloc.get_traced_memory()[0] < 10 * (TAIL + HEAD)
    finally:
        tracemalloc.stop()
