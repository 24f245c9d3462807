"""What identifies a call: every field but the named few, and nothing that merely looks alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.cache.dialects.call import Call, NotCacheable, read_call
from proxy.cache.policy import Bypass

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["temperature", "max_tokens", "tools", "stop", "seed", "x_unknown", "grammar", "lora", "model"])
HELLO = [{"role": "user", "content": "hello"}]


def chat(query: str = "", headers: dict[str, str] | None = None, **fields: Any) -> Call:
    body = {"messages": HELLO, **fields}
    call = read_call(CHAT, query, headers or {}, json.dumps(body).encode())
    assert isinstance(call, Call)
    return call


def refusal(body: bytes) -> Bypass:
    call = read_call(CHAT, "", {}, body)
    assert isinstance(call, NotCacheable), call
    return call.reason


@given(NAMES, JSON, JSON)
def test_every_field_counts_known_or_not(name: str, one: Any, other: Any) -> None:
    assume(json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True))
    assert chat(**{name: one}).digest != chat(**{name: other}).digest


@given(NAMES, JSON)
def test_a_field_that_is_there_differs_from_one_that_is_not(name: str, value: Any) -> None:
    assert chat(**{name: value}).digest != chat().digest


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True},
        {"stream": False},
        {"stream": None},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": False},
        {"id_slot": 3},
        {"cache_prompt": False},
        {"sse_ping_interval": 5},
    ],
)
def test_fields_that_cannot_change_the_answer_do_not_count(fields: dict[str, Any]) -> None:
    assert chat(**fields).digest == chat().digest


def test_the_order_of_keys_and_white_space_do_not_count() -> None:
    one = read_call(CHAT, "", {}, b'{"temperature": 0, "messages": [{"role": "user", "content": "a"}]}')
    other = read_call(CHAT, "", {}, b'{"messages":[{"content":"a","role":"user"}],"temperature":0}')
    assert one == other


@pytest.mark.parametrize(
    ("one", "other"), [("a", "a "), ("a", "A"), ("é", "e\u0301"), ("1", 1), (1, 1.0), (0, -0.0), (1, True)]
)
def test_nothing_is_folded_in_the_exact_tier(one: Any, other: Any) -> None:
    assert chat(x=one).digest != chat(x=other).digest


def test_escapes_are_the_characters_that_they_stand_for() -> None:
    escaped = read_call(CHAT, "", {}, b'{"messages": [{"role": "user", "content": "\\u00e9"}]}')
    plain = read_call(CHAT, "", {}, '{"messages": [{"role": "user", "content": "é"}]}'.encode())
    assert escaped == plain


def test_query_behaviour_headers_and_endpoint_count() -> None:
    digests = {
        chat().digest,
        chat(query="a=1").digest,
        chat(headers={"anthropic-beta": "x"}).digest,
        chat(headers={"anthropic-version": "x"}).digest,
    }
    assert len(digests) == 4
    as_completion = read_call(COMPLETIONS, "", {}, json.dumps({"prompt": "a", "messages": HELLO}).encode())
    as_chat = read_call(CHAT, "", {}, json.dumps({"prompt": "a", "messages": HELLO}).encode())
    assert isinstance(as_completion, Call)
    assert isinstance(as_chat, Call)
    assert as_completion.digest != as_chat.digest


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Bypass.NOT_JSON),
        (b"{", Bypass.NOT_JSON),
        (b"\xff\xfe", Bypass.NOT_JSON),
        ('{"messages": []}'.encode("utf-16"), Bypass.NOT_JSON),
        (b'{"messages": [{}], "temperature": NaN}', Bypass.NOT_JSON),
        (b'{"messages": [{}], "temperature": Infinity}', Bypass.NOT_JSON),
        (b'{"a":' * 100_000, Bypass.NOT_JSON),
        (b'{"messages": [{}], "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", Bypass.NOT_JSON),
        (b'{"messages": [{}], "x": ' + b"9" * 10_000 + b"}", Bypass.NOT_JSON),
        (b"[]", Bypass.NOT_UNDERSTOOD),
        (b"null", Bypass.NOT_UNDERSTOOD),
        (b'{"messages": "hi"}', Bypass.NOT_UNDERSTOOD),
        (b'{"messages": []}', Bypass.NOT_UNDERSTOOD),
        (b'{"messages": ["hi"]}', Bypass.NOT_UNDERSTOOD),
        (b'{"messages": [{}], "stream": "yes"}', Bypass.NOT_UNDERSTOOD),
        (b'{"messages": [{}], "stream": 1}', Bypass.NOT_UNDERSTOOD),
        (b'{"messages": [{}], "stream_options": []}', Bypass.NOT_UNDERSTOOD),
        (b'{"messages": [{}], "stream_options": {"continuous_usage_stats": true}}', Bypass.STREAM_OPTIONS),
        (b'{"messages": [{}], "return_progress": true}', Bypass.RETURN_PROGRESS),
        (b'{"messages": [{}], "store": true}', Bypass.STORE_TRUE),
        (b'{"messages": [{}], "a": 1, "a": 2}', Bypass.DUPLICATE_KEYS),
        (b'{"messages": [{"role": "user", "role": "system"}]}', Bypass.DUPLICATE_KEYS),
    ],
)
def test_what_is_not_plainly_understood_is_left_to_the_upstream(body: bytes, reason: Bypass) -> None:
    assert refusal(body) is reason


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_body_breaks_the_reading(body: bytes) -> None:
    assert isinstance(read_call(CHAT, "", {}, body), Call | NotCacheable)
    assert isinstance(read_call(COMPLETIONS, "", {}, body), Call | NotCacheable)


def test_lone_surrogates_are_read_and_never_compared_loosely() -> None:
    call = read_call(CHAT, "", {}, b'{"messages": [{"role": "user", "content": "\\ud800"}], "model": "\\ud800"}')
    assert isinstance(call, Call)
    assert (call.words, call.model) == (None, "")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (HELLO, "hello"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "a\nb"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], None),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None),
        ([{"role": "tool", "content": "a"}], None),
        ([{"role": "user", "content": None}], None),
        ([{"role": "user", "content": "  "}], None),
    ],
)
def test_the_words_are_the_last_message_if_a_user_wrote_it_as_text(messages: Any, words: str | None) -> None:
    call = read_call(CHAT, "", {}, json.dumps({"messages": messages}).encode())
    assert isinstance(call, Call)
    assert call.words == words


def test_the_space_covers_everything_but_the_words() -> None:
    def spaced(content: Any, **fields: Any) -> bytes:
        return chat(
            messages=[{"role": "system", "content": "s"}, {"role": "user", "content": content}], **fields
        ).space_digest

    assert spaced("a") == spaced("b")
    parts = [{"type": "text", "text": "a"}]
    others = [
        spaced(parts),
        spaced("a", temperature=1),
        spaced("a", n=2),
        spaced("a", logprobs=True),
        chat().space_digest,
    ]
    assert len({spaced("a"), *others}) == 6


@pytest.mark.parametrize(
    ("fields", "sampled"),
    [
        ({}, True),
        ({"temperature": None}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "seed": 42}, False),
        ({"seed": -1}, True),
        ({"seed": 4294967295}, True),
        ({"seed": None}, True),
        ({"temperature": True}, True),
    ],
)
def test_a_call_is_sampled_unless_temperature_or_seed_say_otherwise(fields: dict[str, Any], sampled: bool) -> None:
    assert chat(**fields).sampled is sampled


def test_numbers_that_no_double_can_hold_are_not_taken_for_one_another() -> None:
    for literal in (b"1e999", b"-2e999"):
        assert refusal(b'{"messages": [{}], "temperature": ' + literal + b"}") is Bypass.NOT_JSON


def test_the_same_text_in_other_parts_is_another_call() -> None:
    def parted(*texts: str) -> bytes:
        return chat(messages=[{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]).digest

    assert len({parted("a\n", "b"), parted("a", "\nb"), parted("a\n\nb"), parted("a", "", "b")}) == 4
    assert chat(messages=[{"role": "user", "content": "a"}]).digest != parted("a")


def test_a_body_of_countless_values_is_not_parsed() -> None:
    assert refusal(b'{"messages": [{}], "x": [' + b"[]," * 300_000 + b"0]}") is Bypass.TOO_COMPLEX


def test_repeated_behaviour_headers_count() -> None:
    once, twice = CIMultiDict([("OpenAI-Beta", "a")]), CIMultiDict([("OpenAI-Beta", "a"), ("OpenAI-Beta", "b")])
    assert chat(headers=once).digest != chat(headers=twice).digest  # type: ignore[arg-type]


def test_an_answer_that_goes_on_from_a_prefill_is_of_one_form() -> None:
    # llama.cpp repeats what was put in the model's mouth in a whole answer, and leaves it out of a stream.
    prefilled = [*HELLO, {"role": "assistant", "content": "The fruit is"}]
    whole, streamed = chat(messages=prefilled), chat(messages=prefilled, stream=True)
    assert whole.digest != streamed.digest
    assert chat().digest == chat(stream=True).digest
