"""Labelled pairs of prompts, many of them traps: not one wrong answer, and most of the right ones."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from storage.base import Candidate
from tests.near.asking import CASES, SPACE, THRESHOLD, Asking, Pair, pairs

# Prompts about typography itself. It is folded before anything is compared, in every language: curly quotes, full-width
# digits and the like are taken for plain ones, also by a prompt that asks which of them it holds.
KNOWN_HOLES = frozenset({"n1_topic"})

FLOORS = {"variants_en": 0.95, "variants_es": 0.85, "payload_en": 0.85, "payload_es": 0.75}
FLOOR_OF_OTHERS = 0.65

FILES = pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)


def test_every_file_with_a_floor_is_there() -> None:
    assert {file.stem for file in CASES} >= set(FLOORS)


@FILES
def test_no_answer_is_given_to_another_question(asking: Asking, file: Path) -> None:
    wrong = [pair for pair in _traps(file) if asking.is_hit(pair.b, pair.a)]
    assert wrong == []


@FILES
def test_no_answer_is_given_to_another_question_the_other_way_round(asking: Asking, file: Path) -> None:
    wrong = [pair for pair in _traps(file) if asking.is_hit(pair.a, pair.b)]
    assert wrong == []


@pytest.mark.parametrize("file", [f for f in CASES if any(p.same for p in pairs(f))], ids=lambda file: file.stem)
def test_most_variants_of_a_question_are_recognised(asking: Asking, file: Path) -> None:
    variants = [pair for pair in pairs(file) if pair.same]
    missed = [pair for pair in variants if not asking.is_hit(pair.b, pair.a)]
    recall = 1 - len(missed) / len(variants)
    assert recall >= FLOORS.get(file.stem, FLOOR_OF_OTHERS), missed


@FILES
def test_among_all_stored_prompts_of_a_file_none_answers_another_question(asking: Asking, file: Path) -> None:
    rows = [pair for pair in pairs(file) if pair.kind not in KNOWN_HOLES]
    stored = {pair.a: asking.candidate(pair.a) for pair in rows}
    with_key = _by_key(asking, stored)
    wrong = []
    for pair in rows:
        right = {row.a for row in rows if row.same and row.b == pair.b} | {pair.b}
        hit = _first_hit(asking, pair.b, stored, with_key)
        if hit is not None and hit not in right:
            wrong.append((pair.b, hit))
    assert wrong == []


def _traps(file: Path) -> list[Pair]:
    return [pair for pair in pairs(file) if not pair.same and pair.kind not in KNOWN_HOLES]


def _by_key(asking: Asking, stored: dict[str, Candidate]) -> dict[int, set[str]]:
    with_key: defaultdict[int, set[str]] = defaultdict(set)
    for text in stored:
        prompt = asking.matcher.prepare(text)
        for key in asking.matcher.sketch(prompt, SPACE).keys:
            with_key[key].add(text)
    return with_key


def _first_hit(asking: Asking, asked: str, stored: dict[str, Candidate], with_key: dict[int, set[str]]) -> str | None:
    keys = asking.matcher.sketch(asking.matcher.prepare(asked), SPACE).keys
    found = sorted({text for key in keys for text in with_key.get(key, ())})
    judged = asking.judged(asked, [stored[text] for text in found], THRESHOLD)
    return next((one.candidate.words for one in judged if one.verdict.same), None)
