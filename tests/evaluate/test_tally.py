"""Rates, intervals, and sums that must add up whatever the labels say."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.cache.near.matcher import Matcher
from proxy.evaluate.run import Form, Options, Show, evaluate
from proxy.evaluate.tally import MOST_SHOWN, Tally, differences, percentile, wilson_upper
from tests.evaluate.conftest import Figures
from tests.evaluate.watching import Watched


@pytest.mark.parametrize(
    ("count", "of", "upper"),
    # As R's prop.test(count, of, correct = FALSE) has them, to three digits.
    [(0, 1, 0.793), (0, 10, 0.278), (1, 10, 0.404), (5, 10, 0.763), (10, 10, 1.0), (0, 1243, 0.00308), (8, 220, 0.070)],
)
def test_the_upper_end_of_the_interval(count: int, of: int, upper: float) -> None:
    assert wilson_upper(count, of) == pytest.approx(upper, rel=0.005)


@given(st.integers(1, 100_000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_the_interval_has_the_share_in_it(counts: tuple[int, int]) -> None:
    count, of = counts
    assert count / of <= wilson_upper(count, of) + 1e-12
    assert wilson_upper(count, of) <= 1


@pytest.mark.parametrize(("percent", "value"), [(50, 50.0), (99, 99.0), (1, 1.0), (100, 100.0), (0, 1.0)])
def test_percentiles_are_values_that_occurred(percent: int, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], percent) == value


def test_nothing_has_no_rates() -> None:
    assert percentile([], 50) is None
    empty = Tally().as_json()
    rates = "recall", "hit_rate", "possible_hit_rate", "false_per_hit", "false_per_hit_upper95", "false_per_lookup"
    assert {empty[name] for name in rates} == {None}


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ("one two", "one two", ()),
        ("turn it on", "turn it off now", (("on", "off now"),)),
        ("a b c", "b c d", (("a", ""), ("", "d"))),
        ("", "x", (("", "x"),)),
    ],
)
def test_the_words_in_which_texts_differ(stored: str, asked: str, found: tuple[tuple[str, str], ...]) -> None:
    assert differences(stored, asked) == found


def test_shown_cases_are_bounded(figures: Figures) -> None:
    number = MOST_SHOWN + 7
    rows = [{"a": f"What is {n} + 1?", "b": f"what is {n} + 1", "same": False} for n in range(number)]
    found = figures(rows, Form.PAIR, Show.FALSE)
    assert found["false_hits"] == number
    assert (len(found["cases"]), found["cases_left_out"]) == (MOST_SHOWN, 7)
    assert found["cases"][0]["line"] == 1
    assert "cases" not in figures(rows[:1], Form.PAIR)


PROMPTS = st.sampled_from(
    [
        "What is the capital of France?",
        "what is the capital of france",
        "What is the captial of France?",
        "What is the capital of Spain?",
        "How do I reset my password?",
        "How can I reset my password, please?",
        "Wie setze ich mein Passwort zurück?",
        "",
    ]
)
NAMES = st.none() | st.sampled_from(["x", "y", "z"])
PAIRS = st.fixed_dictionaries(
    {"a": PROMPTS, "b": PROMPTS, "same": st.booleans(), "kind": NAMES, "source": NAMES, "ca": NAMES, "cb": NAMES}
)
LOGGED = st.fixed_dictionaries({"prompt": PROMPTS, "cls": st.sampled_from(["x", "y"]), "kind": NAMES})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(PAIRS | LOGGED, min_size=1, max_size=12), show=st.none() | st.sampled_from(Show))
def test_counts_add_up(matcher: Matcher, rows: list[dict[str, Any]], show: Show | None) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        report = evaluate([file], Options(show=show), Watched(), loading=lambda: matcher)
    sets = report.as_json()["sets"]
    assert report.false_hits == sum(one["false_hits"] for one in sets)
    pairs = sum("a" in row for row in rows)
    assert {one["form"]: one["lookups"] for one in sets} == {
        **({"pair": pairs, "replay": pairs} if pairs else {}),
        **({"trace": len(rows) - pairs} if pairs < len(rows) else {}),
    }
    for one in sets:
        _adds_up(one)


def _adds_up(one: dict[str, Any]) -> None:
    right = one["hits"] - one["false_hits"]
    missed = sum(one["refused"].values())
    assert 0 <= right <= one["positives"] <= one["lookups"]
    assert one["hits"] <= one["lookups"]
    assert right + missed <= one["positives"] <= one["hits"] + missed
    assert sum(one["by_tier"].values()) == one["hits"]
    assert sum(one["by_rule"].values()) == one["by_tier"]["key"] + one["by_tier"]["sketch"]
    for group in (one["by_kind"], one["by_source"]):
        for name in ("lookups", "positives", "hits", "false_hits"):
            assert sum(of[name] for of in group.values()) == one[name]
    for case in one.get("cases", ()):
        assert case["rule"]
