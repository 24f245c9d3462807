"""Whether seeding helps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.effect import (
    EFFECTIVE,
    INEFFECTIVE,
    PATIENCE,
    PATIENCE_PROVED,
    UNPROVED,
    helped,
    judged,
    reused,
)
from proxy.upstream.prefix import Evidence

SUCCESSES = st.lists(st.sampled_from([True, False, None]), max_size=30)


def test_half_of_the_prefix_is_a_success_and_the_template_alone_is_none() -> None:
    assert helped(Evidence(cached=50, computed=60), 100) is True
    assert helped(Evidence(cached=49, computed=61), 100) is False
    assert helped(Evidence(cached=0, computed=10), 0) is False
    assert helped(Evidence(cached=None, computed=110), 100) is None


def test_two_failures_in_a_row_are_enough_where_it_never_helped() -> None:
    once = judged(UNPROVED, success=False)
    assert once.helps is None
    assert judged(once, success=False) == INEFFECTIVE
    assert judged(judged(once, success=True), success=False).helps is True


@given(SUCCESSES)
def test_a_verdict_is_what_the_replies_say(successes: list[bool | None]) -> None:
    effect = UNPROVED
    told: list[bool] = []
    for success in successes:
        before, effect = effect, judged(effect, success)
        if success is None:
            assert effect == before
            continue
        if before == INEFFECTIVE:
            assert effect == INEFFECTIVE
            continue
        told.append(success)
        in_a_row = next((n for n, one in enumerate(reversed(told)) if one), len(told))
        patience = PATIENCE_PROVED if True in told else PATIENCE
        if success:
            assert effect == EFFECTIVE
        else:
            assert (effect == INEFFECTIVE) == (in_a_row >= patience)


@given(st.integers(0, 10_000) | st.none(), st.integers(0, 10_000))
def test_no_more_is_claimed_than_was_seeded(cached: int | None, tokens: int) -> None:
    assert 0 <= reused(Evidence(cached=cached), tokens) <= min(cached or 0, tokens)
