"""A model that is swapped turns the cache over; one that is only away does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from proxy.upstream.adapter import Loading, Locked, Seen, Sighting, Silent, Unidentified, Unreachable
from proxy.upstream.identity import Identity, Standing, after, answered
from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, held, numbered, reply

SEEN = Seen(b"f", "run-1", ("m",))
KNOWN = after(Identity(), SEEN)


def props(marker: str = "run-1", path: str = "/a.gguf", **params: Any) -> dict[str, Any]:
    return {"media_marker": marker, "model_path": path, "default_generation_settings": {"params": params}}


@pytest.mark.parametrize(
    ("before", "sighting", "standing", "moved"),
    [
        (Identity(), SEEN, Standing.CONFIRMED, True),
        (Identity(), Unreachable(), Standing.UNKNOWN, False),
        (Identity(), Locked(), Standing.UNKNOWN, False),
        (Identity(), Unidentified(), Standing.UNKNOWN, False),
        (KNOWN, SEEN, Standing.CONFIRMED, False),
        (KNOWN, Seen(b"g", "run-1", ()), Standing.CONFIRMED, True),
        (KNOWN, Seen(b"f", "run-2", ()), Standing.CONFIRMED, True),
        (KNOWN, Unreachable(), Standing.AWAY, True),
        (KNOWN, Loading(), Standing.AWAY, True),
        (KNOWN, Silent(), Standing.CONFIRMED, False),
        (KNOWN, Locked(), Standing.CONFIRMED, False),
        (KNOWN, Unidentified(), Standing.DOUBT, True),
        (after(KNOWN, Unreachable()), Unreachable(), Standing.AWAY, False),
        (after(KNOWN, Unreachable()), SEEN, Standing.CONFIRMED, True),
        (after(KNOWN, Unreachable()), Silent(), Standing.AWAY, False),
        (after(KNOWN, Unreachable()), Locked(), Standing.DOUBT, True),
        (after(KNOWN, Unidentified()), SEEN, Standing.CONFIRMED, True),
        (after(KNOWN, Unidentified()), Unidentified(), Standing.DOUBT, False),
    ],
)
def test_what_is_known_after_a_sighting(before: Identity, sighting: Sighting, standing: Standing, moved: bool) -> None:
    now = after(before, sighting)
    assert (now.standing, now.epoch > before.epoch) == (standing, moved)


def test_one_that_was_away_and_answers_may_be_another() -> None:
    back = answered(after(KNOWN, Unreachable()))
    assert (back.standing, back.trusted, back.confirmed) == (Standing.DOUBT, False, False)
    assert answered(KNOWN) is KNOWN


async def settled(proxy: Proxy, **fields: Any) -> str:
    answer = await proxy.chat("x", **fields)
    await proxy.settled()
    return answer.outcome


@pytest.fixture
async def llama(start: StartProxy, model: FakeModel) -> Proxy:
    model.props = props()
    proxy = await start()
    assert proxy.services.tracker.adapter.kind == "llamacpp"
    return proxy


@pytest.mark.parametrize(
    "swapped",
    [
        props("run-2", "/b.gguf"),
        props("run-1", "/b.gguf"),
        props("run-2", temperature=0.1),
        {**props("run-2"), "chat_template": "x"},
        {**props("run-2"), "model_ftype": "Q8_0"},
    ],
)
async def test_another_model_or_default_makes_old_answers_unreachable(
    llama: Proxy, model: FakeModel, swapped: dict[str, Any]
) -> None:
    assert [await settled(llama) for _ in range(2)] == ["MISS", "HIT"]
    before = llama.services.tracker.current.fingerprint
    model.props = swapped
    await eventually(lambda: llama.services.tracker.current.fingerprint != before)
    assert await settled(llama) == "MISS"


async def test_a_restart_of_the_same_model_keeps_its_answers(llama: Proxy, model: FakeModel) -> None:
    assert await settled(llama) == "MISS"
    model.props = props("run-2")
    await eventually(lambda: llama.services.tracker.current.instance == "run-2")
    assert await settled(llama) == "HIT"


async def test_an_answer_fetched_across_a_restart_is_not_kept(start: StartProxy, model: FakeModel) -> None:
    model.props = props()
    proxy = await start(upstream__poll_s=3600)
    model.respond = held(reply("from which run?"))
    task = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    model.props = props("run-2", "/b.gguf")
    model.release.set()
    assert (await task).status == 200
    await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"fingerprint-in-doubt": 1}
    await eventually(lambda: proxy.services.tracker.current.instance == "run-2")
    assert await settled(proxy) == "MISS"
    assert await settled(proxy) == "HIT"


async def test_while_in_doubt_calls_go_upstream_and_are_not_kept(start: StartProxy, model: FakeModel) -> None:
    model.props = props()
    llama = await start(upstream__kind="llamacpp")
    await settled(llama)
    model.props = {"no": "identity"}
    model.extra = None
    await eventually(lambda: llama.services.tracker.current.standing is Standing.DOUBT)
    assert [await settled(llama) for _ in range(2)] == ["MISS", "MISS"]
    model.props = props()
    await eventually(lambda: llama.services.tracker.current.confirmed)
    assert await settled(llama) == "HIT"


async def test_an_unknown_fingerprint_bypasses_and_says_what_to_do(start: StartProxy, model: FakeModel) -> None:
    model.props, model.key = props(), "mine"
    proxy = await start()
    answer = await proxy.chat("x")
    assert answer.headers["Cache-Status"] == "nearhit; fwd=bypass; detail=no-fingerprint"
    ready = (await proxy.send("GET", "/-/ready")).json
    assert "set upstream.api_key" in ready["upstream"]["trouble"]


async def test_a_callers_key_is_borrowed_to_see_what_runs_there(start: StartProxy, model: FakeModel) -> None:
    model.props, model.key = props(), "mine"
    proxy = await start()
    mine = {"Authorization": "Bearer mine"}
    assert (await proxy.chat("x", headers=mine)).outcome == "BYPASS"
    await eventually(lambda: proxy.services.tracker.current.confirmed)
    for expected in ("MISS", "HIT"):
        answer = await proxy.chat("x", headers=mine)
        assert (answer.outcome, answer.status) == (expected, 200)
        await proxy.settled()
    assert (await proxy.chat("x")).status == 401


async def test_a_busy_server_that_answers_no_probe_keeps_its_standing(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.web import services

    monkeypatch.setattr(services, "_PROBE_TIMEOUT_S", 0.05)
    proxy = await start()
    never = asyncio.Event()

    async def busy(request: Any) -> None:
        if request.method == "GET":
            await never.wait()

    model.extra = busy
    model.respond = held(reply("slow"))
    task = asyncio.create_task(proxy.chat("x"))
    looks = len(model.seen)
    await eventually(lambda: len(model.seen) > looks + 3)
    model.release.set()
    await task
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"
    model.extra = None
    never.set()


async def test_the_operators_epoch_turns_the_cache_over(tmp_path: Path, model: FakeModel) -> None:
    model.respond = numbered()
    for epoch, expected in (("1", "MISS"), ("1", "HIT"), ("2", "MISS"), ("1", "HIT")):
        async with running_proxy(settings_for(tmp_path, model.url, upstream__epoch=epoch)) as proxy:
            assert await settled(proxy) == expected


async def test_another_upstream_has_other_answers(tmp_path: Path, model: FakeModel) -> None:
    for url, expected in (
        (model.url, "MISS"),
        (model.url.replace("127.0.0.1", "localhost"), "MISS"),
        (model.url, "HIT"),
    ):
        async with running_proxy(settings_for(tmp_path, url)) as proxy:
            assert await settled(proxy) == expected


async def test_the_model_list_identifies_a_server_that_shows_nothing_else(proxy: Proxy, model: FakeModel) -> None:
    assert [await settled(proxy) for _ in range(2)] == ["MISS", "HIT"]
    before = proxy.services.tracker.current.fingerprint
    model.models = ["another"]
    await eventually(lambda: proxy.services.tracker.current.fingerprint != before)
    assert await settled(proxy) == "MISS"


async def test_a_passing_trouble_of_the_server_does_not_change_its_kind(llama: Proxy, model: FakeModel) -> None:
    from aiohttp import web

    await settled(llama)

    async def trouble(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=500) if request.path == "/props" else None

    model.extra = trouble
    await eventually(lambda: llama.services.tracker.current.standing is Standing.DOUBT)
    model.extra = None
    await eventually(lambda: llama.services.tracker.current.confirmed)
    assert llama.services.tracker.adapter.kind == "llamacpp"
    assert await settled(llama) == "HIT"


async def test_another_kind_of_server_in_the_same_place_is_recognised(proxy: Proxy, model: FakeModel) -> None:
    assert proxy.services.tracker.adapter.kind == "openai"
    model.loading = True
    await eventually(lambda: proxy.services.tracker.current.away)
    model.loading, model.props = False, props()
    await eventually(lambda: proxy.services.tracker.adapter.kind == "llamacpp")


async def test_a_server_too_busy_to_identify_itself_keeps_its_standing(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.web import services

    monkeypatch.setattr(services, "_PROBE_TIMEOUT_S", 0.05)
    model.props = props()
    proxy = await start(upstream__poll_s=3600)
    assert [await settled(proxy) for _ in range(2)] == ["MISS", "HIT"]
    never = asyncio.Event()

    async def busy(request: Any) -> None:
        if request.path == "/props":
            await never.wait()

    model.extra = busy
    await proxy.chat("another")
    await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"fingerprint-in-doubt": 1}
    assert await settled(proxy) == "HIT"
    never.set()


async def test_our_own_key_confirms_for_callers_who_may_not_see_what_runs(start: StartProxy, model: FakeModel) -> None:
    from aiohttp import web

    model.props = props()

    async def props_for_us_alone(request: web.Request) -> web.StreamResponse | None:
        refused = request.path == "/props" and request.headers.get("Authorization") != "Bearer ours"
        return web.Response(status=401) if refused else None

    model.extra = props_for_us_alone
    proxy = await start(upstream__api_key="ours")
    assert [await settled(proxy) for _ in range(2)] == ["MISS", "HIT"]


async def test_a_check_that_told_nothing_confirms_nobody_who_waited_for_it(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.web import services

    monkeypatch.setattr(services, "_PROBE_TIMEOUT_S", 0.05)
    model.props = props()
    proxy = await start(upstream__poll_s=3600)
    never = asyncio.Event()

    async def busy(request: Any) -> None:
        if request.path == "/props":
            await never.wait()

    model.extra = busy
    told = await asyncio.gather(*(proxy.services.tracker.confirm() for _ in range(5)))
    assert [identity.confirmed for identity in told] == [False] * 5
    assert proxy.services.tracker.current.confirmed
    never.set()
