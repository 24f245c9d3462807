"""What clients can ask of the cache with Cache-Control."""

from __future__ import annotations

from tests.conftest import Proxy
from tests.fake_model import FakeModel, numbered


def asking(value: str) -> dict[str, str]:
    return {"Cache-Control": value}


async def test_no_cache_asks_anew_and_replaces_the_entry(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    first = await proxy.chat("x")
    await proxy.settled()
    fresh = await proxy.chat("x", headers=asking("no-cache"))
    await proxy.settled()
    after = await proxy.chat("x")
    assert (fresh.outcome, fresh.headers["Cache-Status"]) == ("MISS", "nearhit; fwd=request")
    assert first.json["choices"] != fresh.json["choices"]
    assert after.json["choices"] == fresh.json["choices"]


async def test_pragma_no_cache_does_the_same(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x", headers={"Pragma": "no-cache"})).outcome == "MISS"


async def test_no_store_neither_serves_nor_keeps(proxy: Proxy, model: FakeModel) -> None:
    bypassed = await proxy.chat("x", headers=asking("no-store"))
    assert (bypassed.outcome, bypassed.headers["Cache-Status"]) == ("BYPASS", "nearhit; fwd=bypass; detail=no-store")
    assert (await proxy.chat("x")).outcome == "MISS"
    await proxy.settled()
    assert (await proxy.chat("x", headers=asking("no-store"))).outcome == "BYPASS"
    assert len(model.generations) == 3


async def test_only_if_cached_never_goes_upstream(proxy: Proxy, model: FakeModel) -> None:
    refused = await proxy.chat("x", headers=asking("only-if-cached"))
    assert refused.status == 504
    assert refused.json["error"]["code"] == "only_if_cached"
    assert model.generations == []
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x", headers=asking("only-if-cached"))).outcome == "HIT"


async def test_max_age_and_min_fresh_are_obeyed(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x", headers=asking("max-age=3600"))).outcome == "HIT"
    assert (await proxy.chat("x", headers=asking("min-fresh=60"))).outcome == "HIT"
    refused = await proxy.chat("x", headers=asking("min-fresh=99999999"))
    assert (refused.outcome, refused.headers["Cache-Status"]) == ("MISS", "nearhit; fwd=request")


async def test_unknown_directives_are_ignored(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x", headers=asking("no-transform, banana=7"))).outcome == "HIT"


async def test_only_if_cached_goes_not_upstream_either_where_the_call_cannot_be_cached(
    proxy: Proxy, model: FakeModel
) -> None:
    refused = await proxy.chat("x", headers=asking("only-if-cached"), store=True)
    assert (refused.status, model.generations) == (504, [])
