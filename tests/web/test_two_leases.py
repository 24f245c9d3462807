"""Two nearhits on one database file: equal calls make one request to the server, whichever of the two they come to."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, eventually, running_proxy, settings_for
from tests.failures.disks import Disk
from tests.failures.serving import Nearhit, serving_on
from tests.fake_model import FakeModel, Respond, chat_events, error, held, numbered, raw, reply, sse, streamed
from tests.web.test_exact_tier import said

FORMS: list[dict[str, Any]] = [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}]
COLLAPSED = "nearhit; fwd=miss; collapsed"


def others_know(proxy: Proxy) -> bool:
    return proxy.services.leases is not None and proxy.services.leases.shared


def held_and_numbered() -> Respond:
    """Wait for `release`, and then answer each request with the number with which it came."""

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        number = model.started
        await model.release.wait()
        return await reply(f"answer {number}")(model, request, asked)

    return respond


pytestmark = pytest.mark.usefixtures("patient_leases")


@pytest.fixture
async def two(tmp_path: Path, model: FakeModel) -> AsyncIterator[tuple[Proxy, Proxy]]:
    model.respond = held_and_numbered()
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await eventually(lambda: others_know(one) and others_know(other))
        yield one, other


async def asked(proxy: Proxy, model: FakeModel, count: int, **fields: Any) -> asyncio.Task[Answer]:
    """A call that goes upstream as the server's `count`th."""
    task = asyncio.create_task(proxy.chat("x", **fields))
    await eventually(lambda: model.started == count)
    return task


async def waits(proxy: Proxy, **fields: Any) -> asyncio.Task[Answer]:
    """A call that is on its way, wherever that leads."""
    before = proxy.services.in_flight
    task = asyncio.create_task(proxy.chat("x", **fields))
    await eventually(lambda: proxy.services.in_flight > before)
    # For longer than it takes to find the lease held.
    await asyncio.sleep(0.1)
    return task


async def test_a_hundred_calls_at_two_make_one_request(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    forms = [FORMS[number % 3] for number in range(50)]
    tasks = [asyncio.create_task(proxy.chat("x", **form)) for form in forms for proxy in two]
    await eventually(lambda: model.started == 1)
    # But for one at each, all wait for another of their own.
    await eventually(lambda: [proxy.services.metrics.value("nearhit_joined_total") for proxy in two] == [49, 49])
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert len(model.generations) == 1
    assert {said(answer) for answer in answers} == {"answer 1"}
    assert sorted(answer.outcome for answer in answers) == ["JOINED"] * 99 + ["MISS"]
    assert {a.headers["Cache-Status"] for a in answers if a.outcome == "JOINED"} == {COLLAPSED}
    assert all([await proxy.chat("x") for proxy in two])
    assert {(await proxy.chat("x")).outcome for proxy in two} == {"HIT"}


@pytest.mark.parametrize("leading", FORMS[:2])
@pytest.mark.parametrize("following", FORMS)
async def test_the_other_answers_in_its_callers_form(
    two: tuple[Proxy, Proxy], model: FakeModel, leading: dict[str, Any], following: dict[str, Any]
) -> None:
    one, other = two
    model.respond = held(streamed(sse(*chat_events("one ", "two", usage=True))) if leading else reply("one ", "two"))
    leader = await asked(one, model, 1, **leading)
    follower = await waits(other, **following)
    model.release.set()
    answers = await asyncio.gather(leader, follower)
    assert [said(answer) for answer in answers] == ["one two", "one two"]
    assert [answer.outcome for answer in answers] == ["MISS", "JOINED"]
    assert "content-encoding" not in answers[1].headers
    kind = "text/event-stream" if following.get("stream") else "application/json"
    assert answers[1].headers["Content-Type"].partition(";")[0] == kind
    asked_for_usage = bool(following.get("stream_options")) or not following
    assert (b'"usage"' in answers[1].body) is asked_for_usage
    assert len(model.generations) == 1


async def test_what_another_fetched_is_stored_and_counted_once(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    one, other = two
    leader, follower = await asked(one, model, 1), await waits(other)
    model.release.set()
    await asyncio.gather(leader, follower)
    await one.settled()
    await other.settled()

    def counted(proxy: Proxy, name: str) -> float:
        return proxy.services.metrics.value(name)

    assert [counted(proxy, "nearhit_stored_total") for proxy in two] == [1, 0]
    assert [counted(proxy, "nearhit_joined_total") for proxy in two] == [0, 1]
    assert [counted(proxy, "nearhit_upstream_seconds_count") for proxy in two] == [1, 0]
    assert (await other.stats())["not_stored"] == {}


async def test_one_that_is_not_kept_holds_nobody_up(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    one, other = two
    body = error(500, "out of memory", "server_error").body
    assert isinstance(body, bytes)
    model.respond = held(raw(body, status=500))
    leader, follower = await asked(one, model, 1), await waits(other)
    model.release.set()
    answers = await asyncio.gather(leader, follower)
    assert [(a.status, a.body, a.outcome) for a in answers] == [(500, body, "MISS")] * 2
    # The next, too: they are told for a while, and ask side by side.
    model.release.clear()
    model.respond = held_and_numbered()
    again = [await asked(one, model, 3), await asked(other, model, 4)]
    model.release.set()
    assert {answer.outcome for answer in await asyncio.gather(*again)} == {"MISS"}


async def test_a_caller_that_leaves_hands_over_to_the_other(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    one, other = two
    leader, follower = await asked(one, model, 1), await waits(other)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    await eventually(lambda: (model.gone, model.started) == (1, 2))
    model.release.set()
    answer = await follower
    assert (answer.outcome, said(answer)) == ("MISS", "answer 2")
    await other.settled()
    assert (await other.chat("x")).outcome == "HIT"


async def test_a_caller_that_leaves_while_it_waits_leaves_nothing(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    one, other = two
    leader, follower = await asked(one, model, 1), await waits(other)
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    await other.settled()
    model.release.set()
    assert said(await leader) == "answer 1"
    assert (model.started, model.gone) == (1, 0)


async def test_one_that_stops_hands_over(tmp_path: Path, model: FakeModel) -> None:
    model.respond = held_and_numbered()
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as other, AsyncExitStack() as stack:
        one = await stack.enter_async_context(running_proxy(settings))
        await eventually(lambda: others_know(one) and others_know(other))
        leader, follower = await asked(one, model, 1), await waits(other)
        await stack.aclose()
        await asyncio.gather(leader, return_exceptions=True)
        await eventually(lambda: model.started == 2)
        model.release.set()
        assert said(await follower) == "answer 2"


async def test_calls_that_want_an_answer_of_their_own_do_not_wait(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    one, other = two
    leader = await asked(one, model, 1)
    own = await asked(other, model, 2, headers={"Cache-Control": "no-cache"})
    unstored = await asked(other, model, 3, headers={"Cache-Control": "no-store"})
    model.release.set()
    assert [a.outcome for a in await asyncio.gather(leader, own, unstored)] == ["MISS", "MISS", "BYPASS"]


async def test_different_calls_do_not_wait_for_one_another(two: tuple[Proxy, Proxy], model: FakeModel) -> None:
    one, other = two
    tasks = [asyncio.create_task(proxy.chat(f"{number}")) for number, proxy in enumerate([one, other, one, other])]
    await eventually(lambda: model.started == 4)
    model.release.set()
    assert {answer.outcome for answer in await asyncio.gather(*tasks)} == {"MISS"}


async def test_who_has_waited_long_enough_asks_itself(tmp_path: Path, model: FakeModel) -> None:
    model.respond = held_and_numbered()
    settings = settings_for(tmp_path, model.url, cache__join_timeout_s=0.2)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await eventually(lambda: others_know(one) and others_know(other))
        leader = await asked(one, model, 1)
        follower = await asked(other, model, 2)
        model.release.set()
        assert {answer.status for answer in await asyncio.gather(leader, follower)} == {200}


async def test_callers_who_share_nothing_do_not_wait_for_one_another(tmp_path: Path, model: FakeModel) -> None:
    model.respond = held_and_numbered()
    settings = settings_for(tmp_path, model.url, sharing="per-credential")
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await eventually(lambda: others_know(one) and others_know(other))
        leader = await asked(one, model, 1, headers={"Authorization": "Bearer a"})
        follower = await asked(other, model, 2, headers={"Authorization": "Bearer b"})
        model.release.set()
        await asyncio.gather(leader, follower)


async def test_a_stale_answer_is_renewed_by_one_of_two(tmp_path: Path, model: FakeModel) -> None:
    model.respond = numbered()
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await eventually(lambda: others_know(one) and others_know(other))
        await one.chat("x", cache={"ttl": 1})
        await one.settled()
        await one.services.buffer.flush()
        await asyncio.sleep(1.1)
        model.respond = held_and_numbered()
        leader = await asked(one, model, 2)
        follower = await waits(other)
        model.release.set()
        answers = await asyncio.gather(leader, follower)
        assert [said(answer) for answer in answers] == ["answer 2"] * 2
        assert [answer.outcome for answer in answers] == ["MISS", "JOINED"]


async def test_a_proxy_that_is_alone_makes_no_file(tmp_path: Path, model: FakeModel) -> None:
    model.respond = numbered()
    async with running_proxy(settings_for(tmp_path, model.url)) as one:
        assert (await one.chat("x")).outcome == "MISS"
        assert not others_know(one)
        assert not await asyncio.to_thread((tmp_path / "nearhit.db.leases").exists)


@pytest.mark.parametrize("options", [{"cache__persist": "off"}, {"cache__leases": "off"}])
async def test_without_leases_each_asks_itself(tmp_path: Path, model: FakeModel, options: dict[str, str]) -> None:
    model.respond = held_and_numbered()
    settings = settings_for(tmp_path, model.url, **options)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        assert one.services.leases is None
        tasks = [await asked(one, model, 1), await asked(other, model, 2)]
        model.release.set()
        assert {answer.outcome for answer in await asyncio.gather(*tasks)} == {"MISS"}
    assert not await asyncio.to_thread((tmp_path / "nearhit.db.leases").exists)


def overtake(path: Path) -> None:
    """As if its holder had been paused for longer than its term, and whoever took it then had ended."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE lease SET holder = 1, token = token + 1")


async def test_who_was_overtaken_does_not_store(two: tuple[Proxy, Proxy], model: FakeModel, tmp_path: Path) -> None:
    one, other = two
    overtaken = await asked(one, model, 1)
    await asyncio.to_thread(overtake, tmp_path / "nearhit.db.leases")
    overtaking = await asked(other, model, 2)
    model.release.set()
    assert [said(answer) for answer in await asyncio.gather(overtaken, overtaking)] == ["answer 1", "answer 2"]
    await one.settled()
    await other.settled()
    assert (await one.stats())["not_stored"] == {"lease-lost": 1}
    assert (await other.stats())["not_stored"] == {}
    assert said(await other.chat("x")) == "answer 2"


async def test_a_spoilt_file_costs_nobody_an_answer(two: tuple[Proxy, Proxy], model: FakeModel, tmp_path: Path) -> None:
    model.respond = numbered()
    await two[0].chat("before")
    await asyncio.to_thread((tmp_path / "nearhit.db.leases").write_bytes, b"nobody's database, though of some length")
    answers = await asyncio.gather(*(proxy.chat(f"{number}") for number in range(4) for proxy in two))
    assert {answer.status for answer in answers} == {200}


# In processes of their own


@asynccontextmanager
async def two_processes(folder: Path, model: FakeModel) -> AsyncIterator[tuple[Nearhit, Nearhit]]:
    disk, always = Disk(folder), {"NEARHIT_CACHE_LEASES": "on"}
    async with serving_on(disk, model, **always) as one, serving_on(disk, model, **always) as other:
        yield one, other


async def test_a_hundred_calls_at_two_processes_make_one_request(tmp_path: Path, model: FakeModel) -> None:
    model.respond = held_and_numbered()
    async with two_processes(tmp_path, model) as two:
        tasks = [asyncio.create_task(each.chat("x")) for _ in range(50) for each in two]
        await eventually(lambda: model.started == 1)
        # All have come by then, or come later and find it stored.
        await asyncio.sleep(0.3)
        model.release.set()
        answers = await asyncio.gather(*tasks)
    assert {status for status, _, _ in answers} == {200}
    assert len(model.generations) == 1
    assert [outcome for _, outcome, _ in answers].count("MISS") == 1


async def test_when_the_one_that_asks_is_killed_the_other_asks_once(tmp_path: Path, model: FakeModel) -> None:
    model.respond = held_and_numbered()
    async with two_processes(tmp_path, model) as (one, other):
        leader = asyncio.create_task(one.chat("x"))
        await eventually(lambda: model.started == 1)
        followers = [asyncio.create_task(other.chat("x")) for _ in range(10)]
        await asyncio.sleep(0.3)
        assert model.started == 1
        await one.stop(signal.SIGKILL)
        await asyncio.gather(leader, return_exceptions=True)
        await eventually(lambda: model.started == 2)
        model.release.set()
        assert {status for status, _, _ in await asyncio.gather(*followers)} == {200}
    assert model.started == 2
