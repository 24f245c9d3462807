"""The clock is set back, or ahead, while answers are stored."""

from __future__ import annotations

import pytest

from proxy.web import clock
from tests.conftest import Proxy

HOUR_MS = 3_600_000


async def stored(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"


async def asked_with_clock(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, ms: int, content: str = "x") -> str:
    monkeypatch.setattr(proxy.services.backends.first.answers, "_now_ms", lambda: clock.now_ms() + ms)
    answer = await proxy.chat(content, headers={"Cache-Control": "only-if-cached"})
    return answer.outcome if answer.status == 200 else "MISS"


async def test_an_answer_from_the_future_is_of_unknown_age(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(proxy)
    assert await asked_with_clock(proxy, monkeypatch, -HOUR_MS) == "MISS"
    assert await asked_with_clock(proxy, monkeypatch, -HOUR_MS, "please x") == "MISS"


async def test_once_the_clock_is_right_again_it_is_served(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(proxy)
    for jump in (-HOUR_MS, 1000 * HOUR_MS, -1000 * HOUR_MS):
        assert await asked_with_clock(proxy, monkeypatch, jump) == "MISS"
        assert await asked_with_clock(proxy, monkeypatch, 0) == "HIT"


async def test_small_corrections_are_no_reason_to_ask_again(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(proxy)
    assert await asked_with_clock(proxy, monkeypatch, -30_000) == "HIT"


async def test_the_reason_is_told(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    await stored(proxy)
    monkeypatch.setattr(proxy.services.backends.first.answers, "_now_ms", lambda: clock.now_ms() - HOUR_MS)
    assert (await proxy.chat("x")).outcome == "MISS"
    assert (await proxy.stats())["misses"] == {"absent": 1, "clock-set-back": 1}
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"
