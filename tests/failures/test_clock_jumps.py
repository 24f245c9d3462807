"""The clock jumps, ahead and back, while nearhit runs: nothing is lost for it, nothing wrong is served."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from proxy.web import services
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, held, numbered, reply
from tests.storage.files import query

SECOND_MS = 1000
HOUR_MS = 3600 * SECOND_MS
YEAR_MS = 365 * 24 * HOUR_MS
TTL_S = 72 * 3600


class Clock:
    """A clock that is set, and a count of time that goes on whatever happens to it."""

    def __init__(self) -> None:
        self.offset_ms = 0
        self.passed_ms = 0
        self.looks = 0

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.offset_ms + self.passed_ms

    def counted_ms(self) -> int:
        self.looks += 1
        return time.monotonic_ns() // 1_000_000 + self.passed_ms

    async def swept(self) -> None:
        """Wait until everything due by now was looked at."""
        seen = self.looks
        await eventually(lambda: self.looks >= seen + 3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, model: FakeModel) -> Clock:
    clock = Clock()
    monkeypatch.setattr(services, "now_ms", clock.now_ms)
    monkeypatch.setattr(services, "counted_ms", clock.counted_ms)
    monkeypatch.setattr(services, "_UPKEEP_S", 0.01)
    model.respond = numbered()
    return clock


@pytest.fixture
async def file_only(start: StartProxy, clock: Clock) -> Proxy:
    """Nothing is served from memory."""
    return await start(cache__mode="exact", cache__hot_bytes=0, cache__flush_s=0.01)


@pytest.fixture(params=["memory", "file"])
async def proxy(request: pytest.FixtureRequest, start: StartProxy, clock: Clock) -> Proxy:
    hot = {} if request.param == "memory" else {"cache__hot_bytes": 0}
    return await start(cache__mode="exact", cache__flush_s=0.01, **hot)


async def store(proxy: Proxy, *contents: str) -> None:
    for content in contents:
        assert (await proxy.chat(content)).outcome == "MISS"
    await proxy.settled()
    await proxy.services.buffer.flush()


async def count(proxy: Proxy) -> int:
    return (await proxy.services.store.totals()).entries


async def known(proxy: Proxy, content: str) -> bool:
    answer = await proxy.chat(content, headers={"Cache-Control": "only-if-cached"})
    assert answer.status in (200, 504)
    return answer.status == 200


@pytest.mark.parametrize("jump_ms", [10 * YEAR_MS, -YEAR_MS, -60 * YEAR_MS])
async def test_a_clock_that_is_wrong_for_a_while_loses_nothing(proxy: Proxy, clock: Clock, jump_ms: int) -> None:
    await store(proxy, "a", "b", "c")
    clock.offset_ms = jump_ms
    await clock.swept()
    # For most of the ten minutes that a clock must run steadily.
    for _ in range(5):
        clock.passed_ms += 110 * SECOND_MS
        await clock.swept()
        assert not await known(proxy, "a")
        assert await count(proxy) == 3
    clock.offset_ms = 0
    await clock.swept()
    for content in ("a", "b", "c"):
        assert await known(proxy, content)
    assert proxy.services.metrics.value("nearhit_evicted_total", {"reason": "expired"}) == 0


async def test_a_clock_that_stays_ahead_is_believed_in_the_end(file_only: Proxy, clock: Clock) -> None:
    await store(file_only, "a", "b", "c")
    clock.offset_ms = 10 * YEAR_MS
    await clock.swept()
    clock.passed_ms += 601 * SECOND_MS
    await clock.swept()
    assert await count(file_only) == 0
    assert file_only.services.metrics.value("nearhit_evicted_total", {"reason": "expired"}) == 3
    assert await file_only.services.store.problems() == []


async def test_a_clock_that_jumps_again_and_again_is_never_believed(file_only: Proxy, clock: Clock) -> None:
    await store(file_only, "a", "b", "c")
    for number in range(8):
        clock.offset_ms = (10 + number % 2) * YEAR_MS
        await clock.swept()
        clock.passed_ms += 500 * SECOND_MS
        await clock.swept()
    assert await count(file_only) == 3


async def test_a_clock_set_back_is_a_miss_with_a_reason_and_no_loss(proxy: Proxy, clock: Clock) -> None:
    await store(proxy, "a")
    clock.offset_ms = -YEAR_MS
    answer = await proxy.chat("a")
    assert (answer.outcome, answer.headers["Cache-Status"]) == ("MISS", "nearhit; fwd=miss")
    assert "Age" not in answer.headers
    assert (await proxy.stats())["misses"]["clock-set-back"] == 1
    await proxy.settled()
    # What is answered by this clock is served by this clock.
    assert await known(proxy, "a")


@pytest.mark.parametrize("jump_ms", [-59 * SECOND_MS, -1, 1, 59 * SECOND_MS])
async def test_after_a_small_step_ages_and_lifetimes_are_sane(proxy: Proxy, clock: Clock, jump_ms: int) -> None:
    await store(proxy, "a")
    clock.offset_ms = jump_ms
    answer = await proxy.chat("a")
    assert answer.outcome == "HIT"
    assert 0 <= int(answer.headers["Age"]) <= 120
    ttl = re.search(r"ttl=(-?\d+)", answer.headers["Cache-Status"])
    assert ttl is not None
    assert TTL_S - 120 <= int(ttl[1]) <= TTL_S + 60


@pytest.mark.parametrize("jump_ms", [10 * YEAR_MS, -YEAR_MS])
async def test_what_was_stored_by_a_wrong_clock_is_never_served_by_the_right_one(
    proxy: Proxy, clock: Clock, jump_ms: int
) -> None:
    clock.offset_ms = jump_ms
    await store(proxy, "a")
    assert await known(proxy, "a")
    clock.offset_ms = 0
    assert not await known(proxy, "a")
    await store(proxy, "a")
    assert await known(proxy, "a")
    # In its place, not beside it.
    assert await count(proxy) == 1
    assert await proxy.services.store.problems() == []


@pytest.mark.parametrize("jump_ms", [10 * YEAR_MS, -YEAR_MS])
async def test_answers_reach_the_file_whatever_the_clock_does(
    file_only: Proxy, clock: Clock, tmp_path: Path, jump_ms: int
) -> None:
    for number in range(10):
        clock.offset_ms = jump_ms if number % 2 else 0
        answer = await file_only.chat(f"q{number}")
        assert (answer.status, answer.outcome) == (200, "MISS")
    await file_only.settled()
    path = tmp_path / "nearhit.db"

    async def written() -> bool:
        return await asyncio.to_thread(query, path, "SELECT count(*) FROM entry") == [(10,)]

    async with asyncio.timeout(60):
        while not await written():
            await asyncio.sleep(0.01)
    assert await file_only.services.store.problems() == []


async def test_callers_who_wait_for_one_answer_get_it(proxy: Proxy, clock: Clock, model: FakeModel) -> None:
    model.respond = held(reply("for all"))
    tasks = [asyncio.create_task(proxy.chat("x")) for _ in range(2)]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    for number, jump_ms in enumerate((10 * YEAR_MS, -YEAR_MS)):
        clock.offset_ms = jump_ms
        tasks.append(asyncio.create_task(proxy.chat("x")))
        joined = number + 2
        await eventually(lambda joined=joined: proxy.services.metrics.value("nearhit_joined_total") == joined)  # type: ignore[misc]
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert [answer.status for answer in answers] == [200] * 4
    assert sorted(answer.outcome for answer in answers) == ["JOINED"] * 3 + ["MISS"]
    assert model.started == 1


async def test_no_figure_becomes_negative(proxy: Proxy, clock: Clock) -> None:
    for jump_ms in (0, 10 * YEAR_MS, -YEAR_MS, 0):
        clock.offset_ms = jump_ms
        assert (await proxy.chat("x")).status == 200
        await proxy.settled()
    metrics = (await proxy.send("GET", "/metrics")).body.decode()
    assert "nearhit_requests_total" in metrics
    assert not re.findall(r"^nearhit_\S+ -\S+$", metrics, re.MULTILINE)
