"""The guard's verdicts: which differences pass, which refuse, and what they are called."""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cache.near.guard import Rule
from tests.near.asking import ENGLISH, SPANISH, THRESHOLD, Asking

PASSES = [
    (Rule.FILLER, "Can you actually swim in the lake in winter?", "Can you swim in the lake in winter?"),
    (Rule.FILLER, "Is there a bridge over the river?", "Is there bridge over the river?"),
    (Rule.FILLER, "Give me a list of the rivers of Spain", "Give me list of the rivers of Spain"),
    (Rule.ACCENT, "Where is the nearest café in the town?", "Where is the nearest cafe in the town?"),
    (Rule.ACCENT, "¿Cómo preparo un café con leche?", "¿Cómo preparo un cafe con leche?"),
    (Rule.ACCENT, "¿Cómo llego al cine?", "Como llego al cine?"),
    (Rule.TYPO, "How do I install the printer on my computer?", "How do I install the printre on my computer?"),
    (Rule.TYPO, "How do I restart the computer in the office?", "How do I restart the compuer in the office?"),
    (Rule.TYPO, "How do I boil the water for tea?", "How do I boil the watter for tea?"),
    (Rule.TYPO, "Who was the president of Mexico?", "Who was the prezident of Mexico?"),
    (Rule.TYPO, "Enciende la luz del pasillo del piso", "Enciende la luz del pasilllo del piso"),
    (Rule.JOINED, "How do I use my keyboard in the dark?", "How do I use my key board in the dark?"),
    (Rule.FRONTED, "On my phone, how do I change the ringtone?", "How do I change the ringtone on my phone?"),
    (Rule.FRONTED, "In the winter, can I grow herbs outside?", "Can I grow herbs outside in the winter?"),
]
REFUSES = [
    (Rule.NUMBER, "Set a timer for 5 minutes", "Set a timer for 6 minutes"),
    (Rule.NUMBER, "Set a timer for five minutes", "Set a timer for six minutes"),
    (Rule.NUMBER, "What happened at 10:30 in the garden?", "What happened at 10:31 in the garden?"),
    (Rule.NUMBER, "Is the shop open on the 3rd of May?", "Is the shop open on the 4th of May?"),
    (Rule.NUMBER, "Is a fever of 38.5 bad for a child?", "Is a fever of 39.5 bad for a child?"),
    (Rule.NUMBER, "Pon un temporizador de 5 minutos", "Pon un temporizador de 6 minutos"),
    (Rule.UNIT, "How far is 5 miles from here?", "How far is 5 kilometers from here?"),
    (Rule.UNIT, "Set the oven to 200 celsius", "Set the oven to 200 fahrenheit"),
    (Rule.UNIT, "Can I download 5 Mb in a second?", "Can I download 5 MB in a second?"),
    (Rule.NEGATION, "Can I eat this mushroom?", "Can I not eat this mushroom?"),
    (Rule.NEGATION, "Why does the pump start at night?", "Why does the pump not start at night?"),
    (Rule.NEGATION, "Turn on the light in the kitchen", "Don't turn on the light in the kitchen"),
    (Rule.NEGATION, "How do I cook with butter?", "How do I cook without butter?"),
    (Rule.NEGATION, "¿Puedo comer esta seta del bosque?", "¿No puedo comer esta seta del bosque?"),
    (Rule.ANTONYM, "How do I enable the firewall?", "How do I disable the firewall?"),
    (Rule.ANTONYM, "Turn on the kitchen lamp", "Turn off the kitchen lamp"),
    (Rule.ANTONYM, "How do I open a savings account?", "How do I close a savings account?"),
    (Rule.ANTONYM, "Should I eat before the run?", "Should I eat after the run?"),
    (Rule.ANTONYM, "Sube el volumen de la radio", "Baja el volumen de la radio"),
    (Rule.NAME, "Who was the first king of Norway?", "Who was the first king of Sweden?"),
    (Rule.NAME, "What did Anna give to the cat?", "What did Maria give to the cat?"),
    (Rule.NAME, "How do I learn Polish?", "How do I learn polish?"),
    (Rule.NAME, "How do I get to Bristol by train?", "How do I get to Bristl by train?"),
    (Rule.ORDER, "Can a shark eat a whale at night?", "Can a whale eat a shark at night?"),
    (Rule.ORDER, "In winter, can I grow herbs outside?", "Can I grow herbs outside in winter?"),
    (Rule.CODE, "What does `ls -l` do on a terminal?", "What does `ls -a` do on a terminal?"),
    (Rule.CODE, "Why does `foo()` fail with my data?", "Why does `bar()` fail with my data?"),
    (Rule.IDENTIFIER, "What does the option -d do in docker?", "What does the option -D do in docker?"),
    (Rule.IDENTIFIER, "How do I open /etc/hosts in my editor?", "How do I open /etc/Hosts in my editor?"),
    (Rule.IDENTIFIER, "Is https://example.org/a in my history?", "Is https://example.org/b in my history?"),
    (Rule.IDENTIFIER, "How do I block ann@example.org for a day?", "How do I block bob@example.org for a day?"),
    (Rule.IDENTIFIER, "How do I read a file in C?", "How do I read a file in C++?"),
    (Rule.IDENTIFIER, "How do I read a file in C++?", "How do I read a file in C#?"),
    (Rule.IDENTIFIER, "What does vitamin A do for the body?", "What does vitamin B do for the body?"),
    (Rule.IDENTIFIER, "How do I upgrade to v1.2 of the server?", "How do I upgrade to v1.3 of the server?"),
    (Rule.IDENTIFIER, "How does parseInt work in the browser?", "How does parseFloat work in the browser?"),
    (Rule.IDENTIFIER, "How do I fix error E404 in my app?", "How do I fix error E405 in my app?"),
    (Rule.SYMBOL, "What is 5 + 3 in the end?", "What is 5 - 3 in the end?"),
    (Rule.SYMBOL, "How much is $50 in the old money?", "How much is £50 in the old money?"),
    (Rule.SYMBOL, "Is a < b in this case true?", "Is a > b in this case true?"),
    (Rule.QUOTED, 'Who wrote the play "Hamlet" for us?', 'Who wrote the play "Macbeth" for us?'),
    (Rule.QUOTED, 'Where is the "red shoes" page of the shop?', 'Where is the "blue shoes" page of the shop?'),
    (Rule.PAYLOAD, "Translate into French: good morning", "Translate into French: good evening"),
    (Rule.FUNCTION_WORD, "Can I eat raw eggs at home?", "Should I eat raw eggs at home?"),
    (Rule.FUNCTION_WORD, "Is the shop open in May?", "Was the shop open in May?"),
    (Rule.FUNCTION_WORD, "What is the price of the boat for them?", "What is the price of the boat for her?"),
    (Rule.CONTENT_WORD, "How do I grow tomatoes on a balcony?", "How do I grow potatoes on a balcony?"),
    (Rule.CONTENT_WORD, "How do I bake bread at home?", "How do I bake fresh bread at home?"),
    (Rule.CONTENT_WORD, "How do I fix the chair in the hall?", "How do I fix the chairs in the hall?"),
    (Rule.CONTENT_WORD, "Where can I find a desert in the city?", "Where can I find a dessert in the city?"),
    (Rule.CONTENT_WORD, "¿Cuántos años tiene la niña?", "¿Cuántos anos tiene la niña?"),
    (Rule.CONTENT_WORD, "¿Es mi papá el dueño de la casa?", "¿Es mi papa el dueño de la casa?"),
    (Rule.ARTICLE, "What is the best car in the world?", "What is a best car in the world?"),
    (Rule.PUNCTUATION, "Let's eat, grandma is here", "Let's eat grandma is here"),
    (Rule.STATEMENT, "The printer is broken?", "The printer is broken."),
    (Rule.LANGUAGE, "How do I learn to drive in Spain?", "¿Cómo aprendo a conducir en España?"),
    (Rule.LANGUAGE, "How do I bake bread at home?", "Wie backe ich Brot zu Hause?"),
    (Rule.STRICT, "Wie spät ist es in Berlin?", "Wie spät ist es in Hamburg?"),
]
OTHER_QUESTIONS = [
    ("How do I drive to the lake?", "How do I drive from the lake?"),
    ("Where is my phone in the house?", "Where is your phone in the house?"),
    ("How do I train for less pain?", "How do I train for more pain?"),
    ("Who was the first man on the moon?", "Who was the last man on the moon?"),
    ("Does the cat chase the dog?", "Does the dog chase the cat?"),
    ("How do I get from the farm to the lake?", "How do I get from the lake to the farm?"),
    ("How do I bake a cake with form?", "How do I bake a cake with from?"),
    ("How do I train my horse at home?", "How do I train my house at home?"),
    ("Where is the green house in the park?", "Where is the greenhouse in the park?"),
    ("Explain the just noticeable difference to a child", "Explain the noticeable difference to a child"),
    ("Who are the doors?", "Who are doors?"),
    ("Are there shops open near the port?", "Are there the shops open near the port?"),
    ("¿Cuándo habló el presidente de la crisis?", "¿Cuándo hablo el presidente de la crisis?"),
    ("¿Sabe él dónde está la casa?", "¿Sabe el dónde está la casa?"),
    ("¿Abre el museo el lunes?", "¿Abre museo el lunes?"),
    ("¿Ves el cometa desde aquí?", "¿Ves la cometa desde aquí?"),
]
NOT_IN_A_REPEAT = ("not", "never", "without", "don't", "nobody")
NOT_IN_A_SPANISH_REPEAT = ("no", "nunca", "sin", "jamás", "nadie")
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Boston", "Delhi", "Quito", "Dublin")
JOURNEYS = (
    "How do I drive from {} to {} in a day?",
    "What is a cheap flight from {} to {} in the summer?",
    "How long does a letter from {} to {} take?",
    "Book me a seat on the train from {} to {}",
)


@pytest.mark.parametrize(("rule", "a", "b"), PASSES)
def test_a_difference_that_changes_nothing_passes_and_is_named(asking: Asking, rule: Rule, a: str, b: str) -> None:
    assert (asking.verdict(a, b).rule, asking.verdict(b, a).rule) == (rule, rule)
    assert asking.is_hit(a, b)
    assert asking.is_hit(b, a)


@pytest.mark.parametrize(("rule", "a", "b"), REFUSES)
def test_a_difference_that_may_matter_refuses_and_is_named(asking: Asking, rule: Rule, a: str, b: str) -> None:
    verdict, turned = asking.verdict(a, b), asking.verdict(b, a)
    assert (verdict.rule, turned.rule) == (rule, rule)
    assert not verdict.same
    assert not turned.same


@pytest.mark.parametrize(("a", "b"), OTHER_QUESTIONS)
def test_another_question_is_refused_by_whatever_name(asking: Asking, a: str, b: str) -> None:
    assert not asking.verdict(a, b).same
    assert not asking.verdict(b, a).same


def test_a_verdict_shows_what_made_it_decide(asking: Asking) -> None:
    verdict = asking.verdict("Set a timer for 5 minutes", "Set a timer for 6 minutes")
    assert (verdict.asked, verdict.stored) == (("5",), ("6",))


def test_too_many_slips_are_no_repeat(asking: Asking) -> None:
    right = (
        "When I got back to the house in the evening, the yellow lantern was in the kitchen, and there was a candle on "
        "the garden table. Why did the doctor leave them there with my blanket, and where should I put all of it?"
    )
    slips = {
        "lantern": "lanttern",
        "kitchen": "kitcchen",
        "candle": "canddle",
        "doctor": "docctor",
        "blanket": "blankket",
    }
    wrong = functools.reduce(lambda text, slip: text.replace(*slip), slips.items(), right)
    assert asking.verdict(right.replace("lantern", "lanttern"), right).rule is Rule.TYPO
    assert asking.verdict(wrong, right).rule is Rule.TOO_MANY


def test_what_is_less_similar_than_asked_for_is_not_judged(asking: Asking) -> None:
    stored = [asking.candidate("Which whales sing in the northern sea?")]
    one = asking.judged("How do I bake bread at home?", stored, THRESHOLD)[0]
    assert one.verdict.rule is Rule.SCORE
    assert not one.verdict.same
    assert one.score < THRESHOLD


def test_the_most_similar_stored_prompt_comes_first(asking: Asking) -> None:
    texts = [
        "How do I bake fresh bread in a large oven?",
        "How do I bake bread at home",
        "How do I bake fresh bread at home?",
    ]
    judged = asking.judged("How do I bake bread at home?", [asking.candidate(text) for text in texts], THRESHOLD)
    assert judged[0].candidate.words == texts[1]
    assert [one.score for one in judged] == sorted((one.score for one in judged), reverse=True)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=st.sampled_from((*ENGLISH, *SPANISH)))
def test_a_verdict_is_the_same_both_ways_and_each_text_repeats_itself(
    asking: Asking, data: st.DataObject, text: str
) -> None:
    edited = _edited(data, text)
    assert asking.verdict(text, edited).same == asking.verdict(edited, text).same
    assert asking.is_hit(edited, edited)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), text=st.sampled_from((*ENGLISH, *SPANISH)))
def test_what_passes_without_a_slip_is_found_by_equal_keys(asking: Asking, data: st.DataObject, text: str) -> None:
    edited = _edited(data, text)
    by_key = asking.verdict(edited, text).rule in (Rule.EQUAL, Rule.FILLER, Rule.ACCENT)
    assert asking.share_a_key(edited, text) or not by_key


@settings(deadline=None, max_examples=200)
@given(data=st.data(), text=st.sampled_from([text for text in (*ENGLISH, *SPANISH) if re.search(r"\d", text)]))
def test_no_other_digit_passes(asking: Asking, data: st.DataObject, text: str) -> None:
    at = data.draw(st.sampled_from([match.start() for match in re.finditer(r"\d", text)]))
    digit = data.draw(st.sampled_from([digit for digit in "0123456789" if digit != text[at]]))
    other = text[:at] + digit + text[at + 1 :]
    assert not asking.verdict(other, text).same
    assert not asking.verdict(text, other).same


@settings(deadline=None, max_examples=200)
@given(data=st.data(), text=st.sampled_from(ENGLISH), word=st.sampled_from(NOT_IN_A_REPEAT))
def test_no_negation_passes(asking: Asking, data: st.DataObject, text: str, word: str) -> None:
    _refuses_inserted(asking, data, text, word)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), text=st.sampled_from(SPANISH), word=st.sampled_from(NOT_IN_A_SPANISH_REPEAT))
def test_no_spanish_negation_passes(asking: Asking, data: st.DataObject, text: str, word: str) -> None:
    _refuses_inserted(asking, data, text, word)


@settings(deadline=None, max_examples=100)
@given(journey=st.sampled_from(JOURNEYS), cities=st.permutations(CITIES))
def test_there_and_back_are_two_journeys(asking: Asking, journey: str, cities: list[str]) -> None:
    there, back = journey.format(*cities[:2]), journey.format(cities[1], cities[0])
    assert not asking.verdict(there, back).same
    assert asking.is_hit(there, there)


def _refuses_inserted(asking: Asking, data: st.DataObject, text: str, word: str) -> None:
    words = text.split()
    at = data.draw(st.integers(0, len(words)))
    negated = " ".join([*words[:at], word, *words[at:]])
    assert not asking.verdict(negated, text).same
    assert not asking.verdict(text, negated).same


def _edited(data: st.DataObject, text: str) -> str:
    words = text.split()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(words) - 1))
        words[at] = data.draw(st.sampled_from(_changed(words[at])))
    return " ".join(word for word in words if word) or text


def _changed(word: str) -> list[str]:
    middle = len(word) // 2
    return [
        "",
        word.upper(),
        word.capitalize(),
        f"the {word}",
        f"please {word}",
        f"{word},",
        f"{word} really",
        f"{word}s",
        word[1:],
        f"{word[:middle]}{word[middle:][:1] * 2}{word[middle + 1 :]}",
        f"{word[:middle]} {word[middle:]}",
        f'"{word}"',
        word.translate(str.maketrans("áéíóúñ", "aeioun")),
    ]
