"""The deciding rules and the headers they are told in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache import directives
from proxy.cache.directives import ANY_AGE, Directives
from proxy.cache.policy import Drop, Keep, Lifetimes, Miss, age_s, decide, lifetime, ttl_s


@dataclass(frozen=True)
class Entry:
    stored_ms: int = 100_000
    expires_ms: int = 200_000
    usage_known: bool = True
    grace_ms: int = 0


@pytest.mark.parametrize(
    ("entry", "asked", "needs_usage", "now_ms", "miss"),
    [
        (Entry(), Directives(), True, 150_000, None),
        (Entry(), Directives(), True, 199_999, None),
        (Entry(), Directives(), True, 200_000, Miss.EXPIRED),
        (Entry(), Directives(no_cache=True), True, 150_000, Miss.NO_CACHE),
        (Entry(), Directives(max_age_s=50), True, 150_000, None),
        (Entry(), Directives(max_age_s=49), True, 150_000, Miss.TOO_OLD),
        (Entry(), Directives(max_age_s=0), True, 101_000, Miss.TOO_OLD),
        (Entry(), Directives(min_fresh_s=50), True, 150_000, None),
        (Entry(), Directives(min_fresh_s=51), True, 150_000, Miss.TOO_STALE_SOON),
        (Entry(usage_known=False), Directives(), False, 150_000, None),
        (Entry(usage_known=False), Directives(), True, 150_000, Miss.NO_USAGE),
    ],
)
def test_when_an_entry_may_answer(
    entry: Entry, asked: Directives, needs_usage: bool, now_ms: int, miss: Miss | None
) -> None:
    assert decide(entry, asked, needs_usage=needs_usage, now_ms=now_ms) is miss


def test_a_clock_that_steps_back_gives_no_negative_age() -> None:
    assert age_s(Entry(), 50_000) == 0
    assert ttl_s(Entry(), 50_000) == 150


@pytest.mark.parametrize(
    ("volatile", "volatile_ttl_ms", "expected"),
    [
        (False, 60, Keep(1000)),
        (True, 60, Keep(60)),
        (True, 5000, Keep(1000)),
        (True, 0, Drop.VOLATILE),
        (False, 0, Keep(1000)),
    ],
)
def test_volatile_answers_live_shortly_or_not_at_all(
    volatile: bool, volatile_ttl_ms: int, expected: Keep | Drop
) -> None:
    assert lifetime(Lifetimes(1000, volatile_ttl_ms, 9000), None, volatile=volatile) == expected


@pytest.mark.parametrize(
    ("asked_ms", "volatile", "expected"),
    [
        (5, False, Keep(5)),
        (5000, False, Keep(5000)),
        (10_000, False, Keep(9000)),
        (0, False, Drop.NO_STORE),
        (5000, True, Keep(60)),
        (5, True, Keep(5)),
    ],
)
def test_a_call_may_say_how_long_its_answer_lives(asked_ms: int, volatile: bool, expected: Keep | Drop) -> None:
    assert lifetime(Lifetimes(1000, 60, 9000), asked_ms, volatile=volatile) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Directives()),
        (["no-cache"], Directives(no_cache=True)),
        (["No-Store , max-age=0"], Directives(no_store=True, max_age_s=0)),
        (["only-if-cached", "min-fresh=5"], Directives(only_if_cached=True, min_fresh_s=5)),
        (['max-age="7"'], Directives(max_age_s=7)),
        (["max-age=-1"], Directives()),
        (["max-age=x, no-cache"], Directives(no_cache=True)),
        (["max-age"], Directives()),
        (["max-age=" + "9" * 10_000], Directives(max_age_s=ANY_AGE)),
        (["max-age=" + "0" * 10_000 + "7"], Directives(max_age_s=7)),
        (["max-age=٣"], Directives()),
        (["unknown=1, another, no-cache"], Directives(no_cache=True)),
        (["not-no-cache"], Directives()),
        (["max-stale"], Directives(max_stale_s=ANY_AGE)),
        (["max-stale="], Directives()),
        (['max-stale=""'], Directives()),
        (['unknown="a, only-if-cached, b", no-cache'], Directives(no_cache=True)),
        (['unknown="a\\", no-store, b"'], Directives()),
        (['unknown="a, no-store'], Directives(no_store=True)),
    ],
)
def test_cache_control_is_read(values: list[str], expected: Directives) -> None:
    assert directives.parse(values) == expected


def test_pragma_counts_only_without_cache_control() -> None:
    assert directives.parse([], ["no-cache"]).no_cache
    assert not directives.parse(["max-age=5"], ["no-cache"]).no_cache


@given(st.lists(st.text(max_size=60), max_size=3))
def test_no_header_breaks_the_reading(values: list[str]) -> None:
    assert isinstance(directives.parse(values), Directives)


def test_cache_status_reads_as_rfc_9211_says() -> None:
    assert directives.status_hit(123, "exact") == "nearhit; hit; ttl=123; detail=exact"
    assert directives.status_forwarded("miss") == "nearhit; fwd=miss"
    assert directives.status_forwarded("miss", collapsed=True) == "nearhit; fwd=miss; collapsed"
    assert directives.status_forwarded("bypass", detail="no-store") == "nearhit; fwd=bypass; detail=no-store"


@pytest.mark.parametrize(
    "value",
    [
        "a" * 30_000 + ";",
        "a" + " " * 30_000 + ";",
        "a=" * 15_000,
        "," * 30_000,
        '"' * 30_000,
        '"' + '\\"' * 15_000,
        '"a' * 15_000 + "\\",
    ],
)
def test_no_header_takes_long_to_read(value: str) -> None:
    # A backtracking pattern would take minutes for these.
    assert directives.parse([value]) == Directives()
