"""Batches that share an errand: whom a failure failed, what is stored meanwhile, and who need not wait."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.cache.dialects.arriving import Arriving
from proxy.cache.dialects.laying import lay_out
from tests.conftest import StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel
from tests.web.test_embeddings import Vectors, embedding, of, outlived, told, value, vectors
from tests.web.test_two_leases_embeddings import asked, begun, pair

__all__ = ["vectors"]


async def test_whom_a_failure_failed_ask_once_more_together(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start(cache__join_failures="retry")
    vectors.held = True

    def once(_asked: dict[str, Any], _answered: dict[str, Any]) -> Any:
        vectors.change = None
        raise web.HTTPInternalServerError(text='{"error": "once"}')

    vectors.change = once
    first = await asked(proxy, vectors, ["a"])
    others = [begun(proxy, ["a"]) for _ in range(10)]
    await eventually(lambda: value(proxy, "joined_total") == 10)
    vectors.release.set()
    assert (await first).status == 500
    assert [told(answer) for answer in await asyncio.gather(*others)] == [of("a")] * 10
    await proxy.settled()
    assert vectors.inputs == [["a"]] * 2


async def test_batches_that_another_input_failed_ask_for_each_of_theirs_once(
    start: StartProxy, vectors: Vectors
) -> None:
    proxy = await start()
    vectors.held = True

    def picky(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        if "bad" in asked["input"]:
            raise web.HTTPBadRequest(text='{"error": "bad"}')
        return answered

    vectors.change = picky
    first = await asked(proxy, vectors, ["bad", "a"])
    others = [begun(proxy, ["a"]) for _ in range(10)]
    await eventually(lambda: value(proxy, "joined_total") == 10)
    vectors.release.set()
    assert (await first).status == 400
    assert [told(answer) for answer in await asyncio.gather(*others)] == [of("a")] * 10
    await proxy.settled()
    assert vectors.inputs == [["bad", "a"], ["a"]]


async def test_what_is_stored_is_given_while_another_has_it_fetched_anew(
    tmp_path: Path, model: FakeModel, vectors: Vectors
) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as proxy:
        await embedding(proxy)(["a"])
    async with running_proxy(settings) as proxy:
        vectors.held = True
        anew = await asked(proxy, vectors, ["a"], headers={"Cache-Control": "no-cache"})
        cached = await embedding(proxy)(["a"], headers={"Cache-Control": "only-if-cached"}, settle=False)
        plain = await embedding(proxy)(["a"], settle=False)
        vectors.release.set()
        await anew
        await proxy.settled()
        assert (cached.status, cached.outcome, plain.outcome) == (200, "HIT", "HIT")


async def test_what_is_stored_stands_in_where_the_fetch_of_another_fails(
    tmp_path: Path, model: FakeModel, vectors: Vectors
) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as proxy:
        await outlived(embedding(proxy), "old")
    async with running_proxy(settings) as proxy:
        vectors.held, vectors.status = True, 500
        anew = await asked(proxy, vectors, ["old"], headers={"Cache-Control": "no-cache"})
        plain = begun(proxy, ["old"])
        await eventually(lambda: value(proxy, "joined_total") == 1)
        vectors.release.set()
        assert (await anew).status == 500
        answer = await plain
        await proxy.settled()
        assert (answer.status, answer.outcome) == (200, "STALE")


@pytest.mark.usefixtures("patient_leases")
async def test_what_is_known_does_not_wait_for_the_leases_of_others(
    tmp_path: Path, model: FakeModel, vectors: Vectors
) -> None:
    def locked() -> sqlite3.Connection:
        path = tmp_path / "nearhit.db.leases"
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        return connection

    async with pair(tmp_path, model) as (one, _):
        await embedding(one)(["known"])
        connection = await asyncio.to_thread(locked)
        try:
            waits = begun(one, ["new"])
            # The lock is held until this is answered: were it waited for, neither would be.
            assert (await begun(one, ["known"])).outcome == "HIT"
            assert not waits.done()
        finally:
            await asyncio.to_thread(connection.close)
        assert (await waits).outcome == "MISS"
        await one.settled()


@pytest.mark.parametrize("braces", [10, 5_000])
def test_an_item_full_of_braces_is_taken_apart_like_any(braces: int) -> None:
    body = b'{"data":[{"index":0,"embedding":[1],"text":"' + b"} " * braces + b'"}]}'
    arriving = Arriving(1)
    for at in range(0, len(body), 1_024):
        arriving.feed(body[at : at + 1_024])
    assert arriving.finish() == lay_out(body, 1)
