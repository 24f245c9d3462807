"""`cache.overrides` and `X-Nearhit-Tier`: how far the cache may go for one model, one client, one call."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel
from tests.web.test_explain import asking, explained
from tests.web.test_near import ALIKE, ASKED, with_near

TYPO = "How do I reset the ruoter in the living room?"


async def overridden(start: StartProxy, *overrides: dict[str, Any], **options: Any) -> Proxy:
    return await with_near(start, cache__overrides=list(overrides), **options)


async def ask(proxy: Proxy, words: str = ASKED, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    answer = await proxy.chat(words, headers=headers, **fields)
    await proxy.settled()
    return answer


async def outcomes(proxy: Proxy, headers: dict[str, str] | None = None, **fields: Any) -> list[str]:
    """What becomes of a question, of its repetition, of other words, and of a typo."""
    return [(await ask(proxy, words, headers, **fields)).outcome for words in (ASKED, ASKED, ALIKE, TYPO)]


NEAR = ["MISS", "HIT", "NEAR", "NEAR"]
EXACT = ["MISS", "HIT", "MISS", "MISS"]
OFF = ["BYPASS"] * 4


async def test_without_overrides_settings_hold_for_all(start: StartProxy) -> None:
    proxy = await with_near(start)
    assert await outcomes(proxy, model="big-1") == NEAR


# By model


@pytest.mark.parametrize(
    ("pattern", "model_name", "applies"),
    [
        ("big-*", "big-1", True),
        ("big-*", "small-big-1", False),
        ("*coder*", "qwen2.5-coder-7b", True),
        ("tiny", "tiny", True),
        ("tiny", "Tiny", False),
        ("tiny", "tiny-2", False),
        ("big-?", "big-12", False),
        ("*", "anything", True),
        ("", "tiny", False),
    ],
)
async def test_a_model_is_named_by_a_pattern(start: StartProxy, pattern: str, model_name: str, applies: bool) -> None:
    proxy = await overridden(start, {"model": pattern, "mode": "exact"})
    assert await outcomes(proxy, model=model_name) == (EXACT if applies else NEAR)


async def test_a_call_without_a_model_is_of_every_pattern_and_no_other(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "tiny*", "mode": "off"}, {"model": "*", "threshold": 1.0})
    assert await outcomes(proxy) == ["MISS", "HIT", "NEAR", "MISS"]


# By client


@pytest.mark.parametrize(
    ("headers", "applies"),
    [
        ({"Authorization": "Bearer sk-1"}, True),
        ({"Authorization": "sk-1"}, True),
        ({"X-Api-Key": "sk-1"}, True),
        ({"x-api-key": "sk-1", "Authorization": "Bearer other"}, True),
        ({"Authorization": "Bearer sk-12"}, False),
        ({"Authorization": "Bearer SK-1"}, False),
        ({"Authorization": "Basic sk-1"}, False),
        ({"X-Api-Key": "é"}, False),
        ({"Cookie": "sk-1"}, False),
        ({}, False),
    ],
)
async def test_a_client_is_named_by_its_key(start: StartProxy, headers: dict[str, str], applies: bool) -> None:
    proxy = await overridden(start, {"key": "sk-1", "mode": "exact"})
    assert await outcomes(proxy, headers) == (EXACT if applies else NEAR)


async def test_model_and_key_must_both_fit(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "big*", "key": "sk-1", "mode": "off"})
    mine = {"Authorization": "Bearer sk-1"}
    assert await outcomes(proxy, mine, model="big") == OFF
    assert await outcomes(proxy, mine, model="small") == NEAR
    assert await outcomes(proxy, model="big") == NEAR


# What they change


async def test_off_passes_by_the_cache(start: StartProxy, model: FakeModel) -> None:
    proxy = await overridden(start, {"model": "big*", "mode": "off"})
    answer = await ask(proxy, model="big")
    assert answer.headers["Cache-Status"] == "nearhit; fwd=bypass; detail=mode-off"
    assert await outcomes(proxy, model="big") == OFF
    stats = await proxy.stats()
    assert (stats["bypassed"], stats["cache.stored"], stats["cache.enabled"]) == ({"mode-off": 5}, 0, True)


@pytest.mark.parametrize("mode", ["exact", "approx"])
async def test_a_cache_that_is_off_can_be_on_for_a_model(start: StartProxy, mode: str) -> None:
    proxy = await start(cache__mode="off", cache__overrides=[{"model": "big*", "mode": mode}])
    if mode == "approx":
        await eventually(lambda: proxy.services.near is not None)
    assert await outcomes(proxy, model="big") == (NEAR if mode == "approx" else EXACT)
    assert await outcomes(proxy, model="small") == OFF


async def test_the_near_tier_can_be_on_for_one_model(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "big*", "mode": "approx"}, cache__mode="exact")
    assert await outcomes(proxy, model="big") == NEAR
    assert await outcomes(proxy, model="small") == EXACT


async def test_the_highest_threshold_serves_equal_forms_alone(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "big*", "threshold": 1.0})
    await ask(proxy, model="big")
    equal = await ask(proxy, ALIKE, model="big")
    assert (equal.outcome, equal.headers["X-Nearhit-Score"]) == ("NEAR", "1.0")
    typo = await ask(proxy, TYPO, model="big")
    assert (typo.outcome, typo.headers["X-Nearhit-Rule"]) == ("MISS", "score")
    assert await outcomes(proxy, model="small") == NEAR


async def test_shadow_can_be_on_and_off(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "big*", "shadow": True})
    await ask(proxy, model="big")
    told = await ask(proxy, ALIKE, model="big")
    assert (told.outcome, told.headers["X-Nearhit-Shadow"].partition("; ")[2]) == ("MISS", "score=1.0")
    assert await outcomes(proxy, model="small") == NEAR


async def test_shadow_for_all_can_be_off_for_one(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "big*", "shadow": False}, cache__shadow="true")
    assert await outcomes(proxy, model="big") == NEAR
    assert "NEAR" not in await outcomes(proxy, model="small")


async def test_later_overrides_win_over_earlier_ones(start: StartProxy) -> None:
    proxy = await overridden(
        start, {"mode": "off"}, {"model": "big*", "mode": "approx"}, {"model": "big-old", "mode": "exact"}
    )
    assert await outcomes(proxy, model="small") == OFF
    assert await outcomes(proxy, model="big-new") == NEAR
    assert await outcomes(proxy, model="big-old") == EXACT


async def test_what_a_later_override_leaves_out_stays_as_it_was(start: StartProxy) -> None:
    proxy = await overridden(start, {"threshold": 1.0}, {"model": "big*", "shadow": False}, {"key": "k", "mode": "off"})
    assert await outcomes(proxy, model="big") == ["MISS", "HIT", "NEAR", "MISS"]


async def test_explain_tells_what_holds_for_the_call(start: StartProxy) -> None:
    proxy = await overridden(
        start,
        {"model": "big*", "threshold": 0.9, "shadow": True},
        {"key": "sk-1", "mode": "off"},
        {"model": "x", "mode": "exact"},
    )
    big = (await explained(proxy, asking(model="big")))["near"]
    assert (big["mode"], big["threshold"], big["shadow"]) == ("approx", 0.9, True)
    assert (await explained(proxy, asking(model="x")))["near"]["mode"] == "exact"
    off = await explained(proxy, asking(model="big"), {"Authorization": "Bearer sk-1"})
    assert (off["outcome"], off["reason"]) == ("BYPASS", "mode-off")


# The client's own word


@pytest.mark.parametrize("value", ["exact", "Exact", " EXACT "])
async def test_a_client_keeps_a_call_to_the_exact_tier(start: StartProxy, model: FakeModel, value: str) -> None:
    proxy = await with_near(start)
    tier = {"X-Nearhit-Tier": value}
    assert await outcomes(proxy, tier) == EXACT
    assert "candidates" not in (await explained(proxy, asking(ALIKE), tier))["near"]
    assert not [seen for seen in model.generations if "X-Nearhit-Tier" in seen.headers]


@pytest.mark.parametrize("value", ["", "near", "off", "approx", "exact-ish"])
async def test_other_words_there_mean_nothing(start: StartProxy, value: str) -> None:
    proxy = await with_near(start)
    assert await outcomes(proxy, {"X-Nearhit-Tier": value}) == NEAR


async def test_the_header_never_widens_what_settings_allow(start: StartProxy) -> None:
    proxy = await overridden(start, {"model": "big*", "mode": "exact"}, {"model": "no*", "mode": "off"})
    assert await outcomes(proxy, {"X-Nearhit-Tier": "approx"}, model="big") == EXACT
    assert await outcomes(proxy, {"X-Nearhit-Tier": "exact"}, model="no") == OFF


async def test_an_answer_kept_by_an_exact_call_serves_near_ones(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, headers={"X-Nearhit-Tier": "exact"})
    assert (await ask(proxy, ALIKE)).outcome == "NEAR"
