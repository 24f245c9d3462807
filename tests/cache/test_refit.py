"""A stream made over for a caller who asked for usage, or did not, is the stream that this caller would have got."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.refit import Refit
from tests.fake_model import chat_events, sse

TIMINGS = {"cache_n": 5, "prompt_n": 17, "predicted_n": 6}
ASKED = sse(*chat_events("a", "b", usage=True))
UNASKED = sse(*chat_events("a", "b"))


def refitted(wire: bytes, size: int, *, wants_usage: bool) -> bytes:
    refit = Refit(wants_usage=wants_usage)
    fed = b"".join(refit.feed(wire[start : start + size]) for start in range(0, len(wire), size))
    return fed + refit.end()


@given(st.integers(1, 400))
def test_usage_that_was_not_asked_for_is_taken_out(size: int) -> None:
    assert refitted(ASKED, size, wants_usage=False) == UNASKED
    assert refitted(UNASKED, size, wants_usage=False) == UNASKED


@given(st.integers(1, 400))
def test_usage_that_was_asked_for_is_made_of_the_timings(size: int) -> None:
    events = chat_events("a", "b")
    events[-1]["timings"] = TIMINGS
    lines = refitted(sse(*events), size, wants_usage=True).split(b"\n\n")
    assert b"\n\n".join([*lines[:-3], *lines[-2:]]) == sse(*events)
    told = json.loads(lines[-3].removeprefix(b"data: "))
    assert (told["choices"], told["id"], told["model"], told["object"]) == (
        [],
        "chatcmpl-up",
        "tiny",
        "chat.completion.chunk",
    )
    assert told["usage"] == {
        "completion_tokens": 6,
        "prompt_tokens": 22,
        "total_tokens": 28,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


@pytest.mark.parametrize("first", [b"id: 7\n", b"event: message\r\n", b": ping\n", b"id: 7\nevent: x\nretry: 9\n"])
@given(size=st.integers(1, 400))
def test_usage_is_found_behind_other_fields_and_comments(first: bytes, size: int) -> None:
    def told(wire: bytes) -> bytes:
        return wire.replace(b"data: ", first + b"data: ")

    assert refitted(told(ASKED), size, wants_usage=False) == told(UNASKED)
    events = chat_events("a", "b")
    events[-1]["timings"] = TIMINGS
    assert refitted(told(sse(*events)), size, wants_usage=True).count(b'"usage"') == 1


def test_usage_that_is_told_in_any_case_is_not_told_twice() -> None:
    last: dict[str, Any] = {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": {"a": 1}}
    wire = sse({**last, "timings": TIMINGS})
    assert refitted(wire, 7, wants_usage=True) == wire
    assert refitted(wire, 7, wants_usage=False) == wire


@pytest.mark.parametrize(
    "wire", [b": ping\n\n", b"event: x\ndata: {\n\n", b"error: no\n\n", b'data: {"usage": 1}\r\n\r\n', b"data: x"]
)
@pytest.mark.parametrize("wants_usage", [True, False])
def test_whatever_else_comes_passes_as_it_is(wire: bytes, wants_usage: bool) -> None:
    assert refitted(wire, 3, wants_usage=wants_usage) == wire


@given(st.binary(max_size=300), st.integers(1, 50), st.booleans())
def test_no_bytes_break_it(wire: bytes, size: int, wants_usage: bool) -> None:
    refitted(wire, size, wants_usage=wants_usage)
