"""Whether an answer was cut, of servers that say `stop` all the same: what they count, and what can be counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.cache.dialects.call import Call, read_call
from proxy.cache.length import NO_LIMITS, Limits, limits_of, reaches
from proxy.cache.recorder import Recorder
from proxy.cache.trust import ORDINARY, Trust
from tests.fake_model import chat_body, chat_events, chunk, sse

WORDS = Trust(tells_length=False, unit="words", default_limit=512)
TOKENS = Trust(tells_length=False, unit="tokens", default_limit=512)
ENDLESS = Trust(tells_length=False, unit="tokens", default_limit=None)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Call:
    call = read_call(CHAT, "", {}, json.dumps({"messages": HELLO, **fields}).encode())
    assert isinstance(call, Call)
    return call


def usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 99}


def seems_cut(trust: Trust, body: bytes, *, stream: bool = False, **fields: Any) -> bool:
    """What a recorder makes of an answer with these bytes."""
    call = chat(stream=stream, **fields)
    recorder = Recorder(CHAT, call, max_bytes=1 << 20, usage_from_timings=False, trust=trust)
    recorder.begin(200, {"Content-Type": "text/event-stream" if stream else "application/json"})
    recorder.feed(body)
    recorded = recorder.finish()
    assert not isinstance(recorded, str), recorded
    assert recorded.was_cut is recorded.seems_cut
    return recorded.seems_cut


def whole(text: str, count: int | None = None) -> bytes:
    return json.dumps(chat_body(text, usage=None if count is None else usage(count))).encode()


def stream(*pieces: str, count: int | None = None) -> bytes:
    events = [chunk({"content": piece}, usage=None) for piece in pieces]
    return sse(*events, chunk({}, finish="stop", usage=None if count is None else usage(count)))


@pytest.mark.parametrize(
    ("body", "limits"),
    [
        ({}, NO_LIMITS),
        ({"max_tokens": 9}, Limits(9)),
        ({"max_tokens": 9.0}, Limits(9)),
        ({"max_tokens": "9"}, Limits(9)),
        ({"max_tokens": 0}, NO_LIMITS),
        ({"max_tokens": None}, NO_LIMITS),
        ({"max_tokens": -1}, NO_LIMITS),
        ({"max_tokens": "-1"}, NO_LIMITS),
        ({"max_tokens": "many"}, NO_LIMITS),
        ({"max_tokens": "9" * 5000}, NO_LIMITS),
        ({"max_tokens": [9]}, NO_LIMITS),
        ({"max_completion_tokens": 9}, Limits(None, 9)),
        ({"max_tokens": 7, "max_completion_tokens": 9, "n_predict": 5}, Limits(7, 5)),
        ({"options": {"num_predict": 4}}, Limits(None, 4)),
        ({"options": "none"}, NO_LIMITS),
    ],
)
def test_the_limits_that_a_call_states(body: dict[str, Any], limits: Limits) -> None:
    assert limits_of(body) == limits


@pytest.mark.parametrize(
    ("fields", "limited"),
    [
        ({}, False),
        ({"max_tokens": None}, False),
        ({"max_tokens": -1}, False),
        ({"n_predict": -1}, False),
        ({"max_tokens": 0}, True),
        ({"max_tokens": 9}, True),
        ({"max_completion_tokens": 9}, True),
        ({"max_tokens": -1, "n_predict": 9}, True),
    ],
)
def test_a_call_states_its_limit_unless_it_wants_an_endless_answer(fields: dict[str, Any], limited: bool) -> None:
    assert chat(**fields).limited is limited


@pytest.mark.parametrize(
    ("limits", "default", "least"),
    [
        (NO_LIMITS, None, None),
        (NO_LIMITS, 512, 512),
        (Limits(9), 512, 9),
        (Limits(2000), 512, 2000),
        (Limits(None, 2000), 512, 512),
        (Limits(None, 9), 512, 9),
        (Limits(None, 9), None, 9),
        (Limits(9, 7), 512, 7),
    ],
)
def test_a_limit_that_a_server_may_not_know_never_raises_its_own(
    limits: Limits, default: int | None, least: int | None
) -> None:
    assert limits.least(default) == least


@pytest.mark.parametrize(
    ("trust", "count", "fields", "cut"),
    [
        (TOKENS, 9, {"max_tokens": 10}, False),
        (TOKENS, 10, {"max_tokens": 10}, True),
        (TOKENS, 11, {"max_tokens": 10}, True),
        (TOKENS, 511, {}, False),
        (TOKENS, 512, {}, True),
        (TOKENS, 512, {"max_tokens": 0}, True),
        (TOKENS, 512, {"max_tokens": -1}, True),
        (TOKENS, 512, {"max_tokens": None}, True),
        (TOKENS, 511, {"max_tokens": -1}, False),
        (TOKENS, 512, {"max_tokens": 600}, False),
        (ENDLESS, 10**6, {}, False),
        (ENDLESS, 10, {"max_tokens": 10}, True),
        (WORDS, 4, {"max_tokens": 10}, False),
        (WORDS, 5, {"max_tokens": 10}, True),
        (WORDS, 255, {}, False),
        (WORDS, 256, {}, True),
        (ORDINARY, 10**6, {"max_tokens": 10}, False),
    ],
)
def test_whole_answers_by_what_the_server_counted(trust: Trust, count: int, fields: dict[str, Any], cut: bool) -> None:
    assert seems_cut(trust, whole("Yes.", count), **fields) is cut


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize(("pieces", "cut"), [(9, False), (10, True)])
def test_of_a_stream_the_pieces_count_where_the_server_counts_words(count: int | None, pieces: int, cut: bool) -> None:
    wire = stream(*["ab"] * pieces, count=count)
    assert seems_cut(WORDS, wire, stream=True, max_tokens=10) is cut


def test_of_a_stream_the_servers_tokens_count_where_it_tells_them() -> None:
    assert not seems_cut(TOKENS, stream(*["ab"] * 10, count=9), stream=True, max_tokens=10)
    assert seems_cut(TOKENS, stream("ab", count=10), stream=True, max_tokens=10)
    assert seems_cut(TOKENS, stream(*["ab"] * 10), stream=True, max_tokens=10)


def test_roles_and_the_closing_event_are_no_pieces() -> None:
    events = chat_events(*["ab"] * 9)
    assert not seems_cut(WORDS, sse(*events), stream=True, max_tokens=10)
    events[-1]["choices"][0]["delta"] = {"role": "assistant", "content": ""}
    assert not seems_cut(WORDS, sse(*events), stream=True, max_tokens=10)
    events[0]["choices"][0]["delta"] = {"role": "assistant", "content": "ab"}
    assert seems_cut(WORDS, sse(*events), stream=True, max_tokens=10)


def test_tokens_that_end_within_a_character_are_pieces() -> None:
    # 🦙 is several tokens: some servers send the first ones empty, others not at all.
    assert seems_cut(WORDS, stream(*["ab"] * 7, "", "", "\u00e9"), stream=True, max_tokens=10)
    assert seems_cut(WORDS, stream(*["ab"] * 7, "\U0001f999"), stream=True, max_tokens=10)


def test_a_stream_in_few_big_pieces_is_measured_by_its_words() -> None:
    assert not seems_cut(WORDS, stream("one two three four"), stream=True, max_tokens=10)
    assert seems_cut(WORDS, stream("one two three four ", "five"), stream=True, max_tokens=10)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("one two three four", False),
        ("one two three four five", True),
        ("\u56db\u4e2a\u5b57\u3002", False),
        ("\u6c34" * 10, True),
        ("x" * 60, True),
    ],
)
@pytest.mark.parametrize("trust", [WORDS, TOKENS])
def test_without_any_count_the_text_itself_is_measured(trust: Trust, text: str, cut: bool) -> None:
    assert seems_cut(trust, whole(text), max_tokens=10) is cut


def test_reasoning_takes_tokens_too() -> None:
    body = chat_body("Yes.", usage=None, message={"reasoning_content": "one two three four"})
    assert seems_cut(WORDS, json.dumps(body).encode(), max_tokens=10)


@pytest.mark.parametrize("count", [True, "10", -1, 10.0, 1 << 60])
def test_a_count_that_is_none_is_not_believed(count: Any) -> None:
    assert not seems_cut(TOKENS, json.dumps(chat_body("Yes.", usage=usage(count))).encode(), max_tokens=10)


def test_raw_completions_are_measured_likewise() -> None:
    call = read_call(COMPLETIONS, "", {}, b'{"prompt": "x", "max_tokens": 3, "stream": true}')
    assert isinstance(call, Call)
    recorder = Recorder(COMPLETIONS, call, max_bytes=1 << 20, usage_from_timings=False, trust=WORDS)
    recorder.begin(200, {"Content-Type": "text/event-stream"})
    texts = [{"choices": [{"index": 0, "text": "ab", "finish_reason": None}]}] * 3
    recorder.feed(sse(*texts, {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}))
    recorded = recorder.finish()
    assert not isinstance(recorded, str)
    assert recorded.seems_cut


@given(
    limit=st.integers(1, 50),
    text=st.text(max_size=80),
    words=st.none() | st.integers(0, 60),
    deltas=st.none() | st.integers(0, 60),
)
def test_more_of_anything_never_makes_an_answer_seem_whole(
    limit: int, text: str, words: int | None, deltas: int | None
) -> None:
    if reaches(limit, text, tokens=None, words=words, deltas=None):
        assert reaches(limit, text + " x", tokens=None, words=words, deltas=None)
        assert reaches(max(1, limit - 1), text, tokens=None, words=words, deltas=None)
    if deltas is not None and deltas >= len(text.split()):
        assert reaches(limit, text, tokens=None, words=words, deltas=deltas + limit)


@given(limit=st.integers(1, 200), pieces=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=200))
def test_a_stream_of_as_many_tokens_as_allowed_always_seems_cut(limit: int, pieces: list[str]) -> None:
    text = "".join(pieces)
    if len(pieces) >= limit and len(pieces) >= len(text.split()):
        assert reaches(limit, text, tokens=None, words=None, deltas=len(pieces))
