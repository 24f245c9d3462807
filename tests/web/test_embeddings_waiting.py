"""Batches of embeddings that wait for others: each input gets its own vector, and no stale one for want of patience."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from tests.conftest import StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel
from tests.web.test_embeddings import Vectors, embedding, of, outlived, told, vectors

__all__ = ["vectors"]


@pytest.mark.parametrize("lands_last", [False, True])
async def test_a_batch_that_has_waited_long_enough_for_others_gets_its_own_vectors_and_so_does_everybody_after_it(
    start: StartProxy, vectors: Vectors, lands_last: bool
) -> None:
    embed = embedding(await start(cache__join_timeout_s=0.05))
    vectors.held = True
    # The late batch waits for "a" and "c" of one, and for "b" between them of the other.
    others = []
    for number, batch in enumerate((["a", "c"], ["b", "x"]), 1):
        others.append(asyncio.create_task(embed(batch, settle=False)))
        await eventually(lambda number=number: vectors.started == number)  # type: ignore[misc]
    early, vectors.release = vectors.release, asyncio.Event()
    late = asyncio.create_task(embed(["a", "b", "c"], settle=False))
    await eventually(lambda: vectors.started > 2)
    for release in (early, vectors.release) if lands_last else (vectors.release, early):
        release.set()
        await (asyncio.gather(*others) if release is early else late)
    assert told(await late) == of("a", "b", "c")
    for text in ("a", "b", "c"):
        again = await embed([text])
        assert (again.outcome, told(again)) == ("HIT", of(text))


async def test_before_the_first_look_a_server_is_asked_rather_than_stood_in_for(
    tmp_path: Path, model: FakeModel, vectors: Vectors
) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as proxy:
        await outlived(embedding(proxy), "old")

    async def shows_nothing_yet(request: web.Request) -> web.StreamResponse | None:
        if request.method == "GET":
            await model.release.wait()
        return await vectors.serve(request)

    model.extra = shows_nothing_yet
    async with running_proxy(settings, wait=False) as proxy:
        early = asyncio.create_task(embedding(proxy)(["old"], settle=False))
        await eventually(lambda: vectors.started == 2 or early.done())
        model.release.set()
        assert (await early).outcome == "MISS"
        await proxy.settled()
