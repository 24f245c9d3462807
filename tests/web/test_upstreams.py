"""Several upstreams behind one nearhit, and names of the operator's own for models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from aiohttp import web

from proxy.config import load
from proxy.settings import Settings
from tests.conftest import Proxy, running_proxy
from tests.fake_model import FakeModel, error, fake_model, reply


@pytest.fixture
async def other() -> AsyncIterator[FakeModel]:
    async with fake_model() as running:
        running.models = ["big", "shared"]
        running.respond = reply("from the other")
        yield running


def settings(folder: Path, model: FakeModel, other: FakeModel, patterns: tuple[str, ...] = (), **more: Any) -> Settings:
    model.models = ["small", "shared"]
    file = folder / "config.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data_dir": str(folder),
                "upstream": {"url": model.url, "poll_s": 0.1},
                "upstreams": [{"name": "other", "url": other.url, "poll_s": 0.1, "models": list(patterns)}],
                **more,
            }
        )
    )
    return load(file, {}, {}).settings


@pytest.fixture
async def two(tmp_path: Path, model: FakeModel, other: FakeModel) -> AsyncIterator[Proxy]:
    names = {"assistant": "big", "tiny": {"model": "anything", "upstream": "other"}}
    own = await asyncio.to_thread(settings, tmp_path, model, other, models=names)
    async with running_proxy(own) as proxy:
        for one in proxy.services.backends:
            await one.tracker.looked.wait()
        yield proxy


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("asked", "answers", "sent"),
    [
        ("small", "default", "small"),
        ("big", "other", "big"),
        ("shared", "default", "shared"),
        ("unknown", "default", "unknown"),
        ("assistant", "other", "big"),
        ("tiny", "other", "anything"),
    ],
)
async def test_each_model_is_asked_at_its_own_upstream(
    two: Proxy, model: FakeModel, other: FakeModel, path: str, asked: str, answers: str, sent: str
) -> None:
    body = {"model": asked, "messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "temperature": 0}
    assert (await two.post(path, json=body)).status == 200
    asked_of, left_alone = (model, other) if answers == "default" else (other, model)
    assert [seen.json["model"] for seen in asked_of.generations] == [sent]
    assert not left_alone.generations


async def test_a_call_that_is_no_json_goes_to_the_first(two: Proxy, model: FakeModel, other: FakeModel) -> None:
    assert (await two.post("/v1/chat/completions", data=b"{")).status == 400
    assert not other.generations


async def test_a_name_and_what_it_stands_for_share_their_answers(two: Proxy, other: FakeModel) -> None:
    assert (await two.chat(model="assistant")).outcome == "MISS"
    await two.settled()
    assert (await two.chat(model="big")).outcome == "HIT"
    assert (await two.chat(model="assistant")).outcome == "HIT"
    assert len(other.generations) == 1


async def test_equal_calls_to_two_upstreams_never_share(two: Proxy, model: FakeModel, other: FakeModel) -> None:
    first = await two.chat(model="small")
    await two.settled()
    second = await two.chat(model="big")
    assert (first.outcome, second.outcome) == ("MISS", "MISS")
    assert first.body != second.body


async def test_the_same_model_at_two_upstreams_does_not_share(tmp_path: Path, model: FakeModel) -> None:
    async with fake_model() as twin:
        names = {"here": {"model": "shared"}, "there": {"model": "shared", "upstream": "other"}}
        own = await asyncio.to_thread(settings, tmp_path, model, twin, models=names)
        twin.models = model.models
        async with running_proxy(own) as proxy:
            for one in proxy.services.backends:
                await one.tracker.looked.wait()
            assert (await proxy.chat(model="here")).outcome == "MISS"
            await proxy.settled()
            assert (await proxy.chat(model="there")).outcome == "MISS"
            assert (await proxy.chat(model="here")).outcome == "HIT"


async def test_the_list_of_models_has_all_of_them_and_the_names(two: Proxy) -> None:
    def listed() -> tuple[list[str], tuple[str, str]]:
        with openai.OpenAI(base_url=f"{two.url}/v1", api_key="unused", max_retries=0) as client:
            shown = client.models.retrieve("assistant")
            return sorted(one.id for one in client.models.list()), (shown.id, shown.owned_by)

    names, shown = await asyncio.to_thread(listed)
    assert names == ["assistant", "big", "shared", "small", "tiny"]
    assert shown == ("assistant", "nearhit")


async def test_upstreams_that_are_gone_stay_listed_for_their_answers_still_flow(
    two: Proxy, model: FakeModel, other: FakeModel
) -> None:
    model.loading = other.loading = True
    answer = await two.send("GET", "/v1/models")
    assert [one["id"] for one in answer.json["data"]] == ["assistant", "tiny", "shared", "small", "big"]


async def test_a_list_that_nobody_gives_is_the_first_ones_error(
    tmp_path: Path, model: FakeModel, other: FakeModel
) -> None:
    model.loading = other.loading = True
    own = await asyncio.to_thread(settings, tmp_path, model, other)
    async with running_proxy(own) as proxy:
        answer = await proxy.send("GET", "/v1/models")
    assert (answer.status, answer.json["error"]["message"]) == (503, "Loading model")


async def test_a_key_is_shown_to_no_upstream_that_it_was_not_meant_for(two: Proxy, other: FakeModel) -> None:
    mine = {"Authorization": "Bearer mine"}
    await two.send("GET", "/v1/models", headers=mine)
    await two.chat(model="small", headers=mine)
    await two.post("/-/feedback", json={"id": "00" * 16, "verdict": "wrong"}, headers={**mine, "Forwarded": "for=x"})
    assert "Bearer mine" not in [seen.headers.get("Authorization") for seen in other.seen]


@pytest.mark.parametrize(
    ("target", "sent"),
    [("/props?x=1&model=assistant&y=2", "/props?x=1&model=big&y=2"), ("/v1/models/big", "/v1/models/big")],
)
async def test_what_is_passed_on_goes_where_its_model_is(
    two: Proxy, model: FakeModel, other: FakeModel, target: str, sent: str
) -> None:
    await two.send("GET", target)
    assert sent in [seen.target for seen in other.seen]
    assert sent not in [seen.target for seen in model.seen]


async def test_a_json_body_that_is_passed_on_names_its_model(two: Proxy, model: FakeModel, other: FakeModel) -> None:
    await two.post("/v1/rerank", json={"model": "assistant", "query": "é"})
    (sent,) = [seen for seen in other.seen if seen.target == "/v1/rerank"]
    assert sent.json == {"model": "big", "query": "é"}
    assert not [seen for seen in model.seen if seen.target == "/v1/rerank"]


async def test_one_upstream_that_is_away_does_not_stop_the_other(
    two: Proxy, model: FakeModel, other: FakeModel
) -> None:
    assert (await two.chat(model="big")).outcome == "MISS"
    await two.settled()
    other.loading = True
    assert (await two.chat(model="big")).outcome == "HIT"
    assert (await two.chat(model="small", content="new")).status == 200
    ready = (await two.send("GET", "/-/ready")).json
    assert set(ready["upstreams"]) == {"default", "other"}


async def test_statistics_tell_of_every_upstream(two: Proxy, model: FakeModel, other: FakeModel) -> None:
    stats = await two.stats()
    assert stats["upstream"]["name"] == "default"
    assert [(one["name"], one["url"]) for one in stats["upstreams"]] == [("default", model.url), ("other", other.url)]
    metrics = (await two.send("GET", "/metrics")).body.decode()
    assert 'nearhit_upstream_up{upstream="other"} 1.0' in metrics


async def test_explaining_follows_a_name(two: Proxy, other: FakeModel) -> None:
    await two.chat(model="assistant")
    await two.settled()
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    told = (await two.post("/-/explain", json=body)).json
    assert (told["outcome"], told["key"]["upstream"]) == ("HIT", other.url)


async def test_an_upstream_with_patterns_takes_what_fits(tmp_path: Path, model: FakeModel, other: FakeModel) -> None:
    own = await asyncio.to_thread(settings, tmp_path, model, other, ("qwen*",))
    async with running_proxy(own) as proxy:
        await proxy.chat(model="qwen3")
        await proxy.chat(model="big")
    assert [seen.json["model"] for seen in other.generations] == ["qwen3"]
    assert [seen.json["model"] for seen in model.generations] == ["big"]


async def test_a_key_of_one_upstream_does_not_read_what_the_other_gave(
    tmp_path: Path, model: FakeModel, other: FakeModel
) -> None:
    other.key = "secret"
    own = await asyncio.to_thread(settings, tmp_path, model, other, ("big",))
    async with running_proxy(own) as proxy:
        mine, wrong = {"Authorization": "Bearer secret"}, {"Authorization": "Bearer wrong"}
        assert (await proxy.chat(model="big", headers=mine)).status == 200
        await proxy.settled()
        assert (await proxy.chat(model="big", headers=mine)).status == 200
        assert (await proxy.chat(model="big", headers=wrong)).status == 401
        assert (await proxy.chat(model="small", headers=wrong)).status == 200


async def test_models_that_are_shown_to_anybody_are_listed_though_it_is_unclear_who_is_taken(
    tmp_path: Path, model: FakeModel, other: FakeModel
) -> None:
    async def busy(request: web.Request) -> web.StreamResponse | None:
        return error(500, "still loading", "server_error") if request.method == "POST" else None

    other.extra = busy
    own = await asyncio.to_thread(settings, tmp_path, model, other)
    async with running_proxy(own) as proxy:
        for one in proxy.services.backends:
            await one.tracker.looked.wait()
        listed = (await proxy.send("GET", "/v1/models")).json["data"]
        assert {one["id"] for one in listed} == {"small", "shared", "big"}
