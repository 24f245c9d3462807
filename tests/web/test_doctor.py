"""`/-/doctor` and the warnings of `/-/stats`: what is wrong, with advice, and without anybody's words."""

from __future__ import annotations

from typing import Any

import pytest

from proxy import __version__
from storage.base import StorageBusy
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel
from tests.web.test_explain import ask, asking, written
from tests.web.test_near import ALIKE, ASKED, with_near

SECRET = "xyzzy-plugh"


async def findings(proxy: Proxy) -> list[dict[str, str]]:
    answer = await proxy.send("GET", "/-/doctor")
    assert answer.status == 200, answer.body
    assert answer.json["version"] == __version__
    found: list[dict[str, str]] = answer.json["findings"]
    assert all(set(one) == {"severity", "what", "advice"} for one in found)
    return found


async def ask_with_systems(proxy: Proxy, systems: list[str], **fields: Any) -> None:
    for number, system in enumerate(systems):
        assert (await ask(proxy, asking(f"question {number}", system, **fields))).outcome == "MISS"


def clocks(count: int) -> list[str]:
    return [f"You are {SECRET}, who runs a house. It is 10:{minute} now. Be brief." for minute in range(41, 41 + count)]


async def test_a_healthy_one_has_nothing_to_tell(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    assert await findings(proxy) == []
    assert (await proxy.stats())["warnings"] == []


# A system prompt that is another one in every call


async def test_a_clock_in_the_system_prompt_is_told_with_its_place(start: StartProxy) -> None:
    proxy = await with_near(start)
    systems = clocks(5)
    await ask_with_systems(proxy, systems, model="tiny")
    (advice,) = await findings(proxy)
    start_at = systems[-1].index("10:45")
    assert advice["severity"] == "advice"
    assert "the last 5 calls for model tiny" in advice["what"]
    assert f"characters {start_at} to {start_at + 5} differ, which look like a time of day" in advice["what"]
    assert "last message" in advice["advice"]
    (warning,) = (await proxy.stats())["warnings"]
    assert warning == f"{advice['what']}; {advice['advice']}"


async def test_no_words_of_a_prompt_are_told(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask_with_systems(proxy, clocks(6))
    # Also where what differs are words.
    names = ["Ada", "Grace", "Edsger", "Barbara", "Donald", "Frances"]
    systems = [f"You talk with {SECRET}{name}, who lives in this house. Be brief." for name in names]
    await ask_with_systems(proxy, systems, model="other")
    for path in ("/-/doctor", "/-/stats", "/metrics"):
        body = (await proxy.send("GET", path)).body
        assert not [told for told in (SECRET, "10:4", "brief", "house", "question", *names) if told.encode() in body]
    assert len(await findings(proxy)) == 2


async def test_fewer_than_five_calls_are_no_habit(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask_with_systems(proxy, clocks(4))
    assert await findings(proxy) == []


@pytest.mark.parametrize(
    "systems",
    [
        ["You are a helpful assistant. It is 10:41."] * 8,
        [
            "Translate everything into French.",
            "You are a pirate who sells used ships in the harbour.",
            "Write unit tests. Nothing else!",
            "Act as a physician with many years of practice",
            "summarise: five words",
            "Kurz und auf Deutsch antworten, bitte",
        ],
        [f"It is 10:4{number // 3} now. Be brief." for number in range(9)],
    ],
)
async def test_prompts_that_are_stable_or_have_nothing_in_common_are_no_alarm(
    start: StartProxy, systems: list[str]
) -> None:
    proxy = await with_near(start)
    await ask_with_systems(proxy, systems)
    assert await findings(proxy) == []
    assert (await proxy.stats())["warnings"] == []


async def test_each_model_is_looked_at_by_itself(start: StartProxy) -> None:
    proxy = await with_near(start)
    for number, system in enumerate(clocks(5)):
        await ask_with_systems(proxy, [system], model="clocked")
        assert (await ask(proxy, asking(f"q{number}", "Be brief.", model="stable"))).outcome == "MISS"
    (advice,) = await findings(proxy)
    assert "for model clocked" in advice["what"]


async def test_a_clock_that_was_taken_out_is_forgotten(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask_with_systems(proxy, clocks(6))
    assert len(await findings(proxy)) == 1
    for number in range(6):
        await ask(proxy, asking(f"another {number}", "It is day. Be brief."))
    assert await findings(proxy) == []


async def test_no_call_of_a_client_makes_the_doctor_fail(start: StartProxy) -> None:
    proxy = await with_near(start)
    for depth in range(880, 1000):
        deep = "[" * depth + "]" * depth
        body = f'{{"messages": [{{"role": "user", "content": {deep}}}, {{"role": "user", "content": "a"}}]}}'
        await proxy.post("/v1/chat/completions", data=body)
    await proxy.settled()
    for path in ("/-/stats", "/-/doctor"):
        assert (await proxy.send("GET", path)).status == 200


# What else it knows


async def test_an_upstream_that_is_down_is_a_problem(start: StartProxy) -> None:
    proxy = await with_near(start, url="http://127.0.0.1:9")
    found = await findings(proxy)
    assert {one["severity"] for one in found} == {"problem"}
    assert any("the upstream cannot be reached" in one["what"] for one in found)
    assert any("nothing is cached" in one["what"] and "upstream.url" in one["advice"] for one in found)


async def test_an_upstream_that_is_loading_is_a_problem_until_it_is_back(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    model.loading = True
    await eventually(lambda: proxy.services.backends.first.tracker.current.away)
    assert [one["severity"] for one in await findings(proxy)] == ["problem"]
    model.loading = False
    await eventually(lambda: proxy.services.backends.first.tracker.current.confirmed)
    assert await findings(proxy) == []


async def test_a_locked_upstream_is_told_with_what_to_do(start: StartProxy, model: FakeModel) -> None:
    model.key = "sk-upstream-key"
    proxy = await with_near(start)
    assert any("set upstream.api_key" in one["what"] + one["advice"] for one in await findings(proxy))


async def test_a_store_that_does_not_answer_is_a_problem(start: StartProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await with_near(start)
    store: Any = proxy.services.store

    async def busy() -> None:
        raise StorageBusy("locked")

    monkeypatch.setattr(store.current, "totals", busy)
    (problem,) = await findings(proxy)
    assert (problem["severity"], "the store does not answer" in problem["what"]) == ("problem", True)
    assert (await proxy.stats())["cache.size"] is None


async def test_a_full_cache_is_noted(start: StartProxy) -> None:
    proxy = await with_near(start, cache__max_entries=1, cache__flush_s=0.01)
    await ask(proxy, asking())
    await written(proxy, 1)
    (note,) = await findings(proxy)
    assert (note["severity"], note["advice"]) == ("note", "raise cache.max_entries")


async def test_answers_that_were_called_wrong_are_noted(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    shown = (await proxy.chat(ALIKE)).headers["X-Nearhit-Entry"]
    await proxy.post("/-/feedback", json={"id": shown, "verdict": "wrong"})
    (note,) = await findings(proxy)
    assert (note["severity"], note["what"].partition(" ")[0]) == ("note", "1")


async def test_the_worst_comes_first(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start, cache__max_entries=1, cache__flush_s=0.01)
    await ask(proxy, asking(ASKED))
    await written(proxy, 1)
    await ask_with_systems(proxy, clocks(5))
    model.loading = True
    await eventually(lambda: proxy.services.backends.first.tracker.current.away)
    assert [one["severity"] for one in await findings(proxy)] == ["problem", "advice", "note"]


# Who may ask


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Nearhit-Admin": "wrong"}]
)
async def test_the_doctor_is_for_admins(proxy: Proxy, headers: dict[str, str]) -> None:
    assert (await proxy.send("GET", "/-/doctor", headers=headers)).status == 403


async def test_the_doctor_is_not_for_clients_with_a_key(start: StartProxy, model: FakeModel) -> None:
    model.key = "k"
    proxy = await start(upstream__api_key="k", admin__token="opensesame")
    assert (await proxy.send("GET", "/-/doctor", headers={"Authorization": "Bearer k"})).status == 403
    assert (await proxy.send("GET", "/-/doctor", headers={"X-Nearhit-Admin": "opensesame"})).status == 200
