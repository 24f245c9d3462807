"""Any text can be prepared, found again and compared."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.near.asking import SPACE, Asking

LONG = 20_000
ANYTHING = st.text(st.characters(exclude_categories=()), max_size=200)
WORDS = ("how do I", "please", "thanks!", "the", "not", "don't", "de la", "不", "谢谢", "translate:", "A", "5", "km")
SIGNS = ("C++", "-d", "/tmp/a", "a_b", "v1.2", "¿", "`", "```", '"', "'", ":", "(", ".", "🙂", "\n")
ODD = ("\u0301", "\u200d", "\ud800", "\x00", "\x1f")
PIECES = st.sampled_from((*WORDS, *SIGNS, *ODD))
MIXTURES = st.lists(PIECES, max_size=25).map(" ".join) | st.lists(PIECES, max_size=25).map("".join)
LONG_TEXTS = {
    "one word": "a" * LONG,
    "words": "the old boat " * (LONG // 13),
    "capitals": "A" * LONG,
    "digits": "7" * LONG,
    "spaces": " " * LONG,
    "Chinese": "水" * LONG,
    "combining marks": "e" + "\u0301" * (LONG // 5),
    "control characters": "\x00\x1f" * (LONG // 2),
    "surrogates": "\ud800" * (LONG // 5),
    "backticks": "`" * LONG,
    "identifiers": "a_b." * (LONG // 16),
    "a document and a question": "The boat left the old harbour at noon. " * (LONG // 39) + "Where is it now?",
}


@settings(deadline=None, max_examples=300)
@given(text=ANYTHING | MIXTURES)
@example("")
@example(" ")
@example("\ud800")
@example("please")
@example("Hi! Thanks!")
@example("?!")
def test_every_text_is_its_own_repeat(asking: Asking, text: str) -> None:
    assert asking.is_hit(text, text)


@settings(deadline=None, max_examples=300)
@given(a=ANYTHING | MIXTURES, b=ANYTHING | MIXTURES)
def test_any_two_texts_have_one_verdict(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).same == asking.verdict(b, a).same


@settings(deadline=None, max_examples=300)
@given(a=MIXTURES, b=MIXTURES)
def test_texts_of_equal_canonical_forms_share_a_key(asking: Asking, a: str, b: str) -> None:
    one, other = asking.matcher.prepare(a), asking.matcher.prepare(b)
    equal = (one.language, one.canonical) == (other.language, other.canonical)
    assert asking.share_a_key(a, b) or not equal


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=list(LONG_TEXTS))
def test_long_texts_too(asking: Asking, text: str) -> None:
    assert asking.is_hit(text, text)
    assert not asking.verdict(f"{text} x1", text).same
    assert asking.matcher.sketch(asking.matcher.prepare(text), SPACE).keys
