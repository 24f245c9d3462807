"""An answer survives storing and replay in both directions, whatever it holds and however its bytes arrive."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.answer import Recorded, decode_body
from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.cache.dialects.dialect import Dialect, read_whole
from proxy.cache.policy import Drop
from proxy.cache.sse import EventSplitter

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SAID = TEXT.map(lambda text: text + "x")
USAGE = st.fixed_dictionaries(
    {
        "prompt_tokens": st.integers(0, 10**6),
        "completion_tokens": st.integers(1, 10**6),
        "total_tokens": st.integers(1),
    },
    optional={"prompt_tokens_details": st.fixed_dictionaries({"cached_tokens": st.integers(0, 99)})},
)
TOKEN = st.fixed_dictionaries(
    {"token": TEXT, "logprob": st.floats(-30, 0), "bytes": st.none() | st.lists(st.integers(0, 255), max_size=4)},
    optional={
        "top_logprobs": st.lists(st.fixed_dictionaries({"token": TEXT, "logprob": st.floats(-30, 0)}), max_size=2)
    },
)
TOOL_CALL = st.fixed_dictionaries(
    {
        "id": st.from_regex(r"call_[a-z0-9]{1,8}", fullmatch=True),
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": SAID, "arguments": TEXT}),
    }
)
LOGPROBS = st.fixed_dictionaries(
    {"content": st.none() | st.lists(TOKEN, max_size=3), "refusal": st.none() | st.lists(TOKEN, max_size=1)}
)
OUTSIDE = {
    "system_fingerprint": st.none() | TEXT,
    "service_tier": TEXT,
    "timings": st.fixed_dictionaries({"predicted_n": st.integers(1, 99), "predicted_ms": st.floats(0, 1e6)}),
    "usage": USAGE,
    "x_unknown": st.none() | TEXT | st.integers() | st.lists(st.integers(), max_size=3),
}
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": SAID},
        optional={
            "reasoning_content": TEXT,
            "refusal": st.none(),
            "tool_calls": st.lists(TOOL_CALL, min_size=1, max_size=3),
            "annotations": st.just([]),
            "x_unknown": TEXT,
        },
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | st.just("")},
        optional={"reasoning_content": TEXT},
    ).flatmap(lambda m: st.lists(TOOL_CALL, min_size=1, max_size=3).map(lambda calls: {**m, "tool_calls": calls})),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none(), "refusal": SAID}),
)


def chat_choice(index: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "index": st.just(index),
            "message": MESSAGE,
            "finish_reason": st.sampled_from(["stop", "length", "tool_calls"]),
        },
        optional={"logprobs": st.none() | LOGPROBS, "stop_reason": st.none() | TEXT},
    )


def completions_choice(index: int) -> st.SearchStrategy[dict[str, Any]]:
    legacy = st.fixed_dictionaries({"tokens": st.lists(TEXT, max_size=3), "token_logprobs": st.lists(st.floats(-9, 0))})
    return st.fixed_dictionaries(
        {
            "index": st.just(index),
            "text": SAID,
            "logprobs": st.none() | legacy | LOGPROBS,
            "finish_reason": st.sampled_from(["stop", "length"]),
        }
    )


def bodies(dialect: Dialect) -> st.SearchStrategy[dict[str, Any]]:
    choice = chat_choice if dialect is CHAT else completions_choice
    choices = st.integers(1, 3).flatmap(lambda n: st.tuples(*(choice(i) for i in range(n))).map(list))
    fixed = {"object": st.just(OBJECTS[dialect.endpoint][0]), "model": TEXT, "choices": choices}
    return st.fixed_dictionaries(fixed, optional=OUTSIDE)


OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "completions": ("text_completion", "text_completion")}
BOTH: list[Dialect] = [CHAT, COMPLETIONS]
CASES = st.sampled_from(BOTH).flatmap(lambda d: st.tuples(st.just(d), bodies(d)))


def assembled(dialect: Dialect, wire: bytes, cuts: list[int], *, usage_asked: bool = True) -> Recorded | Drop:
    """What a recorder makes of a stream whose bytes arrive in pieces that end at these places."""
    splitter, assembler = EventSplitter(), dialect.assembler()
    edges = [0, *sorted(cut % (len(wire) + 1) for cut in cuts), len(wire)]
    for start, end in pairwise(edges):
        for data in splitter.feed(wire[start:end]):
            assert data is not None
            assembler.feed(data)
    return assembler.finish(usage_asked=usage_asked, usage_from_timings=False)


def events_of(wire: bytes) -> list[Any]:
    texts = [event.removeprefix("data: ") for event in wire.decode().split("\n\n") if event]
    assert texts[-1] == "[DONE]"
    return [json.loads(text) for text in texts[:-1]]


@given(CASES)
def test_a_whole_answer_comes_back_whole(case: tuple[Dialect, dict[str, Any]]) -> None:
    dialect, body = case
    sent = json.dumps({"id": "chatcmpl-1", "created": 1, **body}).encode()
    recorded = read_whole(dialect, sent)
    assert isinstance(recorded, Recorded)
    replayed = json.loads(dialect.whole(decode_body(recorded.encoded())).render("new", 2))
    assert replayed == {**body, "id": "new", "created": 2}


@given(CASES, st.lists(st.integers(0), max_size=6))
def test_a_stream_says_all_that_the_whole_answer_says(case: tuple[Dialect, dict[str, Any]], cuts: list[int]) -> None:
    dialect, body = case
    wire = dialect.stream(body, include_usage=True).render("new", 2)
    recorded = assembled(dialect, wire, cuts)
    assert isinstance(recorded, Recorded)
    assert recorded.body == {"usage": None, **body}


@given(CASES)
def test_usage_comes_in_a_stream_only_where_it_was_asked_for(case: tuple[Dialect, dict[str, Any]]) -> None:
    dialect, body = case
    asked = events_of(dialect.stream(body, include_usage=True).render("new", 2))
    unasked = events_of(dialect.stream(body, include_usage=False).render("new", 2))
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"] == body.get("usage")
    assert all(event["choices"] and "usage" not in event for event in unasked)


@given(CASES)
def test_every_event_of_a_replay_carries_the_same_fresh_id(case: tuple[Dialect, dict[str, Any]]) -> None:
    dialect, body = case
    events = events_of(dialect.stream(body, include_usage=True).render("chatcmpl-7", 99))
    assert {(event["id"], event["created"], event["object"]) for event in events} == {
        ("chatcmpl-7", 99, OBJECTS[dialect.endpoint][1])
    }


@given(
    st.lists(SAID, min_size=1, max_size=8), st.lists(TEXT, min_size=1, max_size=5), st.lists(st.integers(0), max_size=8)
)
def test_texts_and_arguments_in_pieces_are_joined(pieces: list[str], arguments: list[str], cuts: list[int]) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    deltas += [{"content": piece} for piece in pieces]
    deltas += [{"tool_calls": [call]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in arguments]
    events: list[Any] = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    wire = b"".join(f"data: {json.dumps(event)}\r\n\r\n".encode() for event in events) + b"data: [DONE]\n\n"
    recorded = assembled(CHAT, wire, cuts)
    assert isinstance(recorded, Recorded)
    message = recorded.body["choices"][0]["message"]
    assert message["content"] == "".join(pieces)
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "".join(arguments)}


def test_what_servers_repeat_in_every_event_is_not_joined() -> None:
    fragment = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    repeated = {**fragment, "function": {"name": "get_time", "arguments": ""}}
    deltas = [{"role": "assistant", "tool_calls": [fragment]}, {"role": "assistant", "tool_calls": [repeated]}]
    assembler = CHAT.assembler()
    for delta in deltas:
        assembler.feed(json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
    assembler.feed(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}))
    assembler.feed("[DONE]")
    recorded = assembler.finish(usage_asked=False, usage_from_timings=False)
    assert isinstance(recorded, Recorded)
    message = recorded.body["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    ]


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [{"index": 0, "delta": {"content": {"not": "text"}}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 5, "id": "x"}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": -1, "id": "x"}]}}]},
        {"choices": [{"index": "0", "delta": {}}]},
        {"choices": [7]},
        [],
        7,
    ],
)
def test_a_stream_that_must_be_guessed_at_is_not_kept(event: Any) -> None:
    assembler = CHAT.assembler()
    assembler.feed(json.dumps({"choices": [{"index": 0, "delta": {"content": "a"}}]}))
    assembler.feed(json.dumps(event))
    assembler.feed(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    assembler.feed("[DONE]")
    assert assembler.finish(usage_asked=False, usage_from_timings=False) is Drop.NOT_UNDERSTOOD


@given(st.binary(max_size=300), st.integers(1, 50))
def test_no_bytes_break_the_event_splitter(wire: bytes, size: int) -> None:
    splitter, assembler = EventSplitter(), CHAT.assembler()
    try:
        for start in range(0, len(wire), size):
            for data in splitter.feed(wire[start : start + size]):
                if data is not None:
                    assembler.feed(data)
    except UnicodeDecodeError:
        return
    assert isinstance(assembler.finish(usage_asked=False, usage_from_timings=False), Drop)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reading_of_a_whole_answer(content: bytes) -> None:
    assert isinstance(read_whole(CHAT, content), Drop)


def test_usage_is_derived_from_llama_cpp_timings() -> None:
    assembler = CHAT.assembler()
    assembler.feed(json.dumps({"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}))
    timings = {"cache_n": 5, "prompt_n": 17, "predicted_n": 6, "predicted_ms": 1.5}
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "timings": timings}
    assembler.feed(json.dumps(last))
    assembler.feed("[DONE]")
    recorded = assembler.finish(usage_asked=False, usage_from_timings=True)
    assert isinstance(recorded, Recorded)
    assert recorded.usage_known
    assert recorded.body["usage"] == {
        "prompt_tokens": 22,
        "completion_tokens": 6,
        "total_tokens": 28,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


def test_pieces_of_a_tool_call_without_an_index_are_not_guessed_together() -> None:
    first = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    for second in ({**first, "function": {"arguments": ": 1}"}}, {"function": {"arguments": ": 1}"}}):
        assembler = CHAT.assembler()
        for piece in (first, second):
            delta = {"tool_calls": [piece]}
            assembler.feed(json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
        assembler.feed(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}))
        assembler.feed("[DONE]")
        assert assembler.finish(usage_asked=False, usage_from_timings=False) is Drop.NOT_UNDERSTOOD


def test_an_event_that_never_ends_takes_no_quadratic_time() -> None:
    splitter = EventSplitter()
    for _ in range(4096):
        # Splitting the whole rest again for each piece would take minutes.
        assert list(splitter.feed(b"x" * 1024)) == []
    assert list(splitter.feed(b"\n\n")) == [None]
