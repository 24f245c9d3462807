"""Texts in pieces of about a token: nothing is lost, and no piece is long."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.answer import Recorded
from proxy.cache.dialects import CHAT
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.pieces import pieces
from tests.cache.test_round_trip import CASES, assembled, events_of

ANYTHING = st.text(st.characters(exclude_categories=["Cs"]))
LIKELY = st.text(st.sampled_from("ab ,.\n\t_1é漢ひ한ไ🐢\u0301\u200d\r\x00\x85\u2028"), max_size=60)
LONGEST = 16
"""Blanks in one piece; of anything else there are fewer."""


@given(ANYTHING | LIKELY)
def test_joined_they_are_the_text(text: str) -> None:
    cut = pieces(text)
    assert "".join(cut) == text
    assert cut
    assert max(map(len, cut)) <= LONGEST
    assert all(cut) or list(cut) == [""]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", [""]),
        ("Hello there.", ["Hello", " there", "."]),
        ("a\n\nb  c", ["a", "\n\n", "b", "  ", "c"]),
        ("incomprehensibility", ["incompre", "hensibil", "ity"]),
        ("12345 67", ["123", "45", " 67"]),
        ("snake_case(x)", ["snake", "_", "case", "(", "x", ")"]),
        ("日本語です", ["日本", "語で", "す"]),
        ("สวัสดี", ["สว", "ัส", "ดี"]),
        ("...!?", ["...", "!?"]),
    ],
)
def test_they_are_about_a_token_each(text: str, cut: list[str]) -> None:
    assert list(pieces(text)) == cut


@given(CASES)
def test_a_stream_in_pieces_says_all_that_the_whole_answer_says(case: tuple[Dialect, dict[str, Any]]) -> None:
    dialect, body = case
    recorded = assembled(dialect, dialect.stream(body, include_usage=True, pieces=pieces).render("new", 2), [])
    assert isinstance(recorded, Recorded)
    assert recorded.body == {"usage": None, **body}


def test_each_piece_is_an_event_of_its_own() -> None:
    message = {"role": "assistant", "content": "one two three", "reasoning_content": "four five"}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    events = events_of(CHAT.stream(body, include_usage=False, pieces=pieces).render("new", 2))
    said = [event["choices"][0]["delta"] for event in events]
    assert said == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "four"},
        {"reasoning_content": " five"},
        {"content": "one"},
        {"content": " two"},
        {"content": " three"},
        {},
    ]
