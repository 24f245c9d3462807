"""The last calls that the cache could not answer: bounded, apart by namespace, and read only when somebody asks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.cache.dialects import CHAT
from proxy.cache.dialects.call import Call, read_call
from proxy.cache.parts import Span, parts_of
from proxy.cache.recent import RecentCalls

MINE, OTHER = b"mine", b"other"


def asked(system: str = "", words: str = "hi", **fields: Any) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": words}], **fields}


def call_of(body: dict[str, Any]) -> Call:
    call = read_call(CHAT, "", {}, json.dumps(body).encode())
    assert isinstance(call, Call)
    return call


def note(recent: RecentCalls, body: dict[str, Any], namespace: bytes = MINE) -> None:
    recent.note(call_of(body), namespace, CHAT, "", {}, json.dumps(body).encode())


def nearest(recent: RecentCalls, body: dict[str, Any], namespace: bytes = MINE) -> list[Span]:
    return recent.nearest_elsewhere(call_of(body), namespace, parts_of(CHAT, "", {}, body))


@pytest.fixture
def recent() -> RecentCalls:
    return RecentCalls()


# The nearest call elsewhere


def test_nothing_was_seen_yet(recent: RecentCalls) -> None:
    assert nearest(recent, asked("Be brief.")) == []
    assert recent.changing_system() == []


def test_calls_of_the_same_space_are_not_elsewhere(recent: RecentCalls) -> None:
    note(recent, asked("Be brief.", "one"))
    assert nearest(recent, asked("Be brief.", "two")) == []


def test_the_most_similar_call_of_another_space_is_found(recent: RecentCalls) -> None:
    for system in ("You are a pirate.", "It is 10:41. Be brief.", "Nothing."):
        note(recent, asked(system))
    (span,) = nearest(recent, asked("It is 10:47. Be brief.", "other words"))
    assert (span.part, span.here, span.there, span.looks_like) == ("system prompt", "10:47.", "10:41.", "a time of day")


def test_the_latest_wins_among_equals(recent: RecentCalls) -> None:
    for clock in ("10:41", "10:42"):
        note(recent, asked(f"It is {clock}. Be brief."))
    (span,) = nearest(recent, asked("It is 10:43. Be brief."))
    assert span.there == "10:42."


def test_calls_of_another_namespace_are_never_told(recent: RecentCalls) -> None:
    note(recent, asked("The word is xyzzy."), OTHER)
    assert nearest(recent, asked("The word is secret.")) == []
    assert nearest(recent, asked("The word is secret."), OTHER)[0].there == "xyzzy."


def test_only_so_many_calls_are_remembered(recent: RecentCalls) -> None:
    note(recent, asked("It is 10:41. Be brief."))
    for number in range(1000):
        note(recent, asked("Be brief.", f"question {number}"))
    (span,) = nearest(recent, asked("It is 10:47. Be brief."))
    assert "10:41" not in span.there


def test_large_calls_are_not_remembered(recent: RecentCalls) -> None:
    note(recent, asked("Be brief.", "x" * 70_000))
    assert nearest(recent, asked("Be kind.")) == []


# A system prompt that changes


def test_a_changing_clock_is_a_habit_from_the_fifth_call(recent: RecentCalls) -> None:
    for minute in range(41, 45):
        note(recent, asked(f"It is 10:{minute} now. Be brief.", model="m"))
    assert recent.changing_system() == []
    note(recent, asked("It is 10:45 now. Be brief.", model="m"))
    (changing,) = recent.changing_system()
    assert (changing.model, changing.calls) == ("m", 5)
    assert (changing.span.start, changing.span.end, changing.span.looks_like) == (6, 11, "a time of day")


@pytest.mark.parametrize(
    "systems",
    [
        ["Be brief."] * 20,
        [f"It is 10:{minute // 2} now. Be brief." for minute in range(20, 40)],
        [""] * 20,
        [word * 10 for word in ("alpha", "bravo", "kilo", "mike", "zulu", "tango")],
    ],
)
def test_what_is_stable_absent_or_altogether_different_is_no_habit(recent: RecentCalls, systems: list[str]) -> None:
    for number, system in enumerate(systems):
        note(recent, asked(system, f"question {number}"))
    assert recent.changing_system() == []


def test_models_and_namespaces_are_looked_at_one_by_one(recent: RecentCalls) -> None:
    for minute in range(41, 47):
        system = f"It is 10:{minute} now. Be brief."
        note(recent, asked(system, model="a"), MINE if minute % 2 else OTHER)
        note(recent, asked(system, model="b"))
        note(recent, asked("Be brief.", f"{minute}", model="c"))
    assert [changing.model for changing in recent.changing_system()] == ["b"]


def test_only_the_last_calls_count(recent: RecentCalls) -> None:
    for minute in range(10, 40):
        note(recent, asked(f"It is 10:{minute} now. Be brief."))
    for number in range(5):
        note(recent, asked("It is day. Be brief.", f"question {number}"))
    assert recent.changing_system() == []
