"""Lists of a language apply where a prompt is plainly in it, and nowhere else."""

from __future__ import annotations

import pytest

from proxy.cache.near.matcher import Matcher
from tests.near.asking import ENGLISH, OTHER, SPANISH

ELSEWHERE = (
    *OTHER,
    "Onde fica a estação de comboios mais próxima?",
    "Dove si trova la stazione dei treni più vicina?",
    "Waar is het dichtstbijzijnde station in de stad?",
    "Var ligger den närmaste tågstationen i staden?",
    "Quina és l'estació de tren més propera a casa?",
    "Unde este cea mai apropiată gară din oraș?",
    "Wann kommt der Zug an in Berlin",
    "On est allé au restaurant en France",
)
TOO_SHORT = ("", "?", "bread", "Hola", "No", "123", "de la", "Brot backen")


@pytest.mark.parametrize(
    "text",
    [
        *ENGLISH,
        "TURN ON THE LIGHT IN THE HALL",
        "whats the capital of france",
        "How do I install the printre on my computer?",
    ],
)
def test_english_is_recognised(matcher: Matcher, text: str) -> None:
    assert matcher.prepare(text).language == "en"


@pytest.mark.parametrize("text", [*SPANISH, "¿Dónde está la estación?", "donde esta la estacion de tren mas cercana"])
def test_spanish_is_recognised_also_without_accents(matcher: Matcher, text: str) -> None:
    assert matcher.prepare(text).language == "es"


@pytest.mark.parametrize("text", ELSEWHERE)
def test_other_languages_are_not_taken_for_one_with_lists(matcher: Matcher, text: str) -> None:
    assert matcher.prepare(text).language == ""


@pytest.mark.parametrize("text", TOO_SHORT)
def test_too_short_to_tell_is_no_language(matcher: Matcher, text: str) -> None:
    assert matcher.prepare(text).language == ""


def test_what_is_quoted_does_not_make_the_language(matcher: Matcher) -> None:
    assert matcher.prepare('How do I write to the shop "La casa de los libros"?').language == "en"
