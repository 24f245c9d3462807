"""Prompts that work on their own wording: every letter of their data counts; around it, the usual may differ."""

# ruff: noqa: RUF001 - prompts in other scripts

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.near.asking import Asking

ANOTHER_TEXT = {
    "a slip to be corrected": ("Correct the spelling: wether", "Correct the spelling: weather"),
    "a slip to be corrected without colon": ("Correct the spelling of wether", "Correct the spelling of weather"),
    "letters to be counted": ("How many letters are in accomodate?", "How many letters are in accommodate?"),
    "accents to be counted": ("Count the letters in the word 'cafe'", "Count the letters in the word 'café'"),
    "case to be judged": ("Is Abbey road in title case?", "Is Abbey Road in title case?"),
    "case to be sorted by": ("Sort these words: pear, Apple, fig", "Sort these words: pear, apple, fig"),
    "courtesy to be translated": ("Translate to German: hi, thanks a lot", "Translate to German: hi"),
    "courtesy to be rewritten": (
        "Rewrite this politely: close the door, please",
        "Rewrite this politely: close the door",
    ),
    "courtesy to be said": ("Say thank you politely: close the door", "Say politely: close the door"),
    "article to be translated": ("Translate to German: I like the red car", "Translate to German: I like a red car"),
    "filler to be explained": ("What is a synonym for just?", "What is a synonym for really?"),
    "article to be explained": ("What does 'a' mean in a text?", "What does 'the' mean in a text?"),
    "contraction to be explained": ('What does "gonna" mean?', 'What does "going to" mean?'),
    "spelling to rhyme with": ("What rhymes with colour?", "What rhymes with color?"),
    "number word to be repeated": ("Repeat after me: twenty", "Repeat after me: 20"),
    "spaces to be kept": ("Reverse the string abc def", "Reverse the string abc  def"),
    "punctuation to be judged": ("Proofread this: come here Anna", "Proofread this: come here, Anna"),
    "an article in a title": ("Who sings the song The Chain?", "Who sings the song Chain?"),
    "a word twice in a name": ("Who sang in the band The The?", "Who sang in the band The?"),
    "Spanish article": ("Traduce al inglés: el perro", "Traduce al inglés: un perro"),
    "Spanish slip": ("Corrige la ortografía: ombre", "Corrige la ortografía: hombre"),
    "Spanish accent": ("¿Cuántas letras tiene camión?", "¿Cuántas letras tiene camion?"),
    "German case": ("Übersetze ins Englische: bitte", "Übersetze ins Englische: Bitte"),
    "Chinese courtesy": ("把这句话翻译成英文：你好", "把这句话翻译成英文：您好"),
}
ANOTHER_HEAD = {
    "please": ("Please translate to German: the red car", "Translate to German: the red car"),
    "can you": ("Can you translate this into French: good morning", "translate this into French: good morning"),
    "contraction": ('What\'s a synonym for "brave"?', 'What is a synonym for "brave"?'),
    "greeting": ("Hi, what rhymes with orange?", "What rhymes with orange?"),
    "thanks behind quotes": ('What does "gist" mean? Thanks!', 'What does "gist" mean?'),
    "Spanish please": ("Por favor, traduce al inglés: el perro", "Traduce al inglés: el perro"),
}
HEADS = (
    "Translate into French: {}",
    "Correct the spelling of this sentence: {}",
    "How many letters are in the word {}",
    "Please repeat the following words: {}",
    "Traduce al inglés esta frase: {}",
)


@pytest.mark.parametrize(("a", "b"), ANOTHER_TEXT.values(), ids=list(ANOTHER_TEXT))
def test_another_text_is_another_question(asking: Asking, a: str, b: str) -> None:
    assert not asking.verdict(a, b).same
    assert not asking.verdict(b, a).same


@pytest.mark.parametrize(("a", "b"), ANOTHER_HEAD.values(), ids=list(ANOTHER_HEAD))
def test_around_the_text_the_usual_may_differ(asking: Asking, a: str, b: str) -> None:
    assert asking.is_hit(a, b)
    assert asking.is_hit(b, a)


@settings(deadline=None, max_examples=300)
@given(
    head=st.sampled_from(HEADS),
    words=st.lists(
        st.sampled_from(["the", "Rain", "a", "cafe", "café", "please", "two", "2", "color", "colour"]), min_size=1
    ),
    others=st.lists(
        st.sampled_from(["the", "rain", "an", "cafe", "café", "please", "two", "2", "color", "colour"]), min_size=1
    ),
)
def test_any_other_words_are_another_text(asking: Asking, head: str, words: list[str], others: list[str]) -> None:
    assume(words != others)
    a, b = head.format(" ".join(words)), head.format(" ".join(others))
    assert not asking.verdict(a, b).same
    assert asking.is_hit(a, a)
