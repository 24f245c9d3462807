"""What is one question in several spellings: equal forms, found by equal keys, with no difference to judge."""

# ruff: noqa: RUF001 - the characters that look like others are what is tested

from __future__ import annotations

import pytest

from proxy.cache.near.guard import Rule
from tests.near.asking import Asking

HALL = "How do I dim the lamp in the hall?"
FOLDED = {
    "case of plain words": ("Turn on the light in the hall", "turn on the light in the hall"),
    "every word with a capital": ("Turn On The Light In The Hall", "Turn on the light in the hall"),
    "all in capitals": ("TURN ON THE LIGHT IN THE HALL", "Turn on the light in the hall"),
    "final punctuation": ("what is the capital of france", "What is the capital of France?"),
    "several question marks": (f"{HALL}??", HALL),
    "contraction": ("I'm looking for a good restaurant in Rome", "I am looking for a good restaurant in Rome"),
    "negative contraction": ("I can't open the door of my car", "I cannot open the door of my car"),
    "contraction without apostrophe": ("Why dont cats swim in the sea?", "Why don't cats swim in the sea?"),
    "contraction of a question word": (
        "Where's the nearest station to the museum?",
        "Where is the nearest station to the museum?",
    ),
    "number word": ("Set a timer for five minutes", "Set a timer for 5 minutes"),
    "larger number word": ("Set the volume to twenty percent", "Set the volume to 20 percent"),
    "thousands separator": ("How much is 1,000 dollars in euros?", "How much is 1000 dollars in euros?"),
    "thousands separators": ("Is 1,250,000 too much for a house?", "Is 1250000 too much for a house?"),
    "attached unit": ("Remind me at 10pm to call my sister", "Remind me at 10 pm to call my sister"),
    "abbreviated unit": ("Remind me in 5 minutes to stir the soup", "Remind me in 5min to stir the soup"),
    "percent sign": ("What is 10 % of my salary?", "What is 10 percent of my salary?"),
    "British spelling": ("What colour is the sky at night?", "What color is the sky at night?"),
    "identifier without case": ("How does parseInt work in the browser?", "How does parseint work in the browser?"),
    "curly apostrophe": ("What’s the capital of France?", "What's the capital of France?"),
    "white space": ("\n  How do I dim \u00a0the lamp\tin the hall? \n", HALL),
    "non-breaking space": ("Set a timer for 5\u00a0minutes", "Set a timer for 5 minutes"),
    "full-width digits": ("Set a timer for ５ minutes", "Set a timer for 5 minutes"),
    "smiley": (f"{HALL} 🙂", HALL),
    "Spanish number word": ("Pon un temporizador de cinco minutos", "Pon un temporizador de 5 minutos"),
    "Spanish opening mark": ("¿Puedo llevar el perro en el tren?", "puedo llevar el perro en el tren?"),
}
COURTESY = {
    "please before": (f"Please, {HALL}", HALL),
    "please after": (f"{HALL} Please", HALL),
    "please at a command": ("Please dim the lamp in the hall", "dim the lamp in the hall"),
    "could you": ("Could you please dim the lamp in the hall?", "dim the lamp in the hall"),
    "greeting": (f"Hello, {HALL}", HALL),
    "greeting without comma": (f"hi {HALL}", HALL),
    "greeting with an exclamation mark": (f"Good morning! {HALL}", HALL),
    "hesitation": (f"Um, {HALL}", HALL),
    "announcement": (f"Quick question: {HALL}", HALL),
    "excuse": (f"Sorry to bother you, {HALL}", HALL),
    "wish to know": ("Can you tell me how I get to the port?", "Tell me how I get to the port"),
    "thanks": (f"{HALL} Thanks!", HALL),
    "thanks without punctuation": (f"{HALL} thank you", HALL),
    "thanks in advance": (f"{HALL} Thanks in advance!", HALL),
    "clause of thanks": (f"{HALL} Any help appreciated", HALL),
    "both ends": (f"Hi there, {HALL} Many thanks!", HALL),
    "Spanish greeting": ("Hola, ¿cómo cambio la rueda de la bici?", "¿Cómo cambio la rueda de la bici?"),
    "Spanish please and thanks": (
        "Por favor, ¿cómo cambio la rueda de la bici? Muchas gracias",
        "¿Cómo cambio la rueda de la bici?",
    ),
}
HEADS = {
    "how can I": ("How can I bake bread at home?", "How do I bake bread at home?"),
    "how to": ("How to bake bread at home?", "How do I bake bread at home?"),
    "how would I": ("How would I bake bread at home?", "How do I bake bread at home?"),
    "how does one": ("How does one bake bread at home?", "How do I bake bread at home?"),
    "may I": ("May I take the dog on the train?", "Can I take the dog on the train?"),
    "am I allowed to": ("Am I allowed to take the dog on the train?", "Can I take the dog on the train?"),
    "is it possible to": ("Is it possible to take the dog on the train?", "Can I take the dog on the train?"),
    "cómo se puede": ("¿Cómo se puede aparcar en el centro?", "¿Cómo puedo aparcar en el centro?"),
}
KEPT = {
    "how do you": ("How do you bake bread at home?", "How do I bake bread at home?"),
    "thank you after say": ("How do I say thank you in the letter?", "How do I say in the letter?"),
    "thanks after with": ("How do I end a letter with thanks", "How do I end a letter with"),
    "thanks after of": ("How do I write a letter of thanks", "How do I write a letter of"),
    "please after the word": ("What is the word for please", "What is the word for"),
    "please after spell": ("How do I spell please", "How do I spell"),
    "bare greeting": ("hello in French", "in French"),
    "nothing but courtesy": ("Thank you very much", "Hello"),
    "capitals that are a word": ("Send the US report to the team", "Send the us report to the team"),
    "an acronym that is a word": ("What does WHO say about malaria?", "What does who say about malaria?"),
    "thousands in brackets": ("Where on the map is (1,200) in red?", "Where on the map is (1200) in red?"),
    "a decimal comma": ("Is 1,5 litres of milk enough?", "Is 15 litres of milk enough?"),
    "a comma in Spanish": ("¿Cuánto son 1,200 metros en millas?", "¿Cuánto son 1200 metros en millas?"),
    "case of a unit": (
        "How long does it take to download 5 Mb over the network?",
        "How long does it take to download 5 MB over the network?",
    ),
    "case of a one-letter unit": ("Is 5 m of rope enough for the boat?", "Is 5 M of rope enough for the boat?"),
    "superscript": ("What is 10² plus 2?", "What is 102 plus 2?"),
    "decimal point": ("What is 1.5 plus 2?", "What is 15 plus 2?"),
    "white space in a code fence": ("How do I run this? ```x = 1\ny```", "How do I run this? ```x = 1 y```"),
}


def _table(cases: dict[str, tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("a", "b"), list(cases.values()), ids=list(cases))


@_table(FOLDED)
def test_spellings_of_one_question_are_equal(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).rule is Rule.EQUAL
    assert asking.share_a_key(a, b)


@_table(COURTESY)
def test_courtesy_at_the_ends_asks_nothing(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).rule is Rule.EQUAL
    assert asking.share_a_key(a, b)


@_table(HEADS)
def test_beginnings_that_ask_the_same_are_equal(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).rule is Rule.EQUAL
    assert asking.share_a_key(a, b)


@_table(KEPT)
def test_what_only_looks_like_spelling_or_courtesy_counts(asking: Asking, a: str, b: str) -> None:
    assert not asking.verdict(a, b).same
    assert not asking.verdict(b, a).same
