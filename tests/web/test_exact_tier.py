"""The main job: a repeat comes from the cache, in the form that the asker wants, and only a repeat does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Answer, Proxy, StartProxy, running_proxy, settings_for
from tests.fake_model import USAGE, FakeModel, chat_body, chat_events, chunk, numbered, raw, reply, sse, streamed

ASKED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def said(answer: Answer) -> str:
    """The text of an answer in either form."""
    if not answer.headers["Content-Type"].startswith("text/event-stream"):
        return str(answer.json["choices"][0]["message"]["content"])
    return "".join(c["delta"].get("content") or "" for event in events(answer) for c in event["choices"])


def events(answer: Answer) -> list[Any]:
    data = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


async def test_a_repeat_is_answered_from_the_cache(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    first = await proxy.chat("What is a proxy?")
    await proxy.settled()
    second = await proxy.chat("What is a proxy?")
    assert (first.outcome, second.outcome) == ("MISS", "HIT")
    assert first.json["choices"] == second.json["choices"]
    assert len(model.generations) == 1


async def test_another_question_is_not(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    await proxy.chat("What is a proxy?")
    await proxy.settled()
    others: list[dict[str, Any]] = [{"max_tokens": 5}, {"model": "other"}, {"tools": []}, {"x_new": None}]
    for changes in others:
        assert (await proxy.chat("What is a proxy?", **changes)).outcome == "MISS"
    assert (await proxy.chat("What is a proxy? ", headers={"X-Nearhit-Tier": "exact"})).outcome == "MISS"
    assert len(model.generations) == 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
async def test_both_paths_of_the_chat_endpoint_share_entries(proxy: Proxy, path: str) -> None:
    await proxy.chat("hi")
    await proxy.settled()
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    assert (await proxy.post(path, json=body)).outcome == "HIT"


@pytest.mark.parametrize("first", [{}, {"stream": True}, ASKED])
@pytest.mark.parametrize("second", [{}, {"stream": True}, ASKED])
async def test_every_form_is_served_from_one_entry_where_usage_is_known(
    proxy: Proxy, model: FakeModel, first: dict[str, Any], second: dict[str, Any]
) -> None:
    model.respond = reply("It ", "is ", "é 東京.")
    one = await proxy.chat("x", **first)
    await proxy.settled()
    other = await proxy.chat("x", **second)
    assert said(one) == said(other) == "It is é 東京."
    usage_was_told = first != {"stream": True}
    usage_is_wanted = second != {"stream": True}
    assert other.outcome == ("HIT" if usage_was_told or not usage_is_wanted else "MISS")
    if not usage_was_told and usage_is_wanted:
        # The miss has replaced the entry by one that knows.
        await proxy.settled()
        assert (await proxy.chat("x", **second)).outcome == "HIT"


async def test_a_replayed_stream_obeys_the_askers_include_usage(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    asked = events(await proxy.chat("x", **ASKED))
    unasked = events(await proxy.chat("x", stream=True))
    assert asked[-1]["usage"] == USAGE
    assert asked[-1]["choices"] == []
    assert all("usage" not in event for event in unasked)


async def test_every_replay_has_an_id_and_a_time_of_its_own(proxy: Proxy) -> None:
    miss = (await proxy.chat("x")).json
    await proxy.settled()
    one, other = (await proxy.chat("x")).json, (await proxy.chat("x")).json
    assert len({miss["id"], one["id"], other["id"]}) == 3
    assert one["created"] > miss["created"]


async def test_a_hit_says_what_it_is(proxy: Proxy) -> None:
    await proxy.chat("x")
    await proxy.settled()
    headers = (await proxy.chat("x")).headers
    assert re.fullmatch(r"nearhit; hit; ttl=\d+; detail=exact", headers["Cache-Status"])
    assert headers["Age"].isdigit()
    assert headers["X-Nearhit-Score"] == "1.0"
    assert headers["X-Nearhit-Saved-Ms"].isdigit()
    assert re.fullmatch("[0-9a-f]{32}", headers["X-Nearhit-Entry"])


async def test_a_miss_keeps_the_upstreams_headers_and_adds_to_its_cache_status(proxy: Proxy, model: FakeModel) -> None:
    sent = {"Cache-Status": "Origin; hit", "X-Custom": "kept", "Server": "llama.cpp"}
    model.respond = raw(json.dumps(chat_body()).encode(), headers=sent)
    headers = (await proxy.chat("x")).headers
    assert headers.getall("Cache-Status") == ["Origin; hit", "nearhit; fwd=miss"]
    assert (headers["X-Custom"], headers["Server"], headers["X-Cache"]) == ("kept", "llama.cpp", "MISS")
    assert "X-Nearhit-Entry" not in headers


async def test_a_hit_replays_no_header_of_the_upstreams_answer(proxy: Proxy, model: FakeModel) -> None:
    sent = {"Set-Cookie": "session=1", "X-Custom": "once", "ETag": "1"}
    model.respond = raw(json.dumps(chat_body()).encode(), headers=sent)
    await proxy.chat("x")
    await proxy.settled()
    hit = await proxy.chat("x")
    assert hit.outcome == "HIT"
    assert not set(sent) & set(hit.headers)


async def test_tool_calls_reasoning_refusal_and_logprobs_survive_from_stream_to_whole(
    proxy: Proxy, model: FakeModel
) -> None:
    call = {"index": 0, "id": "call_a", "type": "function", "function": {"name": "light_on", "arguments": ""}}
    parts = ['{"room"', ': "kit', 'chen"}']
    said = [
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "They want "}),
        chunk({"reasoning_content": "light."}),
        chunk({"content": "Sure"}),
        chunk({"tool_calls": [call]}),
        *(chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}) for part in parts),
        chunk({}, finish="tool_calls"),
        chunk(None, usage=USAGE),
    ]
    model.respond = streamed(*(sse(event, done=False) for event in said), sse())
    await proxy.chat("light", **ASKED)
    await proxy.settled()
    hit = await proxy.chat("light")
    assert hit.outcome == "HIT"
    choice = hit.json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Sure",
        "reasoning_content": "They want light.",
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "light_on", "arguments": '{"room": "kitchen"}'}}
        ],
    }
    assert hit.json["usage"] == USAGE


async def test_several_choices_survive(proxy: Proxy, model: FakeModel) -> None:
    body = chat_body("one")
    body["choices"].append({**body["choices"][0], "index": 1, "message": {"role": "assistant", "content": "two"}})
    model.respond = raw(json.dumps(body).encode())
    await proxy.chat("x", n=2)
    await proxy.settled()
    hit = await proxy.chat("x", n=2, stream=True)
    texts = {0: "", 1: ""}
    for event in events(hit):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert (hit.outcome, texts) == ("HIT", {0: "one", 1: "two"})


async def test_completions_are_cached_in_both_forms(proxy: Proxy, model: FakeModel) -> None:
    choice = {"text": " there was", "index": 0, "logprobs": None, "finish_reason": "length"}
    body = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
    model.respond = raw(json.dumps(body).encode())
    asked = {"prompt": "Once upon a time", "temperature": 0}
    assert (await proxy.post("/v1/completions", json=asked)).outcome == "MISS"
    await proxy.settled()
    whole = await proxy.post("/v1/completions", json=asked)
    stream = await proxy.post("/v1/completions", json={**asked, "stream": True})
    assert (whole.outcome, stream.outcome) == ("HIT", "HIT")
    assert whole.json["choices"] == [choice]
    assert "".join(c["text"] for event in events(stream) for c in event["choices"]) == " there was"


async def test_usage_of_a_llama_cpp_stream_is_derived_from_its_timings(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(upstream__kind="llamacpp")
    model.props = {"media_marker": "m1", "default_generation_settings": {"params": {}}}
    await proxy.services.backends.first.tracker.look()
    last = {**chat_events("hi")[-1], "timings": {"cache_n": 2, "prompt_n": 3, "predicted_n": 1}}
    model.respond = streamed(sse(*chat_events("hi")[:-1], last))
    await proxy.chat("x", stream=True)
    await proxy.settled()
    hit = await proxy.chat("x")
    assert hit.outcome == "HIT"
    assert hit.json["usage"]["total_tokens"] == 6
    assert hit.json["timings"] == last["timings"]


async def test_an_answer_is_there_after_a_restart(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as first:
        await first.chat("x")
        await first.settled()
    async with running_proxy(settings) as second:
        assert (await second.chat("x")).outcome == "HIT"
    assert len(model.generations) == 1


async def test_an_expired_answer_is_asked_anew(start: StartProxy, model: FakeModel) -> None:
    model.respond = numbered()
    proxy = await start(cache__ttl_hours=1e-9)
    await proxy.chat("x")
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "MISS"


async def test_volatile_questions_are_kept_shortly(start: StartProxy) -> None:
    proxy = await start()
    await proxy.chat("What is the weather?")
    await proxy.settled()
    hit = await proxy.chat("What is the weather?")
    ttl = int(re.findall(r"ttl=(\d+)", hit.headers["Cache-Status"])[0])
    assert (hit.outcome, ttl <= 60) == ("HIT", True)


async def test_volatile_questions_are_not_kept_where_their_lifetime_is_zero(start: StartProxy) -> None:
    proxy = await start(cache__volatile_ttl_s=0)
    await proxy.chat("What is the weather?")
    await proxy.settled()
    assert (await proxy.chat("What is the weather?")).outcome == "MISS"
    assert (await proxy.stats())["not_stored"]["volatile"] >= 1


async def test_sampled_calls_are_cached_unless_told_otherwise(start: StartProxy) -> None:
    cached, bypassing = await start(), await start(cache__sampled="bypass", cache__persist="off")
    for expected, proxy in (("HIT", cached), ("BYPASS", bypassing)):
        await proxy.chat("x", temperature=0.7)
        await proxy.settled()
        assert (await proxy.chat("x", temperature=0.7)).outcome == expected
        await proxy.chat("x", temperature=0.7, seed=1)
        await proxy.settled()
        assert (await proxy.chat("x", temperature=0.7, seed=1)).outcome == "HIT"


async def test_the_same_bytes_again_within_the_retry_window_mean_try_again(start: StartProxy, model: FakeModel) -> None:
    model.respond = numbered()
    proxy = await start(cache__retry_window_s=3600)
    first = await proxy.chat("x", temperature=0.7)
    await proxy.settled()
    again = await proxy.chat("x", temperature=0.7)
    other_bytes = await proxy.chat("x", temperature=0.70)
    assert (first.outcome, again.outcome) == ("MISS", "MISS")
    assert said(first) != said(again)
    assert other_bytes.outcome == "MISS"
    deterministic = [await proxy.chat("y") for _ in range(1)]
    await proxy.settled()
    assert ([a.outcome for a in deterministic], (await proxy.chat("y")).outcome) == (["MISS"], "HIT")


async def test_mode_off_relays_and_says_so(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__mode="off")
    answers = [await proxy.chat("x") for _ in range(2)]
    assert [a.outcome for a in answers] == ["BYPASS", "BYPASS"]
    assert answers[0].headers["Cache-Status"] == "nearhit; fwd=bypass; detail=mode-off"
    assert len(model.generations) == 2


async def test_the_same_bytes_of_another_caller_are_no_retry(start: StartProxy) -> None:
    proxy = await start(cache__retry_window_s=3600)
    outcomes = []
    for key in ("a", "b", "a"):
        outcomes.append((await proxy.chat("x", temperature=0.7, headers={"Authorization": f"Bearer {key}"})).outcome)
        await proxy.settled()
    assert outcomes == ["MISS", "HIT", "MISS"]
