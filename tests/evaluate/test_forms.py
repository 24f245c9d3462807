"""What each form counts as a hit, as a false one and as possible, on the tiers as they serve."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.evaluate.run import Form
from tests.evaluate.conftest import Figures

FRANCE = "What is the capital of France?"
FRANCE_AGAIN = "what is the capital of france, please"
SPAIN = "What is the capital of Spain?"
PASSWORD = "How do I reset my password?"
PASSWORD_AGAIN = "How can I reset my password?"
PARAPHRASE = "I forgot the secret word for my account"


def pair(a: Any, b: Any, *, same: bool, **fields: str) -> dict[str, Any]:
    return {"a": a, "b": b, "same": same, **fields}


def logged(prompt: Any, cls: str, **fields: str) -> dict[str, Any]:
    return {"prompt": prompt, "cls": cls, **fields}


def counted(figures: dict[str, Any]) -> tuple[int, int, int, int]:
    return figures["lookups"], figures["positives"], figures["hits"], figures["false_hits"]


def test_pairs_alone(figures: Figures) -> None:
    found = figures(
        [
            pair(FRANCE, FRANCE_AGAIN, same=True, kind="same"),
            pair(FRANCE, FRANCE, same=True, kind="same"),
            pair(PASSWORD, PARAPHRASE, same=True, kind="same"),
            pair(FRANCE, SPAIN, same=False, kind="name"),
        ],
        Form.PAIR,
    )
    assert counted(found) == (4, 3, 2, 0)
    assert found["by_tier"] == {"exact": 1, "key": 1, "sketch": 0}
    assert found["by_rule"] == {"equal": 1}
    assert sum(found["refused"].values()) == 1
    assert found["recall"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["hit_rate"] == 0.5
    assert found["possible_hit_rate"] == 0.75
    assert found["by_kind"]["name"] == {"lookups": 1, "positives": 0, "hits": 0, "false_hits": 0}
    assert found["us_per_lookup_p50"] > 0


def test_a_hit_on_a_pair_that_is_labelled_different_is_false(figures: Figures) -> None:
    rows = [pair(FRANCE, FRANCE_AGAIN, same=False), pair(SPAIN, SPAIN, same=False)]
    found = figures(rows, Form.PAIR)
    assert counted(found) == (2, 0, 2, 2)
    assert found["false_per_hit"] == found["false_per_lookup"] == 1.0
    assert found["recall"] is None
    assert found["by_tier"] == {"exact": 1, "key": 1, "sketch": 0}


def test_pairs_are_alone_in_pair_form_and_together_in_replay(figures: Figures) -> None:
    rows = [pair(FRANCE, PASSWORD_AGAIN, same=False), pair(PASSWORD, SPAIN, same=False)]
    assert counted(figures(rows, Form.PAIR)) == (2, 0, 0, 0)
    # Nothing says that the two about passwords ask the same, so that hit counts as false.
    assert counted(figures(rows, Form.REPLAY)) == (2, 0, 1, 1)


@pytest.mark.parametrize(
    ("labels", "right"),
    [
        ({}, False),
        ({"ca": "x", "cb": "p"}, False),
        ({"ca": "x", "cb": "y"}, True),
    ],
)
def test_an_answer_class_makes_a_hit_right_in_replay(figures: Figures, labels: dict[str, str], right: bool) -> None:
    rows = [pair(FRANCE, PASSWORD_AGAIN, same=False, **labels), pair(PASSWORD, SPAIN, same=False, ca="y", cb="z")]
    assert counted(figures(rows, Form.REPLAY)) == (2, int(right), 1, int(not right))


def test_classes_that_a_pair_connects_are_one(figures: Figures) -> None:
    rows = [
        pair(FRANCE, PASSWORD_AGAIN, same=False, ca="x", cb="y"),
        pair(PASSWORD, SPAIN, same=False, ca="z", cb="s"),
        pair(PARAPHRASE, PASSWORD, same=True, ca="y", cb="z"),
    ]
    found = figures(rows, Form.REPLAY)
    assert counted(found) == (3, 2, 2, 0)
    assert found["by_tier"]["exact"] == 1


def test_what_a_pair_says_outweighs_its_classes_in_replay(figures: Figures) -> None:
    rows = [pair(FRANCE, FRANCE_AGAIN, same=False, ca="x", cb="x")]
    assert counted(figures(rows, Form.REPLAY)) == (1, 0, 1, 1)
    rows.append(pair(FRANCE, FRANCE_AGAIN, same=True))
    assert counted(figures(rows, Form.REPLAY)) == (2, 2, 2, 0)


def test_equal_texts_are_the_same_in_replay_whatever_their_label(figures: Figures) -> None:
    found = figures([pair(FRANCE, FRANCE, same=False)], Form.REPLAY)
    assert counted(found) == (1, 1, 1, 0)
    assert found["by_tier"] == {"exact": 1, "key": 0, "sketch": 0}
    assert found["us_per_lookup_p50"] is None


def test_a_conversation_matches_within_its_own_history_only(figures: Figures) -> None:
    history = [{"role": "user", "content": "I live in Oslo."}, {"role": "assistant", "content": "I see."}]
    other = [{"role": "user", "content": "I live in Rome."}, {"role": "assistant", "content": "I see."}]
    asked, again = {"role": "user", "content": FRANCE}, {"role": "user", "content": FRANCE_AGAIN}
    rows = [
        pair([*history, asked], [*history, again], same=True),
        pair([*history, asked], [*other, asked], same=False),
        pair([*history, asked], FRANCE, same=False),
        pair(history, history, same=True),
    ]
    for form in (Form.PAIR, Form.REPLAY):
        found = figures(rows, form)
        assert counted(found) == (4, 2, 2, 0)
        assert found["by_tier"] == {"exact": 1, "key": 1, "sketch": 0}


def test_a_log_in_its_order(figures: Figures) -> None:
    found = figures(
        [
            logged(FRANCE, "paris", kind="first"),
            logged(FRANCE, "paris", kind="verbatim"),
            logged(FRANCE_AGAIN, "paris", kind="variant"),
            logged(SPAIN, "madrid", kind="first"),
            logged(PASSWORD, "reset", kind="first"),
            logged(PARAPHRASE, "reset", kind="paraphrase"),
            logged(PARAPHRASE, "reset", kind="verbatim"),
        ],
        Form.TRACE,
    )
    assert counted(found) == (7, 4, 3, 0)
    assert found["by_tier"] == {"exact": 2, "key": 1, "sketch": 0}
    assert found["possible_hit_rate"] == pytest.approx(4 / 7, abs=1e-6)
    assert found["by_kind"]["verbatim"]["hits"] == 2


def test_a_hit_in_a_log_is_false_where_the_entry_has_another_class(figures: Figures) -> None:
    rows = [logged(FRANCE, "paris"), logged(FRANCE_AGAIN, "london"), logged(FRANCE, "london"), logged(SPAIN, "london")]
    found = figures(rows, Form.TRACE)
    # A false hit stores nothing, so that nothing was ever right for "london".
    assert counted(found) == (4, 0, 2, 2)


def test_volatile_prompts_are_stored_as_there_is_no_clock(figures: Figures) -> None:
    rows = [logged("What is the weather in Oslo today?", "x"), logged("what is the weather in oslo today", "x")]
    assert counted(figures(rows, Form.TRACE)) == (2, 1, 1, 0)


def test_many_entries_are_written_while_they_are_looked_up(figures: Figures) -> None:
    rows = [logged(f"How many metres are {number} feet?", f"{number}") for number in range(600)]
    rows += [logged(f"how many metres are {number} feet", f"{number}") for number in range(600)]
    assert counted(figures(rows, Form.TRACE)) == (1200, 600, 600, 0)


def test_a_threshold_keeps_what_is_less_alike_from_the_guard(figures: Figures) -> None:
    rows = [pair(FRANCE, "What is the captial of France?", same=True), pair(FRANCE, FRANCE_AGAIN, same=True)]
    found = figures(rows, Form.PAIR)
    assert found["by_tier"] == {"exact": 0, "key": 1, "sketch": 1}
    assert found["by_rule"] == {"typo": 1, "equal": 1}
    # Equal forms count as 1.0 whatever their words.
    found = figures(rows, Form.PAIR, threshold=1.0)
    assert found["by_tier"] == {"exact": 0, "key": 1, "sketch": 0}
    assert found["refused"] == {"score": 1}
