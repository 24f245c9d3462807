"""The parts of a call by their names, and the stretch in which two of them differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.dialects import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from proxy.cache.parts import likeness, looks_of, parts_of, spans

LAST = {"role": "user", "content": "hi"}
PLAIN = {"endpoint": "chat", "last message": '{"content": "", "role": "user"}'}


def parts(*messages: dict[str, Any], **fields: Any) -> dict[str, str]:
    return parts_of(CHAT, "", {}, {"messages": [*messages, LAST], **fields})


# Parts


def test_a_plain_call_has_hardly_any() -> None:
    assert parts() == PLAIN


def test_system_prompt_and_history_are_told_apart() -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    told = parts({"role": "system", "content": "Be brief."}, *history, {"role": "developer", "content": "Be kind."})
    assert told["system prompt"] == "Be brief.\nBe kind."
    assert told["history"] == json.dumps(history, sort_keys=True)


def test_every_field_that_counts_is_a_part() -> None:
    told = parts(model="tiny", tools=[{"name": "f"}], temperature=0.5, x={"b": 1, "a": "é"}, stream=True, user="me")
    fields = {"model": "tiny", "tools": '[{"name": "f"}]', "parameter temperature": "0.5"}
    assert told == {**PLAIN, **fields, "parameter x": '{"a": "é", "b": 1}'}


def test_query_and_headers_that_count_are_parts() -> None:
    headers = {"openai-beta": "x", "user-agent": "y"}
    told = parts_of(CHAT, "a=1", headers, {"messages": [LAST]})
    assert told == {**PLAIN, "query": "a=1", "header openai-beta": "x"}


def test_what_cannot_be_compared_loosely_is_a_part_as_it_is() -> None:
    assert parts(n=2)["last message"] == '{"content": "hi", "role": "user"}'
    assert parts_of(COMPLETIONS, "", {}, {"prompt": "hello"}) == {"endpoint": "completions", "prompt": "hello"}
    assert parts_of(COMPLETIONS, "", {}, {"prompt": [1, 2]})["prompt"] == "[1, 2]"


def test_system_prompts_and_turns_have_the_same_names_on_every_endpoint() -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    counted = {"system prompt": "Be brief.", "history": json.dumps(history, sort_keys=True)}
    expected = {**counted, "last message": '{"content": "", "role": "user"}', "parameter temperature": "0"}
    chat = parts({"role": "system", "content": "Be brief."}, *history, temperature=0)
    messages = parts_of(MESSAGES, "", {}, {"system": "Be brief.", "messages": [*history, LAST], "temperature": 0})
    responses = parts_of(RESPONSES, "", {}, {"instructions": "Be brief.", "input": [*history, LAST], "temperature": 0})
    assert chat == {"endpoint": "chat", **expected}
    assert messages == {"endpoint": "messages", **expected}
    assert responses == {"endpoint": "responses", **expected}


def test_a_clock_in_a_block_of_a_system_prompt_differs_in_the_system_prompt_alone() -> None:
    def told(clock: str) -> dict[str, str]:
        blocks = [{"type": "text", "text": "You are kind."}, {"type": "text", "text": f"It is {clock} now."}]
        return parts_of(MESSAGES, "", {}, {"system": blocks, "messages": [LAST]})

    def among(clock: str) -> dict[str, str]:
        return parts_of(RESPONSES, "", {}, {"input": [{"role": "system", "content": f"It is {clock} now."}, LAST]})

    for here, there in ((told("10:41"), told("10:47")), (among("10:41"), among("10:47"))):
        (span,) = spans(here, there)
        assert (span.part, span.here, span.looks_like) == ("system prompt", "10:41", "a time of day")
    assert told("10:41")["system prompt"] == "You are kind.\nIt is 10:41 now."


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"system": "a\nb"}, {"system": [{"type": "text", "text": text} for text in "ab"]}),
        (
            {"system": [{"type": "text", "text": text} for text in ("a\nb", "c")]},
            {"system": [{"type": "text", "text": text} for text in ("a", "b\nc")]},
        ),
        ({"system": [{"type": "text", "text": "a"}]}, {"system": [{"type": "text", "text": "a", "cache_control": {}}]}),
        ({"system": ""}, {}),
        ({"system": None}, {"system": "null"}),
        ({"system": []}, {"system": "[]"}),
        ({"system": "a\nb"}, {"system": "a", "messages": [{"role": "system", "content": "b"}, LAST]}),
        ({"system": "a"}, {"messages": [{"role": "system", "content": "a"}, LAST]}),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b\nc"}, LAST]},
            {"system": "a\nb", "messages": [{"role": "system", "content": "c"}, LAST]},
        ),
    ],
)
def test_whatever_differs_in_a_system_prompt_is_named(here: dict[str, Any], there: dict[str, Any]) -> None:
    one, other = (parts_of(MESSAGES, "", {}, {"messages": [LAST], **body}) for body in (here, there))
    assert spans(one, other)


def test_an_input_of_one_text_is_the_last_message() -> None:
    plain = parts_of(RESPONSES, "", {}, {"input": "hi"})
    assert plain == {"endpoint": "responses", "last message": '""'}
    exact = parts_of(RESPONSES, "", {}, {"input": "hi", "top_logprobs": 2})
    assert exact["last message"] == '"hi"'
    assert spans(plain, parts_of(RESPONSES, "", {}, {"input": [LAST]}))


def test_the_inputs_of_a_batch_are_no_part() -> None:
    told = parts_of(
        EMBEDDINGS, "", {}, {"input": ["a", "b"], "model": "m", "dimensions": 8, "encoding_format": "float"}
    )
    assert told == {"endpoint": "embeddings", "model": "m", "parameter dimensions": "8"}


# Differences


@pytest.mark.parametrize(
    ("here", "there", "start", "mine", "theirs"),
    [
        ("It is 10:41 now.", "It is 10:47 now.", 6, "10:41", "10:47"),
        ("It is 10:41 now.", "It is 11:41 now.", 6, "10:41", "11:41"),
        ("a b c", "a x c", 2, "b", "x"),
        ("a b", "a b c", 3, "", " c"),
        ("a b c", "a b", 3, " c", ""),
        ("", "abc", 0, "", "abc"),
        ("abc", "", 0, "abc", ""),
        ("b c", "a b c", 0, "", "a "),
        ("x", "y", 0, "x", "y"),
    ],
)
def test_the_stretch_that_differs_is_whole_words(here: str, there: str, start: int, mine: str, theirs: str) -> None:
    (span,) = spans({"p": here}, {"p": there})
    assert (span.part, span.start, span.here, span.there) == ("p", start, mine, theirs)
    assert here[span.start : span.end] == mine


TEXTS = st.text(alphabet="ab1 :\n", max_size=20)


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_replacing_the_stretch_makes_one_text_of_the_other(before: str, one: str, other: str, after: str) -> None:
    here, there = before + one + after, before + other + after
    found = spans({"p": here}, {"p": there})
    assert bool(found) is (here != there)
    for span in found:
        assert 0 <= span.start <= span.end <= len(here)
        assert here[: span.start] + span.there + here[span.end :] == there


def test_equal_calls_differ_nowhere() -> None:
    assert spans(parts(model="a"), parts(model="a")) == []


def test_parts_that_one_has_alone_differ_too() -> None:
    found = spans({"a": "1", "b": "2"}, {"b": "2", "c": "3"})
    assert [(span.part, span.here, span.there) for span in found] == [("a", "1", ""), ("c", "", "3")]


def test_long_differences_are_cut() -> None:
    (span,) = spans({"p": "a" * 10_000}, {"p": "b" * 10_000})
    assert (span.start, span.end) == (0, 10_000)
    assert max(len(span.here), len(span.there), len(span.around)) <= 200
    assert span.looks_like == ""


def test_what_stands_around_is_shown_for_short_ones() -> None:
    (span,) = spans({"p": "x" * 100 + " 10:41 " + "y" * 100}, {"p": "x" * 100 + " 10:47 " + "y" * 100})
    assert span.here in span.around
    assert len(span.around) < 60


# Looks


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("10:41", "a time of day"),
        ("7:05:59 pm", "a time of day"),
        ("2026-11-22T10:41:07Z", "a time of day"),
        ("2026-11-22", "a date"),
        ("22.11.2026", "a date"),
        ("11/22/26", "a date"),
        ("Sunday", "a date or a day"),
        ("22 November", "a date or a day"),
        ("Nov 22", "a date or a day"),
        ("3f2a9c1e77ab", "an id"),
        ("550e8400-e29b-41d4-a716-446655440000", "an id"),
        ("1700000000", "a time stamp"),
        ("1700000000123", "a time stamp"),
        ("21.5 °C", "a number, such as a device's state"),
        ("on", ""),
        ("pirate", ""),
        ("", ""),
        ("1" * 500, ""),
    ],
)
def test_short_stretches_look_like_something(text: str, looks: str) -> None:
    assert looks_of(text) == looks


@pytest.mark.parametrize("word", ["maybe", "decide", "marble", "separate", "novel", "octopus", "augment"])
def test_words_that_begin_like_a_month_are_none(word: str) -> None:
    assert looks_of(word) == ""


# Likeness


def test_calls_that_differ_in_fewer_parts_then_in_shorter_stretches_are_more_alike() -> None:
    mine = {"model": "a", "system prompt": "It is 10:41. Be brief."}
    others = [
        {"model": "b", "system prompt": "It is 10:47. Be brief."},
        {"model": "a", "system prompt": "You are a pirate."},
        {"model": "a", "system prompt": "It is 10:47. Be brief."},
    ]
    assert sorted(others, key=lambda other: likeness(mine, other)) == others[::-1]
    assert likeness(mine, mine) < likeness(mine, others[2])
