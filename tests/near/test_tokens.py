"""Typography is folded before anything is compared; what counts as it stands stays."""

# ruff: noqa: RUF001 - the characters that look like others are what is tested

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cache.near.tokens import Kind, collapse, fold_typography, is_uniform, tokenize, without_smileys
from tests.near.asking import ENGLISH, OTHER, SPANISH, Asking

SAME_CHARACTERS = [
    ("it’s ‘so’", "it's 'so'"),
    ("“word” „word“ «word»", '"word" "word" "word"'),
    ("10–20 — 5 − 3", "10-20 - 5 - 3"),
    ("a\u00a0b\u2009c\u3000d", "a b c d"),
    ("ａｂｃ １２３ （x）！", "abc 123 (x)!"),
    ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
    ("cafe\u0301", "café"),
    ("wait…", "wait..."),
]
KEPT_CHARACTERS = ["10²", "½", "ﬁ", "می\u200cخواهم", "क्\u200dष", "Ⅳ", "x₁", "™", "straße", "ı"]
AS_IT_STANDS = [
    ("run `ls -L` now", "`ls -L`"),
    ("run ```\nA = 1\n``` now", "```\nA = 1\n```"),
    ("read https://example.org/A?b=1 now", "https://example.org/A?b=1"),
    ("write to Ann@example.org now", "Ann@example.org"),
    ("open ~/Notes/a.txt now", "~/Notes/a.txt"),
    ("open ../Lib now", "../Lib"),
    ("open C:\\Temp now", "C:\\Temp"),
    ("use -D now", "-D"),
    ("use --No-Color now", "--No-Color"),
    ("learn C++ now", "C++"),
    ("learn C# now", "C#"),
    ("vitamin A now", "A"),
    ("take 1.5 now", "1.5"),
    ("take 10:30 now", "10:30"),
    ("take 3/4 now", "3/4"),
    ("use v1.2 now", "v1.2"),
    ("is 5 + 3 now", "+"),
    ("is (5) - (3) now", "-"),
    ("pay 50 € now", "€"),
    ("is a & b now", "&"),
    ("is a | b now", "|"),
    ("is a ^ b now", "^"),
    ("is a = b now", "="),
]


@pytest.mark.parametrize(("written", "plain"), SAME_CHARACTERS)
def test_spellings_of_the_same_characters_are_folded(written: str, plain: str) -> None:
    assert fold_typography(written) == plain


@pytest.mark.parametrize("text", KEPT_CHARACTERS)
def test_characters_that_mean_something_are_kept(text: str) -> None:
    assert fold_typography(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(("text", "token"), AS_IT_STANDS)
def test_what_counts_as_it_stands_is_one_exact_token(text: str, token: str) -> None:
    found = [one for one in tokenize(text) if one.text == token]
    assert [one.exact for one in found] == [True]


@pytest.mark.parametrize(
    ("text", "rest"),
    [("Read https://example.org/a.", "https://example.org/a"), ("Open /etc/hosts, now", "/etc/hosts")],
)
def test_punctuation_behind_an_address_is_none_of_it(text: str, rest: str) -> None:
    assert rest in [token.text for token in tokenize(text)]


def test_words_in_quotes_are_known_as_such_and_apostrophes_quote_nothing() -> None:
    tokens = tokenize("the word \"just\" isn't Anna's 'own idea'")
    assert [token.text for token in tokens if token.quoted] == ["just", "own", "idea"]


def test_a_capital_in_the_middle_of_a_sentence_makes_a_name() -> None:
    tokens = tokenize("Ask Maria. She knows the way to Oslo.")
    assert [token.text for token in tokens if token.name] == ["Maria", "Oslo"]


@pytest.mark.parametrize("text", ["ASK MARIA ABOUT THE WAY", "Ask Maria About The Way"])
def test_where_all_is_in_capitals_they_tell_no_names(text: str) -> None:
    assert is_uniform(text)
    assert not any(token.name for token in tokenize(text))


def test_numbers_stand_apart_from_their_units() -> None:
    tokens = tokenize("10pm 5min 1,000km")
    assert [(token.text, token.kind) for token in tokens] == [
        ("10", Kind.NUMBER),
        ("pm", Kind.WORD),
        ("5", Kind.NUMBER),
        ("min", Kind.WORD),
        ("1,000", Kind.NUMBER),
        ("km", Kind.WORD),
    ]


def test_white_space_collapses_but_not_where_code_stands() -> None:
    assert collapse(" a \n\t b ") == "a b"
    assert collapse(" a  b ```x\n  y``` ") == "a  b ```x\n  y```"


def test_smileys_go_at_the_end_only() -> None:
    assert without_smileys("what does it cost? 🙂👋") == "what does it cost?"
    assert without_smileys("what does 🙂 mean?") == "what does 🙂 mean?"


@given(st.text())
def test_folding_twice_changes_nothing_more(text: str) -> None:
    once = fold_typography(text)
    assert collapse(collapse(once)) == collapse(once)
    assert fold_typography(fold_typography(once)) == fold_typography(once)


@given(st.text())
def test_tokens_stand_in_their_order_within_the_text(text: str) -> None:
    tokens = tokenize(text)
    places = [(token.start, token.end) for token in tokens]
    assert places == sorted(places)
    assert all(0 <= start < end <= len(text) for start, end in places)


Written = Callable[[str], str]
TYPOGRAPHY: dict[str, Written] = {
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "composed": lambda text: unicodedata.normalize("NFC", text),
    "curly apostrophes": lambda text: text.replace("'", "’"),
    "two spaces": lambda text: text.replace(" ", "  "),
    "tabs": lambda text: text.replace(" ", "\t"),
    "line breaks": lambda text: f"\n{text}\n\n",
    "non-breaking spaces": lambda text: text.replace(" ", "\u00a0"),
    "zero-width spaces": lambda text: text.replace(" ", " \u200b"),
    "a zero-width space in a word": lambda text: f"{text[:7]}\u200b{text[7:]}",
    "byte order mark": lambda text: f"\ufeff{text}",
    "soft hyphen": lambda text: f"{text[:5]}\u00ad{text[5:]}",
    "full-width question mark": lambda text: text.replace("?", "？"),
}


@pytest.mark.parametrize("written", TYPOGRAPHY.values(), ids=list(TYPOGRAPHY))
@pytest.mark.parametrize("text", [*ENGLISH[:4], *SPANISH[:4], *OTHER])
def test_typography_never_makes_another_question(asking: Asking, text: str, written: Written) -> None:
    assert asking.verdict(written(text), text).same
    assert asking.share_a_key(written(text), text)


@settings(deadline=None, max_examples=200)
@given(
    text=st.sampled_from((*ENGLISH, *SPANISH, *OTHER)),
    many=st.lists(st.sampled_from([name for name in TYPOGRAPHY if name != "decomposed"])),
    decomposed=st.booleans(),
)
def test_nor_do_several_at_once(asking: Asking, text: str, many: list[str], decomposed: bool) -> None:
    changed = text
    for name in [*many, *["decomposed"] * decomposed]:
        changed = TYPOGRAPHY[name](changed)
    assert asking.is_hit(changed, text)
