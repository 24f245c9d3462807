"""What prompts are found by: similar ones share keys, of other spaces and schemes none."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.near import sketch
from proxy.cache.near.sketch import Sketcher, jaccard, shingles
from tests.near.asking import ENGLISH, OTHER, SPACE, Asking

ELSEWHERE = bytes(15) + b"\x01"
WORDS = " ".join(ENGLISH).lower().replace("?", "").split()


@pytest.fixture(scope="module")
def sketcher() -> Sketcher:
    return Sketcher("tests")


@given(st.text(), st.text())
def test_similarity_is_between_0_and_1_and_the_same_both_ways(a: str, b: str) -> None:
    score = jaccard(shingles(a), shingles(b))
    assert 0 <= score <= 1
    assert score == jaccard(shingles(b), shingles(a))
    assert jaccard(shingles(a), shingles(a)) == 1


def test_nothing_in_common_is_0() -> None:
    assert jaccard(shingles("bread"), shingles("whisky")) == 0


@given(st.text())
def test_every_text_has_shingles_as_short_as_it_may_be(text: str) -> None:
    assert 1 <= len(shingles(text)) <= max(1, len(text) - 1)


@pytest.mark.parametrize("text", ["", "a", *ENGLISH[:3], *OTHER])
def test_equal_skeletons_have_equal_keys_and_in_another_space_none(sketcher: Sketcher, text: str) -> None:
    keys = sketcher.band_keys(text, SPACE)
    assert keys == sketcher.band_keys(text, SPACE)
    assert len(keys) == sketch.BANDS
    assert set(keys).isdisjoint(sketcher.band_keys(text, ELSEWHERE))


def test_keys_of_equal_forms_are_of_one_space_and_without_repetitions(sketcher: Sketcher) -> None:
    keys = sketcher.digest_keys([b"one", b"two", b"one"], SPACE)
    assert len(keys) == len(set(keys)) == 2
    assert set(keys).isdisjoint(sketcher.digest_keys([b"one", b"two"], ELSEWHERE))


@pytest.mark.parametrize("text", ["", *ENGLISH[:3], *OTHER])
def test_keys_fit_into_a_signed_integer_of_64_bits(sketcher: Sketcher, text: str) -> None:
    keys = (*sketcher.band_keys(text, SPACE), *sketcher.digest_keys([text.encode()], SPACE), sketcher.scheme)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_second_sketcher_makes_the_same_keys(sketcher: Sketcher) -> None:
    other = Sketcher("tests")
    assert (other.scheme, other.description) == (sketcher.scheme, sketcher.description)
    assert other.band_keys(ENGLISH[0], SPACE) == sketcher.band_keys(ENGLISH[0], SPACE)


@pytest.mark.parametrize("parameter", ["SEED", "SHINGLE"])
def test_other_parameters_are_another_scheme_with_other_keys(
    sketcher: Sketcher, monkeypatch: pytest.MonkeyPatch, parameter: str
) -> None:
    monkeypatch.setattr(sketch, parameter, getattr(sketch, parameter) + 1)
    other = Sketcher("tests")
    assert other.scheme != sketcher.scheme
    assert other.description != sketcher.description
    assert set(other.band_keys(ENGLISH[0], SPACE)).isdisjoint(sketcher.band_keys(ENGLISH[0], SPACE))


def test_another_normaliser_is_another_scheme(sketcher: Sketcher) -> None:
    assert Sketcher("another").scheme != sketcher.scheme


def test_what_is_very_similar_is_found(sketcher: Sketcher) -> None:
    chosen = random.Random(7)
    pairs = [_similar_pair(chosen) for _ in range(300)]
    found = sum(_share_a_band(sketcher, a, b) for a, b in pairs)
    assert found >= 0.95 * len(pairs)


def test_what_has_nothing_in_common_is_not_found(sketcher: Sketcher) -> None:
    assert not _share_a_band(sketcher, "how do i bake bread at home", "why would zulu jazz vex lynx")


def test_long_prompts_are_found_by_equal_forms_only(asking: Asking) -> None:
    text = "How do I get to the harbour? " * 300
    prompt = asking.matcher.prepare(text)
    assert asking.matcher.band_keys(prompt, SPACE) == ()
    assert set(asking.matcher.sketch(prompt, SPACE).keys) == asking.keys(text)
    assert asking.is_hit(f"Hello, {text} Thanks!", text)


@pytest.mark.parametrize("text", ENGLISH[:4])
def test_a_sketch_holds_the_keys_of_equal_forms_and_the_bands(asking: Asking, text: str) -> None:
    prompt = asking.matcher.prepare(text)
    made = asking.matcher.sketch(prompt, SPACE)
    assert set(made.keys) == asking.keys(text) | set(asking.matcher.band_keys(prompt, SPACE))
    assert (made.scheme, made.skeleton) == (asking.matcher.scheme, prompt.skeleton)
    assert asking.keys(text).isdisjoint(asking.keys(text, ELSEWHERE))


def _similar_pair(chosen: random.Random) -> tuple[str, str]:
    """Two texts with a Jaccard of at least 0.8, most of them not much above it."""
    while True:
        words = chosen.sample(WORDS, 14)
        changed = list(words)
        changed[chosen.randrange(len(changed))] = chosen.choice(WORDS)
        a, b = " ".join(words), " ".join(changed)
        if 0.8 <= jaccard(shingles(a), shingles(b)) < 1:
            return a, b


def _share_a_band(sketcher: Sketcher, a: str, b: str) -> bool:
    return not set(sketcher.band_keys(a, SPACE)).isdisjoint(sketcher.band_keys(b, SPACE))
