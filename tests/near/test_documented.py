"""The examples in the documentation are true, and every rule is explained there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy.cache.near.guard import Rule
from tests.near.asking import Asking

ROOT = Path(__file__).parents[2]
MATCHING = (ROOT / "docs" / "matching.md").read_text(encoding="utf-8")
EXAMPLES = [
    row
    for text in (MATCHING, (ROOT / "README.md").read_text(encoding="utf-8"))
    for row in re.findall(r"(?m)^\| (.+?) \| (.+?) \| `(NEAR|MISS)` ?([\w-]*) \|$", text)
]


@pytest.mark.parametrize(("stored", "asked", "outcome", "rule"), EXAMPLES)
def test_an_example_is_true(asking: Asking, stored: str, asked: str, outcome: str, rule: str) -> None:
    verdict = asking.verdict(asked, stored)
    assert verdict.same == (outcome == "NEAR")
    assert rule in ("", verdict.rule)


def test_there_are_examples_of_both_kinds() -> None:
    assert {outcome for _, _, outcome, _ in EXAMPLES} == {"NEAR", "MISS"}


@pytest.mark.parametrize("rule", Rule)
def test_every_rule_is_explained(rule: Rule) -> None:
    assert f"`{rule}`" in MATCHING
