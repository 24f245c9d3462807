"""Text made to be slow: it is prepared, and twice as much of it is twice as much work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cache.near.tokens import fold_typography, tokenize
from tests.near.asking import SPACE, Asking

PIECES = {
    "at signs": "@",
    "addresses": "x@",
    "addresses with dots": "a@a.",
    "double colons": "::",
    "names with double colons": "a::",
    "hyphened letters": "a-",
    "hyphens": "-",
    "hyphens apart": "- ",
    "flags": " -a",
    "thanks": " thanks.",
    "thanks in Chinese": "谢谢。",
    "please": "please, ",
    "please in Chinese": "请",
    "greetings": "hi, ",
    "double quotes": '"',
    "quotations": '"a" ',
    "open quotations": "'a ",
    "apostrophes": "a'",
    "backticks": "`",
    "code": "`a",
    "opening brackets": "(",
    "closing brackets": "]",
    "brackets": "{}",
    "emoji": "🙂",
    "emoji apart": "🙂 ",
    "joined emoji": "🙂\u200d",
    "combining marks": "\u0301",
    "letters with combining marks": "e\u0301\u0302",
    "zero-width spaces": "\u200b",
    "paths": "/a",
    "folders": "w/",
    "dotted names": "a.",
    "versions": "v1.",
    "numbers": "1,000",
    "degrees": "5 °",
    "mixed case": "aB",
    "underscores": "_",
    "question marks": "?",
    "full stops apart": " .",
    "commas apart": " ,",
    "line breaks": "a\n",
    "articles": "the ",
    "negations": "don't ",
}
LENGTH = 2000
STARTS = ("", "How do I get to the lake", "Translate: ", "hi", "¿Cómo llego al lago")
ENDS = ("", "x", "?", " thanks", "!")


@pytest.mark.parametrize("piece", PIECES.values(), ids=list(PIECES))
def test_hostile_text_is_prepared_and_is_its_own_repeat(asking: Asking, piece: str) -> None:
    text = _repeated(piece, LENGTH)
    for start in STARTS:
        whole = start + text
        assert asking.is_hit(whole, whole)
        assert len(asking.matcher.prepare(whole).tokens) <= len(whole)
    assert asking.matcher.sketch(asking.matcher.prepare(text), SPACE).keys


@pytest.mark.parametrize("piece", PIECES.values(), ids=list(PIECES))
def test_twice_as_much_text_has_about_twice_as_many_tokens(piece: str) -> None:
    once, twice = (tokenize(fold_typography(_repeated(piece, length))) for length in (LENGTH, 2 * LENGTH))
    assert len(once) <= LENGTH
    assert abs(len(twice) - 2 * len(once)) <= 4


@settings(deadline=None, max_examples=60)
@given(
    start=st.sampled_from(STARTS),
    pieces=st.lists(st.sampled_from(list(PIECES.values())), min_size=1, max_size=3),
    end=st.sampled_from(ENDS),
)
def test_mixtures_of_hostile_text_too(asking: Asking, start: str, pieces: list[str], end: str) -> None:
    text = start + "".join(_repeated(piece, LENGTH // 2) for piece in pieces) + end
    assert asking.is_hit(text, text)


def _repeated(piece: str, length: int) -> str:
    return piece * (length // len(piece))
