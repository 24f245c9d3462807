"""What an evaluation hands over: one JSON object for programs, tables and cases for people."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from proxy.cache.near.matcher import Matcher
from proxy.evaluate import world
from proxy.evaluate.run import EvaluationError, Form, Options, Report, Show, evaluate
from proxy.evaluate.screen import Watching, render
from storage.base import StorageFull
from tests.evaluate.watching import Watched

FRANCE = {"a": "What is the capital of France?", "b": "what is the capital of france", "same": True, "kind": "case"}
WRONG = {"a": "How do I stop it?", "b": "how do i stop it", "same": False, "kind": "mis[b]labelled\x1b[31m"}
MISSED = {"a": "How do I stop it?", "b": "make\nit cease", "same": True, "kind": "paraphrase"}
LONG = {"a": f"{'word ' * 200}end", "b": f"{'word ' * 200}stop", "same": True}
LOGGED = {"prompt": "hello there", "cls": "greeting"}

COUNTS = {"lookups": int, "positives": int, "hits": int, "false_hits": int}
RATES = ("recall", "hit_rate", "possible_hit_rate", "false_per_hit", "false_per_hit_upper95", "false_per_lookup")
TIMES = ("us_per_lookup_p50", "us_per_lookup_p99")
GROUPS = ("by_kind", "by_source", "by_tier", "by_rule", "refused")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    pairs, log = tmp_path / "pairs.jsonl", tmp_path / "log.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in (FRANCE, WRONG, MISSED, LONG)))
    log.write_text(json.dumps(LOGGED) + "\n")
    return pairs, log


def run(files: Sequence[Path], matcher: Matcher, **options: Any) -> Report:
    return evaluate(files, Options(**options), Watched(), loading=lambda: matcher)


def shown(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    render(report, Console(file=out, width=width))
    return out.getvalue()


def test_the_object_for_programs(files: tuple[Path, Path], matcher: Matcher) -> None:
    report = run(files, matcher, threshold=0.7)
    whole = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert whole["policy"] == {
        "threshold": 0.7,
        "scheme": matcher.scheme,
        "description": matcher.description,
        "form": None,
    }
    assert [(one["file"], one["form"]) for one in whole["sets"]] == [
        (str(files[0]), "pair"),
        (str(files[0]), "replay"),
        (str(files[1]), "trace"),
    ]
    for one in whole["sets"]:
        assert set(one) == {"file", "form", *COUNTS, *RATES, *TIMES, *GROUPS}
        assert all(isinstance(one[name], kind) for name, kind in COUNTS.items())
        assert all(one[name] is None or 0 <= one[name] <= 1 for name in RATES)
        assert all(set(of) == set(COUNTS) for of in one["by_kind"].values())
        assert set(one["by_tier"]) == {"exact", "key", "sketch"}
    log = whole["sets"][2]
    assert log["by_kind"] == {"(none)": {"lookups": 1, "positives": 0, "hits": 0, "false_hits": 0}}
    assert log["false_per_hit"] is log["false_per_hit_upper95"] is log["recall"] is None
    assert report.false_hits == 2


def test_one_form_only(files: tuple[Path, Path], matcher: Matcher) -> None:
    report = run(files, matcher, form=Form.TRACE)
    assert [(one.file, one.form) for one in report.sets] == [(str(files[1]), Form.TRACE)]
    assert report.as_json()["policy"]["form"] == "trace"
    with pytest.raises(EvaluationError, match="no rows to evaluate in the form trace"):
        run(files[:1], matcher, form=Form.TRACE)


def test_a_wrong_file_stops_before_dictionaries_are_loaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    def never() -> Matcher:
        raise AssertionError

    with pytest.raises(EvaluationError, match=r"absent\.jsonl"):
        evaluate([*files, tmp_path / "absent.jsonl"], Options(), Watched(), loading=never)


def test_all_steps_that_were_promised_come(files: tuple[Path, Path], matcher: Matcher) -> None:
    watched = Watched()
    evaluate(files, Options(), watched, loading=lambda: matcher)
    assert watched.seen == [
        ("reading", 2, 2),
        ("loading dictionaries", 0, 0),
        ("pairs.jsonl, pair", 4, 4),
        ("pairs.jsonl, replay", 7, 7),
        ("log.jsonl, trace", 1, 1),
    ]


def test_a_store_that_fails_stops_the_evaluation(
    files: tuple[Path, Path], matcher: Matcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def full(_: None) -> Any:
        class Full:
            async def write(self, _changes: object, _room: object) -> None:
                raise StorageFull("no space")

        yield Full()

    monkeypatch.setattr(world, "open_sqlite", full)
    with pytest.raises(EvaluationError, match="the store in memory failed: no space"):
        run(files, matcher, form=Form.REPLAY)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_table_has_every_figure_however_narrow(files: tuple[Path, Path], matcher: Matcher, width: int) -> None:
    text = shown(run(files, matcher), width)
    rows = [line.split() for line in text.splitlines()]
    assert ["pairs", "pair", "4", "75.0", "%", "2", "(50.0", "%)", "33.3", "%", "1", "50.00", "%"] in [
        row[:13] for row in rows
    ]
    assert ["log", "trace", "1", "0.0", "%", "0", "(0.0", "%)", "-", "0", "-", "-"] in [row[:12] for row in rows]
    assert "where false hits are" in text
    assert r"mis[b]labelled\x1b[31m" in text
    assert "\x1b" not in text


def test_without_false_hits_no_kinds_are_listed(files: tuple[Path, Path], matcher: Matcher) -> None:
    assert "where false hits are" not in shown(run(files[1:], matcher))


def test_false_hits_are_shown_with_both_texts_and_the_rule(files: tuple[Path, Path], matcher: Matcher) -> None:
    report = run(files, matcher, show=Show.FALSE, form=Form.PAIR)
    (case,) = report.as_json()["sets"][0]["cases"]
    assert (case["line"], case["rule"], case["tier"], case["score"]) == (2, "equal", "key", 1.0)
    assert (case["stored"], case["asked"]) == (WRONG["a"], WRONG["b"])
    assert case["differences"] == [["How", "how"], ["I", "i"], ["it?", "it"]]
    text = shown(report)
    assert "pairs.jsonl, pair: false hits" in text
    assert "stored  How do I stop it?" in text
    assert "differ  it? | it" in text
    assert "make" not in text


def test_missed_ones_are_shown_with_what_refused(files: tuple[Path, Path], matcher: Matcher) -> None:
    report = run(files, matcher, show=Show.MISSED)
    pair, replay, trace = report.as_json()["sets"]
    assert [(case["line"], case["tier"]) for case in pair["cases"]] == [(3, None), (4, None)]
    assert pair["cases"][0]["rule"] == "not-found"
    assert pair["cases"][0]["score"] is None
    assert replay["cases"][0]["stored"] == MISSED["a"]
    assert trace["cases"] == []
    text = shown(report)
    assert r"asked   make\nit cease" in text
    # Of a long text, the part that differs.
    assert "stored  ...word" in text
    assert "word end" in text
    assert "differ  end | stop" in text


def test_more_cases_than_are_kept_are_told_of(files: tuple[Path, Path], matcher: Matcher) -> None:
    report = run(files, matcher, show=Show.FALSE, form=Form.PAIR)
    report.sets[0].tally.cases_left_out = 3
    assert "... and 3 more" in shown(report)


def test_progress_goes_to_a_terminal_only() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        watching = Watching(Console(file=out, force_terminal=terminal, width=80))
        with watching.working():
            watching.begin("reading [b]\x1b", 128)
            for _ in range(128):
                watching.step()
            watching.begin("loading", 0)
        assert ("reading" in out.getvalue() or "loading" in out.getvalue()) is terminal
