"""The near tier over HTTP: other words, the same answer; and never another question's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from proxy.web.services import Services
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, chat_body, raw

ASKED = "How do I reset the router in the living room?"
ALIKE = "hey, how can I reset the router in the living room? thanks!"
OTHER = "How do I reset the router in the dining room?"


async def with_near(start: StartProxy, **options: Any) -> Proxy:
    proxy = await start(**options)
    await eventually(lambda: proxy.services.near is not None)
    return proxy


def near_score_count(services: Services) -> float:
    return services.metrics.value("nearhit_near_score_count")


async def test_other_words_get_the_stored_answer_and_the_headers_say_so(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    first = await proxy.chat(ASKED)
    await proxy.settled()
    second = await proxy.chat(ALIKE)
    assert (first.outcome, second.outcome, len(model.generations)) == ("MISS", "NEAR", 1)
    assert second.json["choices"] == first.json["choices"]
    assert second.headers["Cache-Status"].startswith("nearhit; hit; ttl=")
    assert second.headers["Cache-Status"].endswith("detail=near")
    assert second.headers["X-Nearhit-Score"] == "1.0"
    assert second.headers["X-Nearhit-Rule"] == "equal"
    assert len(second.headers["X-Nearhit-Entry"]) == 32
    stats = await proxy.stats()
    assert (stats["cache.hit_exact"], stats["cache.hit_approx"], stats["requests"]["NEAR"]) == (0, 1, 1)


async def test_a_changed_word_is_another_question_and_the_miss_names_the_rule(
    start: StartProxy, model: FakeModel
) -> None:
    proxy = await with_near(start)
    await proxy.chat(ASKED)
    await proxy.settled()
    answer = await proxy.chat(OTHER)
    assert (answer.outcome, len(model.generations)) == ("MISS", 2)
    assert answer.headers["X-Nearhit-Rule"] == "content-word"
    assert "X-Nearhit-Shadow" not in answer.headers


async def test_a_typo_is_found_by_its_sketch(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await proxy.chat(ASKED)
    await proxy.settled()
    answer = await proxy.chat("How do I reset the ruoter in the living room?")
    assert (answer.outcome, answer.headers["X-Nearhit-Rule"]) == ("NEAR", "typo")
    assert 0.6 <= float(answer.headers["X-Nearhit-Score"]) < 1


async def test_streams_are_served_near_too(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await proxy.chat(ASKED)
    await proxy.settled()
    answer = await proxy.chat(ALIKE, stream=True)
    assert answer.outcome == "NEAR"
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_what_was_stored_by_another_start_is_found(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start, cache__flush_s=0.01)
    await proxy.chat(ASKED)
    await proxy.settled()
    while (await proxy.stats())["cache.size"] != 1:
        await asyncio.sleep(0.01)
    again = await with_near(start)
    assert (await again.chat(ALIKE)).outcome == "NEAR"


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5, "seed": 1},
        {"max_tokens": 9},
        {"model": "another"},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"unknown_field": 1},
    ],
)
async def test_another_space_is_never_near(start: StartProxy, model: FakeModel, other: dict[str, Any]) -> None:
    proxy = await with_near(start)
    await proxy.chat(ASKED)
    await proxy.settled()
    assert (await proxy.chat(ALIKE, **other)).outcome == "MISS"


async def test_another_history_is_never_near(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]

    async def ask(system: str, words: str) -> str:
        messages = [{"role": "system", "content": system}, *turns, {"role": "user", "content": words}]
        answer = await proxy.post("/v1/chat/completions", json={"messages": messages, "temperature": 0})
        await proxy.settled()
        return answer.outcome

    assert await ask("Be brief.", ASKED) == "MISS"
    assert await ask("Be brief!", ALIKE) == "MISS"
    assert await ask("Be brief.", ALIKE) == "NEAR"
    turns[0]["content"] = "hi!"
    assert await ask("Be brief.", "please " + ASKED) == "MISS"


@pytest.mark.parametrize("options", [{"cache__mode": "exact"}, {"cache__sampled": "exact"}])
async def test_the_exact_tier_alone_where_settings_say_so(
    start: StartProxy, model: FakeModel, options: dict[str, str]
) -> None:
    proxy = await start(**options)
    if options.get("cache__mode") != "exact":
        await eventually(lambda: proxy.services.near is not None)
    for words in (ASKED, ALIKE):
        assert (await proxy.chat(words, temperature=0.7)).outcome == "MISS"
        await proxy.settled()
    assert (await proxy.chat(ASKED, temperature=0.7)).outcome == "HIT"


async def test_a_client_may_keep_a_call_to_the_exact_tier(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await proxy.chat(ASKED)
    await proxy.settled()
    assert (await proxy.chat(ALIKE, headers={"X-Nearhit-Tier": "Exact"})).outcome == "MISS"


async def test_shadow_tells_and_does_not_serve(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start, cache__shadow="true")
    first = await proxy.chat(ASKED)
    await proxy.settled()
    assert first.outcome == "MISS"
    answer = await proxy.chat(ALIKE)
    assert (answer.outcome, len(model.generations)) == ("MISS", 2)
    entry, score = answer.headers["X-Nearhit-Shadow"].split("; ")
    assert (len(entry), score) == (32, "score=1.0")
    assert (await proxy.stats())["cache.hit_shadow"] == 1


async def test_an_answer_that_calls_a_tool_is_never_near(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    call = {"id": "c1", "type": "function", "function": {"name": "reset", "arguments": "{}"}}
    model.respond = raw(
        json.dumps(chat_body(None, message={"tool_calls": [call]}, finish_reason="tool_calls")).encode()
    )
    first = await proxy.chat(ASKED)
    await proxy.settled()
    assert first.json["choices"][0]["message"]["tool_calls"]
    assert (await proxy.chat(ASKED)).outcome == "HIT"
    assert (await proxy.chat(ALIKE)).outcome == "MISS"


@pytest.mark.parametrize("settings", [{"n_ctx": 13}, {"params": {"max_tokens": 4}}])
async def test_an_answer_that_ends_where_the_server_cuts_every_answer_serves_no_other_words(
    start: StartProxy, model: FakeModel, settings: dict[str, Any]
) -> None:
    # On /v1/responses llama.cpp calls such an answer completed.
    model.props = {"media_marker": "run-1", "default_generation_settings": {"params": {}, **settings}}
    proxy = await start(upstream__kind="llamacpp", upstream__canary_s=0)
    await eventually(lambda: proxy.services.near is not None)
    assert (await proxy.chat(ASKED)).outcome == "MISS"
    await proxy.settled()
    assert ((await proxy.chat(ASKED)).outcome, (await proxy.chat(ALIKE)).outcome) == ("HIT", "MISS")


async def test_a_store_that_hangs_when_a_near_answer_is_read_costs_nobody_an_answer(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await with_near(start, cache__hot_bytes=0)
    await proxy.chat(ASKED)
    await proxy.settled()
    assert (await proxy.chat(ALIKE)).outcome == "NEAR"
    answers_again = asyncio.Event()

    async def hangs(key: bytes, now_ms: int) -> Any:
        await answers_again.wait()

    monkeypatch.setattr(proxy.services.buffer, "get", hangs)
    asked = asyncio.create_task(proxy.chat(ALIKE))
    try:
        await eventually(asked.done)
    finally:
        answers_again.set()
        answer = await asked
    assert (answer.status, answer.outcome, len(model.generations)) == (200, "MISS", 2)
