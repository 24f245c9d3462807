"""A model that is swapped turns the cache over; one that is only away does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from proxy.upstream.adapter import Loading, Locked, Seen, Sighting, Silent, Unidentified, Unreachable
from proxy.upstream.identity import Identity, Standing, Tracker, after, answered
from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, held, numbered, reply

SEEN = Seen(b"f", "run-1", ("m",))
KNOWN = after(Identity(), SEEN)
A = [(99, -1.85), (286, -2.73), (471, -3.11), (30, -3.61)]
B = [(token, logprob - 0.3) for token, logprob in A]


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


def test_what_is_loaded_and_its_file_are_told_as_they_were_seen() -> None:
    now = after(KNOWN, Seen(b"f", "run-1", ("m",), "m", {"m": "m.gguf"}))
    assert (now.loaded, now.files) == ("m", {"m": "m.gguf"})
    away = after(now, Unreachable())
    assert (away.loaded, away.files) == ("m", {"m": "m.gguf"})


def test_why_nothing_identifies_it_is_told_where_that_is_known() -> None:
    assert after(KNOWN, Unidentified("it hides")).trouble == "it hides"
    assert "upstream.epoch" in after(KNOWN, Unidentified()).trouble


def test_one_that_was_away_and_answers_may_be_another() -> None:
    back = answered(after(KNOWN, Unreachable()))
    assert (back.standing, back.trusted, back.confirmed) == (Standing.DOUBT, False, False)
    assert answered(KNOWN) is KNOWN


def tracker_of(proxy: Proxy) -> Tracker:
    return proxy.services.backends.first.tracker


async def settled(proxy: Proxy, **fields: Any) -> str:
    answer = await proxy.chat("x", **fields)
    await proxy.settled()
    return answer.outcome


@pytest.fixture
async def llama(start: StartProxy, model: FakeModel) -> Proxy:
    model.props = props()
    proxy = await start()
    assert tracker_of(proxy).adapter.kind == "llamacpp"
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
    before = tracker_of(llama).current.fingerprint
    model.props = swapped
    await eventually(lambda: tracker_of(llama).current.fingerprint != before)
    assert await settled(llama) == "MISS"


async def test_a_restart_of_the_same_model_keeps_its_answers(llama: Proxy, model: FakeModel) -> None:
    assert await settled(llama) == "MISS"
    model.props = props("run-2")
    await eventually(lambda: tracker_of(llama).current.instance == "run-2")
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
    await eventually(lambda: tracker_of(proxy).current.instance == "run-2")
    assert await settled(proxy) == "MISS"
    assert await settled(proxy) == "HIT"


async def test_while_in_doubt_calls_go_upstream_and_are_not_kept(start: StartProxy, model: FakeModel) -> None:
    model.props = props()
    llama = await start(upstream__kind="llamacpp")
    await settled(llama)
    model.props = {"no": "identity"}
    model.extra = None
    await eventually(lambda: tracker_of(llama).current.standing is Standing.DOUBT)
    assert [await settled(llama) for _ in range(2)] == ["MISS", "MISS"]
    model.props = props()
    await eventually(lambda: tracker_of(llama).current.confirmed)
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
    await eventually(lambda: tracker_of(proxy).current.confirmed)
    for expected in ("MISS", "HIT"):
        answer = await proxy.chat("x", headers=mine)
        assert (answer.outcome, answer.status) == (expected, 200)
        await proxy.settled()
    assert (await proxy.chat("x")).status == 401


async def test_a_busy_server_that_answers_no_probe_keeps_its_standing(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.web import backend

    monkeypatch.setattr(backend, "PROBE_TIMEOUT_S", 0.05)
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
    before = tracker_of(proxy).current.fingerprint
    model.models = ["another"]
    await eventually(lambda: tracker_of(proxy).current.fingerprint != before)
    assert await settled(proxy) == "MISS"


async def test_a_passing_trouble_of_the_server_does_not_change_its_kind(llama: Proxy, model: FakeModel) -> None:
    from aiohttp import web

    await settled(llama)

    async def trouble(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=500) if request.path == "/props" else None

    model.extra = trouble
    await eventually(lambda: tracker_of(llama).current.standing is Standing.DOUBT)
    model.extra = None
    await eventually(lambda: tracker_of(llama).current.confirmed)
    assert tracker_of(llama).adapter.kind == "llamacpp"
    assert await settled(llama) == "HIT"


async def test_another_kind_of_server_in_the_same_place_is_recognised(proxy: Proxy, model: FakeModel) -> None:
    assert tracker_of(proxy).adapter.kind == "openai"
    model.loading = True
    await eventually(lambda: tracker_of(proxy).current.away)
    model.loading, model.props = False, props()
    await eventually(lambda: tracker_of(proxy).adapter.kind == "llamacpp")


async def test_a_server_too_busy_to_identify_itself_keeps_its_standing(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.web import backend

    monkeypatch.setattr(backend, "PROBE_TIMEOUT_S", 0.05)
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
    from proxy.web import backend

    monkeypatch.setattr(backend, "PROBE_TIMEOUT_S", 0.05)
    model.props = props()
    proxy = await start(upstream__poll_s=3600)
    never = asyncio.Event()

    async def busy(request: Any) -> None:
        if request.path == "/props":
            await never.wait()

    model.extra = busy
    told = await asyncio.gather(*(tracker_of(proxy).confirm() for _ in range(5)))
    assert [identity.confirmed for identity in told] == [False] * 5
    assert tracker_of(proxy).current.confirmed
    never.set()


async def content(proxy: Proxy) -> tuple[str, str]:
    """Outcome and text of the answer to one question."""
    answer = await proxy.chat("x")
    await proxy.settled()
    return answer.outcome, answer.json["choices"][0]["message"]["content"]


async def restarted(proxy: Proxy, model: FakeModel, marker: str, vector: list[tuple[int, float]]) -> None:
    """The server was started again with these weights under the same path, and nearhit has seen it."""
    model.props, model.vector = props(marker), vector
    await eventually(lambda: tracker_of(proxy).current.instance == marker and tracker_of(proxy).current.confirmed)


@pytest.fixture
def weighty(model: FakeModel) -> FakeModel:
    model.props, model.vector, model.respond = props(), A, numbered()
    return model


async def test_other_weights_under_the_same_path_have_other_answers(start: StartProxy, weighty: FakeModel) -> None:
    proxy = await start()
    assert [await content(proxy) for _ in range(2)] == [("MISS", "answer 1"), ("HIT", "answer 1")]
    await restarted(proxy, weighty, "run-2", B)
    assert [await content(proxy) for _ in range(2)] == [("MISS", "answer 2"), ("HIT", "answer 2")]
    await restarted(proxy, weighty, "run-3", A)
    assert await content(proxy) == ("HIT", "answer 1")
    await restarted(proxy, weighty, "run-4", B)
    assert await content(proxy) == ("HIT", "answer 2")


async def test_the_same_weights_after_a_restart_keep_their_answers_though_figures_are_a_little_off(
    start: StartProxy, weighty: FakeModel
) -> None:
    proxy = await start()
    assert await content(proxy) == ("MISS", "answer 1")
    await restarted(proxy, weighty, "run-2", [(token, logprob - 0.015) for token, logprob in A])
    assert await content(proxy) == ("HIT", "answer 1")


@pytest.mark.parametrize("off", [0.0, 0.015])
async def test_a_restart_of_nearhit_keeps_the_answers_and_notices_weights_swapped_meanwhile(
    tmp_path: Path, weighty: FakeModel, off: float
) -> None:
    nearly_a, nearly_b = ([(token, logprob + off) for token, logprob in vector] for vector in (A, B))
    for vector, expected in ((A, "answer 1"), (B, "answer 2"), (nearly_a, "answer 1"), (nearly_b, "answer 2")):
        weighty.vector = vector
        async with running_proxy(settings_for(tmp_path, weighty.url)) as proxy:
            assert (await content(proxy))[1] == expected
            assert await content(proxy) == ("HIT", expected)


async def test_while_the_check_of_the_weights_fails_calls_go_upstream_and_are_not_kept(
    start: StartProxy, weighty: FakeModel
) -> None:
    proxy = await start()
    assert [await content(proxy) for _ in range(2)] == [("MISS", "answer 1"), ("HIT", "answer 1")]
    weighty.props, weighty.completion_status = props("run-2"), 500
    await eventually(lambda: "HTTP 500" in tracker_of(proxy).current.trouble)
    assert [await content(proxy) for _ in range(2)] == [("MISS", "answer 2"), ("MISS", "answer 3")]
    assert (await proxy.stats())["not_stored"] == {"fingerprint-in-doubt": 2}
    weighty.completion_status = 200
    await eventually(lambda: tracker_of(proxy).current.confirmed)
    assert await content(proxy) == ("HIT", "answer 1")


async def test_while_it_is_away_the_last_confirmed_answers_are_served(start: StartProxy, weighty: FakeModel) -> None:
    proxy = await start()
    assert await content(proxy) == ("MISS", "answer 1")
    weighty.loading = True
    await eventually(lambda: tracker_of(proxy).current.away)
    assert await content(proxy) == ("HIT", "answer 1")
    weighty.loading, weighty.vector, weighty.props = False, B, props("run-2")
    await eventually(lambda: tracker_of(proxy).current.confirmed)
    assert await content(proxy) == ("MISS", "answer 2")


async def test_a_server_that_tells_no_logprobs_is_cached_by_what_it_shows(
    start: StartProxy, weighty: FakeModel
) -> None:
    weighty.completion_status = 501
    proxy = await start()
    assert [await content(proxy) for _ in range(2)] == [("MISS", "answer 1"), ("HIT", "answer 1")]


async def test_a_callers_key_is_borrowed_for_the_check_of_the_weights_too(
    start: StartProxy, weighty: FakeModel
) -> None:
    weighty.key = "mine"
    proxy = await start()
    mine = {"Authorization": "Bearer mine"}
    assert (await proxy.chat("x", headers=mine)).outcome == "BYPASS"
    await eventually(lambda: tracker_of(proxy).current.confirmed)
    asked = [seen.headers["Authorization"] for seen in weighty.seen if seen.target == "/completion"]
    assert asked == ["Bearer mine"]
