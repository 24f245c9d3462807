"""Two nearhits on one database file: what one does, the other sees within a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import Proxy, running_proxy, settings_for
from tests.fake_model import FakeModel, numbered

SOON_S = 60.0
"""Ends a test that has failed; the promise is one second."""


@pytest.fixture
async def two(tmp_path: Path, model: FakeModel) -> AsyncIterator[tuple[Proxy, Proxy]]:
    model.respond = numbered()
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        yield one, other


async def outcome_becomes(proxy: Proxy, content: str, wanted: str) -> None:
    async with asyncio.timeout(SOON_S):
        while (await proxy.chat(content, headers={"Cache-Control": "only-if-cached"})).outcome != wanted:
            await asyncio.sleep(0.02)


async def served_by_both(two: tuple[Proxy, Proxy], content: str) -> str:
    one, other = two
    await one.chat(content)
    await one.settled()
    await outcome_becomes(other, content, "HIT")
    # From memory, too.
    answer = await other.chat(content)
    assert answer.outcome == "HIT"
    return str(answer.headers["X-Nearhit-Entry"])


async def test_an_answer_of_one_is_served_by_the_other(two: tuple[Proxy, Proxy]) -> None:
    await served_by_both(two, "x")


async def test_a_replaced_answer_is_replaced_everywhere(two: tuple[Proxy, Proxy]) -> None:
    one, other = two
    await served_by_both(two, "x")
    fresh = await one.chat("x", headers={"Cache-Control": "no-cache"})
    await one.settled()
    async with asyncio.timeout(SOON_S):
        while (await other.chat("x")).json["choices"] != fresh.json["choices"]:
            await asyncio.sleep(0.02)


async def test_what_one_purges_the_other_serves_no_longer(two: tuple[Proxy, Proxy]) -> None:
    one, other = two
    await served_by_both(two, "x")
    assert (await one.post("/-/purge", json={"all": True})).status == 200
    assert (await one.chat("x", headers={"Cache-Control": "only-if-cached"})).status == 504
    await outcome_becomes(other, "x", "MISS")


async def test_what_was_called_wrong_at_one_is_gone_at_the_other(two: tuple[Proxy, Proxy]) -> None:
    one, other = two
    entry = await served_by_both(two, "x")
    assert (await one.post("/-/feedback", json={"id": entry, "verdict": "wrong"})).status == 200
    await outcome_becomes(other, "x", "MISS")


async def test_a_pair_called_wrong_at_one_does_not_match_at_the_other(two: tuple[Proxy, Proxy]) -> None:
    one, other = two
    asked, near = "Turn on the kitchen light", "please turn on the kitchen light"
    entry = await served_by_both(two, asked)
    assert (await one.chat(near)).outcome == "NEAR"
    assert (await one.post("/-/feedback", json={"id": entry, "verdict": "wrong"})).status == 200
    await outcome_becomes(other, asked, "MISS")
    await one.chat(asked)
    await one.settled()
    await outcome_becomes(other, asked, "HIT")
    assert (await other.chat(near)).outcome == "MISS"


async def test_an_own_replacement_leaves_the_memory_alone(two: tuple[Proxy, Proxy]) -> None:
    one, _ = two
    await served_by_both(two, "x")
    await one.chat("y")
    await one.settled()
    # The first look at the file is over, after which only others' doings count.
    await one.services.store.replaced_elsewhere()
    await one.chat("x", headers={"Cache-Control": "no-cache"})
    await one.settled()
    await one.services.buffer.flush()
    assert not await one.services.store.replaced_elsewhere()


async def test_a_purge_reaches_what_others_hold_in_memory_alone(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url, cache__max_entries=1)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await served_by_both((one, other), "x")
        # The one that is stored next takes its place in the file, not in memory.
        await one.chat("y")
        await one.settled()
        await one.services.buffer.flush()
        assert (await other.chat("x")).outcome == "HIT"
        await one.post("/-/purge", json={"text": "nothing like it"})
        await outcome_becomes(other, "x", "MISS")
