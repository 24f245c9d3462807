"""When a server that did not answer is asked again."""

from __future__ import annotations

from proxy.upstream.silence import Silence


def test_pauses_double_up_to_the_longest_and_an_answer_ends_them() -> None:
    now = [0.0]
    silence = Silence(lambda: now[0], patience=2, pause_s=30, longest_s=100)
    silence.unanswered()
    assert not silence.lasts, "once may be chance"
    for pause_s in (30, 60, 100, 100):
        silence.unanswered()
        now[0] += pause_s - 1
        assert silence.lasts
        now[0] += 1
        assert not silence.lasts
    silence.unanswered()
    silence.answered()
    assert not silence.lasts
    silence.unanswered()
    assert not silence.lasts, "it is counted anew"


def test_what_was_asked_at_once_makes_one_pause() -> None:
    now = [0.0]
    silence = Silence(lambda: now[0], patience=2, pause_s=30)
    for _ in range(5):
        silence.unanswered()
    now[0] = 30.0
    assert not silence.lasts
