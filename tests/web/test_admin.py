"""Health, readiness and statistics."""

from __future__ import annotations

import asyncio

from aiohttp import web

from proxy import __version__
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, error, held, raw, reply

NAMES = (
    *("version", "uptime_s", "cache.enabled", "cache.size", "cache.bytes", "cache.max_entries", "cache.max_bytes"),
    *("cache.trouble", "cache.hit_exact", "cache.hit_approx", "cache.hit_shadow"),
    *("cache.wrong_hits", "cache.saved_ms", "cache.load_ms", "cache.stored", "cache.saved_tokens"),
    *(
        "requests",
        "misses",
        "near_verdicts",
        "bypassed",
        "not_stored",
        "evicted",
        "in_flight",
        "upstream",
        "upstreams",
        "sharing",
        "near",
        "warnings",
    ),
)


async def test_healthy_says_that_the_process_is_up(proxy: Proxy) -> None:
    answer = await proxy.send("GET", "/-/healthy")
    assert (answer.status, answer.json) == (200, {"status": "ok", "version": __version__})


async def test_health_can_be_asked_with_head(proxy: Proxy) -> None:
    for path in ("/-/healthy", "/-/ready"):
        answer = await proxy.send("HEAD", path)
        assert (answer.status, answer.body) == (200, b"")


async def test_ready_after_the_first_look(proxy: Proxy, model: FakeModel) -> None:
    answer = await proxy.send("GET", "/-/ready")
    assert answer.status == 200
    assert answer.json["status"] == "ready"
    assert answer.json["reason"] == ""
    assert answer.json["upstream"]["standing"] == "confirmed"
    # What is behind is for those with admin access.
    assert set(answer.json) == {"status", "reason", "upstream", "upstreams", "storage"}
    assert answer.json["storage"] == {"standing": "open"}
    assert (await proxy.stats())["upstream"]["url"] == model.url


def _hold_looks(model: FakeModel) -> None:
    async def extra(request: web.Request) -> web.StreamResponse | None:
        if request.path == "/props":
            await model.release.wait()
        return None

    model.extra = extra


async def test_not_ready_before_the_first_look_but_requests_are_served(start: StartProxy, model: FakeModel) -> None:
    _hold_looks(model)
    proxy = await start(wait=False)
    waiting = await proxy.send("GET", "/-/ready")
    assert waiting.status == 503
    assert waiting.json["status"] == "starting"
    assert waiting.json["reason"] == "waiting for the first look at the upstream"
    assert (await proxy.chat()).status == 200
    model.release.set()
    await proxy.services.backends.first.tracker.looked.wait()
    assert (await proxy.send("GET", "/-/ready")).status == 200


async def test_ready_once_the_limit_has_passed(start: StartProxy, model: FakeModel) -> None:
    _hold_looks(model)
    proxy = await start(wait=False, upstream__connect_timeout_s=0.2)
    async with asyncio.timeout(60):
        while True:
            answer = await proxy.send("GET", "/-/ready")
            if answer.status == 200:
                break
            await asyncio.sleep(0.01)
    assert not proxy.services.backends.first.tracker.looked.is_set()
    model.release.set()


async def test_later_trouble_shows_in_the_body_and_stays_ready(proxy: Proxy, model: FakeModel) -> None:
    model.loading = True
    await eventually(lambda: not proxy.services.backends.first.tracker.current.confirmed)
    answer = await proxy.send("GET", "/-/ready")
    assert answer.status == 200
    assert answer.json["upstream"]["standing"] == "away"
    assert answer.json["upstream"]["trouble"] == "the upstream is loading its model"


async def test_an_upstream_that_is_down_is_told_and_does_not_hold_up_readiness(start: StartProxy) -> None:
    proxy = await start(url="http://127.0.0.1:9")
    answer = await proxy.send("GET", "/-/ready")
    assert answer.status == 200
    assert answer.json["upstream"]["trouble"] == "the upstream cannot be reached"


async def test_a_locked_upstream_is_told_with_what_to_do(start: StartProxy, model: FakeModel) -> None:
    model.key = "sk-upstream-key"
    proxy = await start()
    answer = await proxy.send("GET", "/-/ready")
    assert "set upstream.api_key" in answer.json["upstream"]["trouble"]


async def test_no_admin_route_shows_a_key(start: StartProxy, model: FakeModel) -> None:
    model.key = "sk-upstream-key"
    proxy = await start(upstream__api_key="sk-upstream-key", admin__token="opensesame")
    for path in ("/-/ready", "/-/healthy", "/-/stats", "/metrics"):
        body = (await proxy.send("GET", path, headers={"X-Nearhit-Admin": "opensesame"})).body
        assert b"sk-upstream-key" not in body
        assert b"opensesame" not in body
        assert proxy.services.local_token.encode() not in body


# Statistics


async def test_stats_have_their_names_from_the_start(proxy: Proxy) -> None:
    stats = await proxy.stats()
    assert tuple(stats) == NAMES
    assert stats["version"] == __version__
    assert stats["uptime_s"] >= 0
    assert stats["cache.enabled"] is True
    assert stats["cache.bytes"] > 0
    zero = ("size", "hit_exact", "hit_approx", "saved_ms", "load_ms", "stored", "saved_tokens")
    assert {name: stats[f"cache.{name}"] for name in zero} == dict.fromkeys(zero, 0)
    assert set(stats["requests"].values()) == {0}
    assert (stats["misses"], stats["bypassed"], stats["not_stored"], stats["evicted"], stats["in_flight"]) == (
        {},
        {},
        {},
        {},
        0,
    )


async def test_stats_follow_what_was_done(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__flush_s=0.01)
    for question in ("one", "two", "one", "one"):
        assert (await proxy.chat(question)).status == 200
        await proxy.settled()
    await proxy.chat("three", headers={"Cache-Control": "no-store"})
    await proxy.chat("one", headers={"Cache-Control": "no-cache"})
    await proxy.settled()
    model.respond = raw(b'{"choices": []}')
    await proxy.chat("four")
    await proxy.settled()
    await _stored(proxy, 2)
    stats = await proxy.stats()
    assert stats["cache.hit_exact"] == 2
    assert stats["cache.stored"] == 3
    assert stats["cache.saved_tokens"] == 2 * 13
    assert stats["requests"] == {"HIT": 2, "NEAR": 0, "STALE": 0, "JOINED": 0, "MISS": 4, "BYPASS": 1}
    assert stats["misses"] == {"absent": 3, "no-cache": 1}
    assert stats["bypassed"] == {"no-store": 1}
    assert sum(stats["not_stored"].values()) == 1


async def _stored(proxy: Proxy, count: int) -> None:
    async with asyncio.timeout(60):
        while True:
            stats = await proxy.stats()
            if stats["cache.size"] == count:
                return
            await asyncio.sleep(0.01)


async def test_time_saved_is_what_the_upstream_took(start: StartProxy, model: FakeModel) -> None:
    async def slow(model: FakeModel, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        await asyncio.sleep(0.06)
        return await reply()(model, request, asked)

    model.respond = slow
    proxy = await start()
    await proxy.chat()
    await proxy.settled()
    saved = [int((await proxy.chat()).headers["X-Nearhit-Saved-Ms"]) for _ in range(3)]
    assert (await proxy.stats())["cache.saved_ms"] == sum(saved)
    assert saved[0] >= 50


async def test_fetches_under_way_and_joined_callers_are_counted(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    callers = [asyncio.create_task(proxy.chat()) for _ in range(3)]
    await eventually(lambda: model.started == 1)
    assert (await proxy.stats())["in_flight"] == 1
    model.release.set()
    await asyncio.gather(*callers)
    await proxy.settled()
    stats = await proxy.stats()
    assert stats["in_flight"] == 0
    assert stats["requests"]["MISS"] == 1
    assert stats["requests"]["HIT"] + stats["requests"]["JOINED"] == 2


async def test_requests_to_other_endpoints_do_not_count(proxy: Proxy) -> None:
    await proxy.send("GET", "/v1/models")
    await proxy.send("GET", "/-/healthy")
    assert sum((await proxy.stats())["requests"].values()) == 0


async def test_the_same_failure_counts_as_a_request(proxy: Proxy, model: FakeModel) -> None:
    async def broken(model: FakeModel, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        return error(500, "out of memory", "server_error")

    model.respond = broken
    assert (await proxy.chat()).status == 500
    await proxy.settled()
    stats = await proxy.stats()
    assert stats["requests"]["MISS"] == 1
    assert stats["not_stored"] == {"status": 1}
    assert stats["cache.stored"] == 0


async def test_a_switched_off_cache_says_so(start: StartProxy) -> None:
    proxy = await start(cache__mode="off")
    await proxy.chat()
    stats = await proxy.stats()
    assert stats["cache.enabled"] is False
    assert stats["bypassed"] == {"mode-off": 1}


# Paths of ours


async def test_unknown_paths_get_404_in_the_openai_shape(proxy: Proxy, model: FakeModel) -> None:
    before = len(model.generations)
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = await proxy.send(method, "/-/nothing?x=1")
        assert answer.status == 404
        assert answer.json["error"]["code"] == "not_found"
    assert (await proxy.send("POST", "/-/v1/chat/completions", json={"messages": []})).status == 404
    assert not [seen for seen in model.seen if seen.target.startswith("/-")]
    assert len(model.generations) == before


async def test_known_paths_with_another_method_do_not_go_upstream(proxy: Proxy, model: FakeModel) -> None:
    for path in ("/-/healthy", "/-/ready", "/-/stats"):
        assert (await proxy.send("POST", path)).status == 404
    assert not [seen for seen in model.seen if seen.target.startswith("/-")]


async def test_look_ups_in_storage_are_counted_and_hits_from_memory_are_none(start: StartProxy) -> None:
    proxy = await start(cache__hot_bytes=0)
    for _ in range(2):
        await proxy.chat("one")
        await proxy.settled()
    stats = await proxy.stats()
    assert (stats["cache.hit_exact"], stats["cache.load_ms"] > 0) == (1, True)
    assert proxy.services.metrics.value("nearhit_lookup_seconds_count", {"tier": "exact"}) >= 1
