"""The bench of time to first token: its calls are what they claim to be, and its rows judge what was measured."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.first_token import First, event_in, median_ms
from bench.load import Invalid
from bench.prefixes import first_turns_of, rows_of
from bench.talks import (
    LONG_WORDS,
    SERVICES,
    SHORT_WORDS,
    growing_talks,
    interleaved,
    new_talk,
    pasted,
    question,
    random_services,
    system_prompt,
)


def _firsts(*ms: float, cached: int = 0, computed: int = 100) -> list[First]:
    return [First(value, cached, computed, "word") for value in ms]


@pytest.mark.parametrize("words", [SHORT_WORDS, LONG_WORDS])
def test_system_prompts_have_their_length_and_no_beginning_in_common(words: int) -> None:
    prompts = [system_prompt(service, words) for service in range(len(SERVICES))]
    assert {len(prompt.split()) for prompt in prompts} == {words}
    assert len({prompt[0] for prompt in prompts}) == len(SERVICES)


def test_every_run_asks_the_same() -> None:
    def texts() -> list[object]:
        talks = growing_talks(random.Random(1), itertools.count())
        return [talks, interleaved(talks, random.Random(2)), random_services(random.Random(3), 20)]

    assert texts() == texts()


def test_no_question_and_no_pasted_text_comes_twice() -> None:
    assert len({question(number) for number in range(2000)}) == 2000
    assert len({pasted(number) for number in range(200)}) == 200
    assert max(len(question(number).split()) for number in range(2000)) < 40


def test_a_conversation_grows_past_four_times_its_system_prompt() -> None:
    for talk in growing_talks(random.Random(4), itertools.count()):
        while talk.ahead:
            talk.ask()
            talk.answered("Yes.")
        words = [len(message["content"].split()) for message in talk.messages]
        assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 3]
        assert sum(words) > 4 * words[0]


def test_each_service_has_one_conversation_a_round() -> None:
    talks = growing_talks(random.Random(5), itertools.count())
    assert sorted(talk.service for talk in talks) == list(range(len(SERVICES)))


def test_turns_of_open_conversations_come_in_between_and_all_come() -> None:
    talks = growing_talks(random.Random(6), itertools.count())
    order = interleaved(talks, random.Random(7), at_once=3)
    assert Counter(order) == dict.fromkeys(range(len(talks)), 3)
    assert order != sorted(order)
    for end in range(len(order)):
        begun, ended = set(order[:end]), {at for at in order[:end] if order[:end].count(at) == 3}
        assert len(begun - ended) <= 3


def test_first_turns_are_those_of_conversations_not_seen_before() -> None:
    assert first_turns_of([2, 0, 2, 1, 0]) == [True, True, False, True, False]


def test_a_new_conversation_is_the_system_prompt_and_a_question() -> None:
    asked = new_talk(3, SHORT_WORDS, ["How?"]).ask()
    assert asked == [
        {"role": "system", "content": system_prompt(3, SHORT_WORDS)},
        {"role": "user", "content": "How?"},
    ]


def test_a_round_counts_by_its_median_and_the_target_by_the_median_of_ratios() -> None:
    slow = (_firsts(900, 100, 110), _firsts(1000, 100, 1000))
    fast = (_firsts(10, 20, 30, cached=90, computed=10), _firsts(90, 100, 110))
    time, computed = rows_of("services: many", "off", [slow, fast, fast], 0.3)
    assert time.nearhit == (110, 20, 20)
    assert time.reference == (1000, 100, 100)
    assert (time.ratio, time.holds) == (0.2, True)
    assert computed.nearhit == (100, 10, 10)
    assert computed.holds is None


def test_a_missed_target_is_told() -> None:
    (time, *_) = rows_of("restart", "cold", [(_firsts(30), _firsts(100))], 0.2)
    assert time.holds is False


def test_spread_is_what_lies_between_the_quartiles() -> None:
    *_, spread = rows_of("miss", "off", [(_firsts(1, 2, 3, 4, 5, 6, 7), _firsts(*[5] * 7))], 1.05, spread=True)
    assert (spread.nearhit, spread.reference) == ((4,), (0,))


def test_nothing_measured_says_nothing() -> None:
    with pytest.raises(Invalid):
        median_ms([])


@pytest.mark.parametrize(
    ("line", "event"),
    [(b'data: {"a": 1}\n', {"a": 1}), (b"data: [DONE]\n", None), (b": ping\n", None), (b"\n", None)],
)
def test_events_are_read_from_lines(line: bytes, event: object) -> None:
    assert event_in(line) == event


def test_an_unknown_scenario_is_told_in_one_line() -> None:
    result = CliRunner().invoke(main, ["prefixes", "--only", "restart,nonsense"])
    assert result.exit_code == 2
    assert "nonsense: choose from restart, services, growing, miss" in result.output
    assert "Traceback" not in result.output
