"""Answers of chat and completions that are told strangely: what is put together, and what is given to others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.answer import Recorded
from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.cache.dialects.dialect import Dialect, read_whole
from proxy.cache.policy import Drop
from tests.fake_model import chat_body, chunk

CALLS: list[dict[str, Any]] = [
    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}},
    {"index": 0, "id": "call_2", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
]
"""As Gemini's server for OpenAI's clients numbers parallel calls."""


def assembled(dialect: Dialect, *events: Any) -> Recorded | Drop:
    assembler = dialect.assembler()
    for event in events:
        assembler.feed(json.dumps(event))
    assembler.feed("[DONE]")
    return assembler.finish(usage_asked=False, usage_from_timings=False)


def kept(dialect: Dialect, *events: Any) -> dict[str, Any]:
    """What is kept of a stream."""
    recorded = assembled(dialect, *events)
    assert isinstance(recorded, Recorded), recorded
    return dict(recorded.body)


def token(text: str, likely: dict[str, float], finish: str | None = None) -> dict[str, Any]:
    """An event of a raw completion with the likeliest tokens: `{token: logprob}`."""
    logprobs = {"tokens": [text], "token_logprobs": [0], "top_logprobs": [likely]}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}]}


NAMED = {name: value for name, value in CALLS[1].items() if name != "function"}


@pytest.mark.parametrize(
    "events",
    [[CALLS], [[CALLS[0]], [CALLS[1]]], [[CALLS[0]], [NAMED], [{"index": 0, "function": CALLS[1]["function"]}]]],
    ids=["in one event", "one after the other", "in pieces"],
)
def test_parallel_calls_of_one_number_are_not_taken_for_one_call(events: list[list[dict[str, Any]]]) -> None:
    said = [chunk({"role": "assistant", "tool_calls": calls}) for calls in events]
    assert assembled(CHAT, *said, chunk({}, finish="tool_calls")) is Drop.NOT_UNDERSTOOD


def test_a_call_that_repeats_its_id_in_every_piece_is_one_call() -> None:
    rest = {**CALLS[0], "function": {"arguments": " "}}
    body = kept(CHAT, chunk({"tool_calls": [CALLS[0]]}), chunk({"tool_calls": [rest]}), chunk({}, finish="tool_calls"))
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert (call["id"], call["function"]["arguments"]) == ("call_1", '{"city":"Paris"} ')


@pytest.mark.parametrize("name", [{}, {"name": None}, {"name": ""}])
def test_a_call_whose_pieces_have_ids_of_their_own_is_one_call(name: dict[str, Any]) -> None:
    rest = {"index": 0, "id": "call_2", "function": {"arguments": " ", **name}}
    body = kept(CHAT, chunk({"tool_calls": [CALLS[0]]}), chunk({"tool_calls": [rest]}), chunk({}, finish="tool_calls"))
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city":"Paris"} '}


def test_the_padding_of_events_is_no_part_of_the_answer() -> None:
    said = chunk({"role": "assistant", "content": "hi"}, obfuscation="aXbY")
    assert "obfuscation" not in kept(CHAT, said, chunk({}, finish="stop", obfuscation="q"))


def test_a_token_that_is_named_index_is_a_token() -> None:
    # Go and JavaScript write a logprob of zero as 0: the token looks like the number of an item.
    likely: list[dict[str, float]] = [{"list.": -1}, {"index": 0}, {"()": 0}]
    body = kept(COMPLETIONS, *map(token, ("list.", "index", "()"), likely, (None, None, "stop")))
    assert body["choices"][0]["logprobs"]["top_logprobs"] == likely


def test_a_token_that_is_named_function_is_a_token() -> None:
    body = kept(COMPLETIONS, token("function", {"function": -0.1}), token(" f()", {" f()": -0.1}, "stop"))
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"function": -0.1}, {" f()": -0.1}]


def test_what_is_said_of_a_choice_is_not_lost_to_an_empty_word_of_it() -> None:
    # Azure says of each event how it was filtered, and {} of the last.
    seen = {"hate": {"filtered": False, "severity": "safe"}}
    first, last = chunk({"role": "assistant", "content": "hi"}), chunk({}, finish="stop")
    first["choices"][0]["content_filter_results"] = seen
    last["choices"][0]["content_filter_results"] = {}
    assert kept(CHAT, first, last)["choices"][0]["content_filter_results"] == seen


METADATA = st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)
ECHO = st.fixed_dictionaries({}, optional={"metadata": METADATA, "user": st.none() | st.text(max_size=5)})


@given(ECHO)
def test_what_an_answer_repeats_of_its_call_is_left_empty_and_nothing_is_added(echo: dict[str, Any]) -> None:
    blank: dict[str, Any] = {"metadata": {}, "user": None}
    expected = {name: blank[name] if value else value for name, value in echo.items()}
    whole = read_whole(CHAT, json.dumps(chat_body("hi", **echo)).encode())
    assert isinstance(whole, Recorded)
    streamed = kept(CHAT, chunk({"content": "hi"}, **echo), chunk({}, finish="stop"))
    for body in (whole.body, streamed):
        assert {name: body[name] for name in blank if name in body} == expected
