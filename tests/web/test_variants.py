"""Several answers to a call that the model would answer differently each time: collected first, then given in turn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, held, numbered, raw
from tests.web.test_exact_tier import said

SAMPLED: dict[str, Any] = {"temperature": 0.8}


async def ask(proxy: Proxy, **fields: Any) -> tuple[str, str]:
    answer = await proxy.chat("Tell me a joke.", **{**SAMPLED, **fields})
    await proxy.settled()
    return answer.outcome, said(answer)


async def test_answers_are_collected_and_then_given_in_turn(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__variants=3)
    model.respond = numbered()
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    told = [await ask(proxy, **(streamed if number % 2 else {})) for number in range(9)]
    assert [outcome for outcome, _ in told] == ["MISS"] * 3 + ["HIT"] * 6
    assert [text for _, text in told] == [f"answer {n}" for n in (1, 2, 3)] * 3


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 7}])
async def test_a_call_that_has_one_answer_keeps_one(
    start: StartProxy, model: FakeModel, fields: dict[str, Any]
) -> None:
    proxy = await start(cache__variants=3)
    model.respond = numbered()
    assert [await ask(proxy, **fields) for _ in range(3)] == [
        ("MISS", "answer 1"),
        ("HIT", "answer 1"),
        ("HIT", "answer 1"),
    ]


async def test_by_default_a_sampled_call_has_one_answer(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    assert [text for _, text in [await ask(proxy) for _ in range(3)]] == ["answer 1"] * 3


async def test_they_are_found_again_after_a_restart(tmp_path: Path, model: FakeModel) -> None:
    model.respond = numbered()
    settings = settings_for(tmp_path, model.url, cache__variants=2)
    async with running_proxy(settings) as first:
        for _ in range(2):
            await ask(first)
    async with running_proxy(settings) as second:
        assert [await ask(second) for _ in range(3)] == [("HIT", "answer 1"), ("HIT", "answer 2"), ("HIT", "answer 1")]


async def test_an_answer_that_is_not_kept_takes_no_place(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__variants=2)
    model.respond = numbered()
    await ask(proxy)
    good, model.respond = model.respond, raw(b"{}", status=500)
    assert (await proxy.chat("Tell me a joke.", **SAMPLED)).status == 500
    model.respond = good
    assert [await ask(proxy) for _ in range(3)] == [("MISS", "answer 3"), ("HIT", "answer 1"), ("HIT", "answer 3")]


async def test_equal_calls_in_flight_share_a_variant(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__variants=3)
    model.respond = held(numbered())
    tasks = [asyncio.create_task(proxy.chat("Tell me a joke.", **SAMPLED)) for _ in range(5)]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 4)
    model.release.set()
    assert {said(a) for a in await asyncio.gather(*tasks)} == {"answer 1"}


async def test_other_words_get_the_first_one(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__variants=2)
    await eventually(lambda: proxy.services.near is not None)
    model.respond = numbered()
    for _ in range(2):
        await ask(proxy)
    answer = await proxy.chat("please tell me a joke", **SAMPLED)
    assert (answer.outcome, said(answer)) == ("NEAR", "answer 1")
