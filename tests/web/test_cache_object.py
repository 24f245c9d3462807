"""The `cache` object in a request's body: lifetimes, and what LiteLLM's users expect of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.web import clock
from tests.conftest import Proxy, StartProxy
from tests.fake_model import FakeModel, numbered


async def ttl_of(proxy: Proxy, content: str, **fields: Any) -> int:
    """For how many seconds more a stored answer will be served."""
    await proxy.chat(content, **fields)
    await proxy.settled()
    status: str = (await proxy.chat(content, **fields)).headers["Cache-Status"]
    return int(status.partition("ttl=")[2].partition(";")[0])


async def test_a_call_says_how_long_its_answer_is_kept(proxy: Proxy) -> None:
    assert 40 <= await ttl_of(proxy, "x", cache={"ttl": 100}) <= 100


async def test_it_may_ask_for_longer_than_usual_up_to_a_limit(start: StartProxy) -> None:
    proxy = await start(cache__ttl_hours=1, cache__max_ttl_hours=3)
    assert 7140 <= await ttl_of(proxy, "x", cache={"ttl": 7200}) <= 7200
    assert 10_740 <= await ttl_of(proxy, "y", cache={"ttl": 1_000_000}) <= 10_800
    assert 3540 <= await ttl_of(proxy, "z") <= 3600


async def test_what_asks_for_no_time_is_not_kept(proxy: Proxy) -> None:
    await proxy.chat("x", cache={"ttl": 0})
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "MISS"
    assert (await proxy.stats())["not_stored"] == {"no-store": 1}


async def test_a_hit_makes_an_entry_live_no_longer(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = clock.now_ms()
    monkeypatch.setattr(proxy.services.backends.first.answers, "_now_ms", lambda: now_ms)
    await proxy.chat("x", cache={"ttl": 100})
    await proxy.settled()
    for seconds, outcome in ((60, "HIT"), (99, "HIT"), (101, "MISS")):
        now_ms = clock.now_ms() + seconds * 1000
        assert (await proxy.chat("x")).outcome == outcome


async def test_a_model_may_have_a_lifetime_of_its_own(start: StartProxy) -> None:
    proxy = await start(cache__overrides=[{"model": "news-*", "ttl_hours": 0.5}])
    assert 1740 <= await ttl_of(proxy, "x", model="news-small") <= 1800
    assert await ttl_of(proxy, "x", model="other") > 1800
    assert 40 <= await ttl_of(proxy, "y", model="news-small", cache={"ttl": 100}) <= 100


async def test_it_is_no_part_of_the_key_and_never_sent_upstream(proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("x", cache={"ttl": 100, "something": "unknown"})
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"
    assert [seen.json for seen in model.generations] == [
        {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    ]


async def test_texts_and_numbers_reach_upstream_as_they_came(proxy: Proxy, model: FakeModel) -> None:
    told: dict[str, Any] = {"logit_bias": {"5": -0.1}, "seed": 2**62, "stop": ["🦙é\x00"], "top_p": 1e-7}
    await proxy.chat("🦙 é", cache={"no-store": True}, **told)
    assert model.generations[0].json == {
        "messages": [{"role": "user", "content": "🦙 é"}],
        "temperature": 0,
        **told,
    }


async def test_no_cache_asks_anew_and_replaces_the_entry(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    await proxy.chat("x")
    await proxy.settled()
    fresh = await proxy.chat("x", cache={"no-cache": True})
    await proxy.settled()
    assert (fresh.outcome, (await proxy.chat("x")).json["choices"]) == ("MISS", fresh.json["choices"])


async def test_no_store_neither_serves_nor_keeps(proxy: Proxy) -> None:
    for _ in range(2):
        assert (await proxy.chat("x", cache={"no-store": True})).outcome == "BYPASS"
    assert (await proxy.chat("x")).outcome == "MISS"


async def test_s_maxage_takes_no_older_answer(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    await proxy.chat("x")
    await proxy.settled()
    later = clock.now_ms() + 50_000
    monkeypatch.setattr(proxy.services.backends.first.answers, "_now_ms", lambda: later)
    assert (await proxy.chat("x", cache={"s-maxage": 60})).outcome == "HIT"
    assert (await proxy.chat("x", cache={"s-maxage": 40})).outcome == "MISS"


async def test_the_header_cannot_be_widened_by_the_body(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    answer = await proxy.chat("x", headers={"Cache-Control": "no-store"}, cache={"no-store": False, "ttl": 5})
    assert answer.outcome == "BYPASS"


async def test_a_namespace_is_a_room_of_its_own(proxy: Proxy) -> None:
    for namespace in ("a", "b", ""):
        first = await proxy.chat("Turn on the light", cache={"namespace": namespace})
        await proxy.settled()
        again = await proxy.chat("please turn on the light", cache={"namespace": namespace})
        assert (first.outcome, again.outcome) == ("MISS", "NEAR")
        assert (await proxy.chat("Turn on the light", cache={"namespace": namespace})).outcome == "HIT"


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl": "100"},
        {"ttl": -1},
        {"ttl": True},
        {"ttl": 1e300},
        {"s-maxage": "x"},
        {"no-cache": "yes"},
        {"no-store": 1},
        {"namespace": 7},
        {"namespace": "x" * 300},
    ],
)
async def test_what_cannot_be_understood_passes_by(proxy: Proxy, model: FakeModel, wrong: dict[str, Any]) -> None:
    answer = await proxy.chat("x", cache=wrong)
    assert (answer.status, answer.outcome) == (200, "BYPASS")
    assert model.generations[0].json["cache"] == wrong


@pytest.mark.parametrize("other", [True, "on", 5, None, ["a"]])
async def test_what_is_no_object_is_another_servers_field(proxy: Proxy, model: FakeModel, other: Any) -> None:
    await proxy.chat("x", cache=other)
    await proxy.settled()
    assert ((await proxy.chat("x", cache=other)).outcome, (await proxy.chat("x")).outcome) == ("HIT", "MISS")
    assert model.generations[0].json["cache"] == other


async def test_explain_knows_of_it(proxy: Proxy) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "cache": {"ttl": 7, "namespace": "a"}}
    told = (await proxy.post("/-/explain", json=body)).json
    assert told["would_store"]["ttl_s"] == 7
    assert "parameter cache" not in [part["name"] for part in told["key"]["parts"]]
    await proxy.post("/v1/chat/completions", json=body)
    await proxy.settled()
    assert (await proxy.post("/-/explain", json=body)).json["outcome"] == "HIT"
