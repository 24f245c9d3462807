"""A clock is believed once it has run as a counter does for long enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.steady import Steadiness
from tests.storage.engines import NOW

SETTLE = 600_000
HOUR = 3_600_000


def looks(steadiness: Steadiness, clock: int, start: int, step: int, times: int) -> list[bool]:
    """Looks at a clock that is `clock` ahead of the counter, each `step` after the other."""
    return [steadiness.is_steady(clock + start + step * i, start + step * i) for i in range(times)]


def test_at_first_a_clock_is_not_believed() -> None:
    assert looks(Steadiness(SETTLE), NOW, 5, SETTLE // 4, 6) == [False, False, False, False, True, True]


def test_without_time_to_settle_it_is_believed_at_once() -> None:
    assert looks(Steadiness(0), NOW, 5, 1, 2) == [True, True]


@given(jump=st.integers(60_001, 10**13), back=st.booleans())
def test_after_a_jump_it_must_settle_again(jump: int, back: bool) -> None:
    steadiness = Steadiness(SETTLE)
    looks(steadiness, NOW, 0, SETTLE, 2)
    jumped = NOW - jump if back else NOW + jump
    assert looks(steadiness, jumped, SETTLE + 1, SETTLE // 2, 3) == [False, False, True]


def test_a_jump_there_and_back_is_two_jumps() -> None:
    steadiness = Steadiness(SETTLE)
    assert looks(steadiness, NOW, 0, SETTLE, 2)[-1]
    assert looks(steadiness, NOW + HOUR, SETTLE, SETTLE // 2, 2) == [False, False]
    assert looks(steadiness, NOW, 2 * SETTLE, SETTLE // 2, 3) == [False, False, True]


@given(st.lists(st.integers(-30_000, 30_000), max_size=20))
def test_small_corrections_change_nothing(corrections: list[int]) -> None:
    steadiness = Steadiness(SETTLE)
    looks(steadiness, NOW, 0, SETTLE, 2)
    for number, correction in enumerate(corrections, 2):
        assert steadiness.is_steady(NOW + number * SETTLE + correction, number * SETTLE)


def test_a_machine_that_slept_did_not_jump() -> None:
    steadiness = Steadiness(SETTLE)
    looks(steadiness, NOW, 0, SETTLE, 2)
    asleep = 30 * 24 * HOUR
    # Both went on meanwhile.
    assert steadiness.is_steady(NOW + SETTLE + asleep, SETTLE + asleep)


def test_a_clock_that_keeps_jumping_is_never_believed() -> None:
    steadiness = Steadiness(SETTLE)
    for number in range(50):
        assert not steadiness.is_steady(NOW + number * (SETTLE + HOUR), number * SETTLE // 2)
