"""Files of labelled prompts, and the dictionaries, which take seconds to load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.near.matcher import Matcher, load
from proxy.evaluate.run import Form, Options, Show, evaluate
from tests.evaluate.watching import Watched

Row = Mapping[str, Any]
Figures = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def matcher() -> Matcher:
    return load()


@pytest.fixture
def figures(tmp_path: Path, matcher: Matcher) -> Figures:
    """Evaluate rows in one form: what the JSON says of the only set."""

    def run(rows: Sequence[Row], form: Form, show: Show | None = None, threshold: float = 0.6) -> dict[str, Any]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = evaluate([file], Options(threshold, form, show), Watched(), loading=lambda: matcher)
        (only,) = report.as_json()["sets"]
        assert only["form"] == form
        return dict(only)

    return run
