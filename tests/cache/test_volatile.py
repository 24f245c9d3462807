"""Prompts that speak of the present are found, in many languages, and quotations do not count."""

from __future__ import annotations

import json

import pytest

from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.cache.dialects.call import Call, read_call
from proxy.cache.volatile import is_volatile


@pytest.mark.parametrize(
    "text",
    [
        "What time is it?",
        "what's the weather like in Oslo",
        "Who is the current prime minister?",
        "the LATEST version of Debian",
        "What happened yesterday?",
        "Is the shop open right\nnow?",
        "¿Qué hora es?",
        "dame las noticias",
        "Wie wird das Wetter?",
        "Was läuft heute im Kino",
        "quelle heure est-il",
        "che ore sono",
        "que horas são",
        "hoe laat is het",
        "какая сегодня погода",
        "今天天气怎么样",
        "現在の時刻を教えて",
        "오늘 날씨 어때",
    ],
)
def test_the_present_is_recognised(text: str) -> None:
    assert is_volatile(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is the capital of France?",
        'Who sang the Beatles song "Yesterday"?',
        "What does `now()` return in SQL?",
        "Explain the film «Today»",
        "```\nlatest = 1\n```\nWhat does this do?",
        "I know a snowman",
        "¿Cuál es la capital de Francia?",
        "Wie hoch ist der Eiffelturm?",
        "法国的首都是哪里",
    ],
)
def test_timeless_questions_and_quotations_are_not(text: str) -> None:
    assert not is_volatile(text)


def test_it_is_the_last_user_message_that_counts() -> None:
    def volatile(*messages: tuple[str, str]) -> bool:
        body = {"messages": [{"role": role, "content": content} for role, content in messages]}
        call = read_call(CHAT, "", {}, json.dumps(body).encode())
        assert isinstance(call, Call)
        return call.volatile

    assert volatile(("user", "what is the weather"))
    assert volatile(("user", "what is the weather"), ("assistant", "let me see"), ("tool", "rain"))
    assert not volatile(("system", "Answer as of today"), ("user", "What is a fork?"))
    assert not volatile(("user", "news?"), ("assistant", "none"), ("user", "What is a fork?"))


def test_raw_prompts_count_as_a_whole() -> None:
    call = read_call(COMPLETIONS, "", {}, b'{"prompt": ["a", "the weather is"]}')
    assert isinstance(call, Call)
    assert call.volatile


@pytest.mark.parametrize(
    "text", ["this\n week", "up to date", "up-to-date", "real-time", "aujourd\u2019hui", "¿qué  tiempo?"]
)
def test_phrases_of_several_words_are_found_whatever_stands_between(text: str) -> None:
    assert is_volatile(text)


def test_a_long_prompt_is_read_at_both_ends() -> None:
    assert is_volatile("word " * 50_000 + "what is the weather")
    assert is_volatile("what is the weather " + "word " * 50_000)


@pytest.mark.parametrize("char", ["“", "`", "'", '"', "「", "„", "«", "```", " '"])
def test_no_run_of_quotes_takes_long(char: str) -> None:
    # A quadratic search would take minutes for this.
    assert not is_volatile(char * 200_000)
