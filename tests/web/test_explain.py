"""`/-/explain` tells what would become of a call and why, and changes nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from proxy import __version__
from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import USAGE, FakeModel, held, raw, reply
from tests.program.test_warm import MESSAGE, RESPONSE
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near
from tests.web.test_sharing import MINE, keyed
from tests.web.test_sharing import OTHER as THEIRS

COMPLETION = {
    "id": "cmpl-up",
    "object": "text_completion",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "text": " world", "finish_reason": "stop"}],
    "usage": USAGE,
}


def asking(words: str = ASKED, system: str | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a call as `Proxy.chat` sends it, perhaps with a system prompt."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*before, {"role": "user", "content": words}], "temperature": 0, **fields}


async def ask(proxy: Proxy, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
    """A real call, and its answer stored."""
    answer = await proxy.post("/v1/chat/completions", json=body, headers=headers)
    await proxy.settled()
    return answer


async def explained(
    proxy: Proxy, body: dict[str, Any], headers: dict[str, str] | None = None, query: str = ""
) -> dict[str, Any]:
    answer = await proxy.post(f"/-/explain{query}", json=body, headers=headers)
    assert answer.status == 200, answer.body
    told: dict[str, Any] = answer.json
    assert told["version"] == __version__
    return told


async def written(proxy: Proxy, count: int) -> dict[str, Any]:
    """Statistics, once so many entries are in the store."""
    async with asyncio.timeout(60):
        while (stats := await proxy.stats())["cache.size"] != count:
            await asyncio.sleep(0.01)
    return stats


# What it tells


async def test_a_hit_tells_the_entry_that_would_be_served(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    told = await explained(proxy, asking())
    served = await proxy.chat(ASKED)
    assert (told["outcome"], told["reason"], told["endpoint"]) == ("HIT", "equal", "chat")
    assert told["entry"]["id"] == served.headers["X-Nearhit-Entry"] == told["key"]["digest"]
    assert told["entry"]["saved_ms"] == int(served.headers["X-Nearhit-Saved-Ms"])
    assert 0 < told["entry"]["ttl_s"] <= 72 * 3600
    assert "nearest_call_elsewhere" not in told


async def test_a_near_hit_tells_the_stored_words_and_the_rule(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    told = await explained(proxy, asking(ALIKE))
    served = await proxy.chat(ALIKE)
    assert (told["outcome"], told["reason"]) == (served.outcome, served.headers["X-Nearhit-Rule"]) == ("NEAR", "equal")
    assert told["entry"]["id"] == served.headers["X-Nearhit-Entry"]
    assert told["entry"]["score"] == 1.0
    (candidate,) = told["near"]["candidates"]
    assert (candidate["id"], candidate["words"], candidate["same"]) == (told["entry"]["id"], ASKED, True)
    assert told["words"]["text"] == ALIKE
    assert told["words"]["rules"] == "en"
    assert "thanks" not in told["words"]["compared"]


async def test_a_typo_tells_how_it_was_found_and_where_it_differs(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    told = await explained(proxy, asking("How do I reset the ruoter in the living room?"))
    assert (told["outcome"], told["reason"], told["near"]["found_by"]) == ("NEAR", "typo", "sketch")
    assert 0.6 <= told["entry"]["score"] < 1
    assert "[-router-] {+ruoter+}" in told["near"]["candidates"][0]["difference"]


async def test_a_refused_candidate_tells_the_words_that_decided(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    told = await explained(proxy, asking(OTHER))
    assert (told["outcome"], told["reason"], told["entry"]) == ("MISS", "absent", None)
    (candidate,) = told["near"]["candidates"]
    assert (candidate["same"], candidate["rule"]) == (False, "content-word")
    assert (candidate["asked"], candidate["stored"]) == (["dining"], ["living"])
    assert candidate["difference"].endswith("in the [-living-] {+dining+} room")
    assert told["near"]["found_by"] is None
    assert "nearest_call_elsewhere" not in told


async def test_the_best_candidate_comes_first(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking(OTHER))
    await ask(proxy, asking("How do I reset the router in the living room at home?"))
    told = await explained(proxy, asking())
    scores = [candidate["score"] for candidate in told["near"]["candidates"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("before", "now", "here", "looks_like"),
    [
        ("It is 10:41 now. Be brief.", "It is 10:47 now. Be brief.", "10:47", "a time of day"),
        ("Today: 2026-11-21 (UTC). Be brief.", "Today: 2026-11-22 (UTC). Be brief.", "2026-11-22", "a date"),
        ("Session 3f2a9c1e77ab is open. Go.", "Session 9bb41c20d3f0 is open. Go.", "9bb41c20d3f0", "an id"),
        (
            "The lamp is at 40 percent. Be brief.",
            "The lamp is at 55 percent. Be brief.",
            "55",
            "a number, such as a device's state",
        ),
        ("You are a pirate. Be brief.", "You are a nurse. Be brief.", "nurse.", ""),
    ],
)
async def test_a_call_in_another_space_is_named_with_what_keeps_it_apart(
    start: StartProxy, before: str, now: str, here: str, looks_like: str
) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking(system=before))
    told = await explained(proxy, asking(system=now))
    assert (told["outcome"], told["near"]["candidates"]) == ("MISS", [])
    (span,) = told["nearest_call_elsewhere"]
    assert (span["part"], span["here"], span["looks_like"]) == ("system prompt", here, looks_like)
    assert now[span["start"] : span["end"]] == here
    assert span["there"] in before
    assert span["here"] in span["around"]


async def test_the_most_similar_call_is_chosen(start: StartProxy) -> None:
    proxy = await with_near(start)
    for system in ("You are a pirate, and nothing else.", "It is 10:41. Be brief.", "Reply in French only."):
        await ask(proxy, asking("something else", system))
    (span,) = (await explained(proxy, asking(system="It is 10:47. Be brief.")))["nearest_call_elsewhere"]
    assert (span["here"], span["there"]) == ("10:47.", "10:41.")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": "another"}, "model"),
        ({"seed": 7}, "parameter seed"),
        ({"temperature": 1}, "parameter temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"unheard_of": {"a": 1}}, "parameter unheard_of"),
    ],
)
async def test_every_field_that_keeps_calls_apart_has_its_name(
    start: StartProxy, change: dict[str, Any], part: str
) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking(model="tiny"))
    told = await explained(proxy, {**asking(model="tiny"), **change})
    assert [span["part"] for span in told["nearest_call_elsewhere"]] == [part]
    assert part in [one["name"] for one in told["key"]["parts"]]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], None),
        ([{"role": "system", "content": "a\nb"}], [{"role": "system", "content": word} for word in "ab"]),
    ],
)
async def test_whatever_keeps_calls_apart_is_named(start: StartProxy, before: Any, now: Any) -> None:
    proxy = await with_near(start)
    last = {"role": "user", "content": ASKED}
    one, other = ({"messages": [*turns, last], "temperature": 0} for turns in (before, now or before[::-1]))
    await ask(proxy, one)
    told = await explained(proxy, other)
    assert (told["outcome"], told["near"]["candidates"]) == ("MISS", [])
    assert told["nearest_call_elsewhere"]


async def test_fields_that_do_not_count_are_not_named(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    told = await explained(proxy, asking(stream=True, user="me", metadata={"a": "b"}))
    assert told["outcome"] == "HIT"
    assert [part["name"] for part in told["key"]["parts"]] == ["endpoint", "last message", "parameter temperature"]


async def test_equal_parts_have_equal_digests_and_the_words_are_no_part(start: StartProxy) -> None:
    proxy = await with_near(start)
    one, two = [await explained(proxy, asking(words, "Be brief.")) for words in (ASKED, OTHER)]
    assert one["key"]["parts"] == two["key"]["parts"]
    assert one["key"]["space"] == two["key"]["space"]
    assert one["key"]["digest"] != two["key"]["digest"]
    other = await explained(proxy, asking(ASKED, "Be very brief."))
    differing = [a["name"] for a, b in zip(one["key"]["parts"], other["key"]["parts"], strict=True) if a != b]
    assert differing == ["system prompt"]
    assert one["key"]["space"] != other["key"]["space"]


async def test_a_header_that_chooses_how_a_server_answers_is_named(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    told = await explained(proxy, asking(), {"OpenAI-Beta": "x=v2"})
    assert [span["part"] for span in told["nearest_call_elsewhere"]] == ["header openai-beta"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": []}, "not-understood"),
        ({"messages": "hi"}, "not-understood"),
        ({}, "not-understood"),
        (asking(store=True), "store-true"),
        (asking(return_progress=True), "return-progress"),
        (asking(stream="maybe"), "not-understood"),
    ],
)
async def test_what_is_not_cached_says_so(proxy: Proxy, body: dict[str, Any], reason: str) -> None:
    told = await explained(proxy, body)
    assert (told["outcome"], told["reason"]) == ("BYPASS", reason)
    assert (await proxy.post("/v1/chat/completions", json=body)).outcome == "BYPASS"


async def test_a_cache_that_is_off_says_so(start: StartProxy) -> None:
    proxy = await start(cache__mode="off")
    told = await explained(proxy, asking())
    assert (told["outcome"], told["reason"]) == ("BYPASS", "mode-off")
    assert told["near"] == {"mode": "off", "state": "off"}


@pytest.mark.parametrize("field", ["sampled", "mode"])
async def test_the_exact_tier_alone_shows_no_candidates(start: StartProxy, field: str) -> None:
    proxy = await start(**{f"cache__{field}": "exact"})
    await ask(proxy, asking(temperature=0.7))
    told = await explained(proxy, asking(ALIKE, temperature=0.7))
    assert (told["outcome"], told["reason"]) == ("MISS", "absent")
    assert "candidates" not in told["near"]
    assert "threshold" not in told["near"]
    if field == "mode":
        assert told["near"] == {"mode": "exact", "state": "off"}
    assert (await explained(proxy, asking(temperature=0.7)))["outcome"] == "HIT"


async def test_shadow_shows_what_would_have_been_served(start: StartProxy) -> None:
    proxy = await with_near(start, cache__shadow="true")
    await ask(proxy, asking())
    told = await explained(proxy, asking(ALIKE))
    assert (told["outcome"], told["reason"]) == ("MISS", "absent")
    assert (told["near"]["shadow"], told["near"]["threshold"], told["near"]["state"]) == (True, 0.6, "on")
    assert [(one["words"], one["same"]) for one in told["near"]["candidates"]] == [(ASKED, True)]
    assert (await proxy.stats())["cache.hit_shadow"] == 0


async def test_sampled_calls_that_pass_by_say_so(start: StartProxy) -> None:
    proxy = await start(cache__sampled="bypass")
    told = await explained(proxy, asking(temperature=0.7))
    assert (told["outcome"], told["reason"]) == ("BYPASS", "sampled")


async def test_a_call_that_another_asks_right_now_would_be_joined(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    model.respond = held(reply())
    first = asyncio.create_task(proxy.chat(ASKED))
    await eventually(lambda: model.started == 1)
    told = await explained(proxy, asking())
    assert (told["outcome"], told["reason"]) == ("JOINED", "in-flight")
    model.release.set()
    assert (await first).outcome == "MISS"


# What would be stored


@pytest.mark.parametrize(
    ("seconds", "would_store"),
    [
        (60, {"ttl_s": 60, "volatile": True, "for_other_words": True}),
        (0, {"reason": "volatile", "volatile": True}),
    ],
)
async def test_a_volatile_prompt_is_kept_for_a_short_time_or_not_at_all(
    start: StartProxy, seconds: int, would_store: dict[str, Any]
) -> None:
    proxy = await start(cache__volatile_ttl_s=seconds)
    assert (await explained(proxy, asking("What is the weather today?")))["would_store"] == would_store
    plain = (await explained(proxy, asking()))["would_store"]
    assert plain == {"ttl_s": 72 * 3600, "grace_s": 24 * 3600, "volatile": False, "for_other_words": True}


async def test_an_answer_that_serves_no_other_words_is_told(start: StartProxy) -> None:
    proxy = await with_near(start)
    assert (await explained(proxy, asking(n=2)))["would_store"]["for_other_words"] is False
    picture = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]
    told = await explained(proxy, {"messages": [{"role": "user", "content": picture}]})
    assert (told["would_store"]["for_other_words"], told["words"]) == (False, None)


# Endpoints


@pytest.mark.parametrize("query", ["", "?endpoint=completions"])
async def test_completions_are_compared_exactly(start: StartProxy, model: FakeModel, query: str) -> None:
    proxy = await with_near(start)
    model.respond = raw(json.dumps(COMPLETION).encode())
    await proxy.post("/v1/completions", json={"prompt": "hello 17", "temperature": 0})
    await proxy.settled()
    told = await explained(proxy, {"prompt": "hello 17", "temperature": 0}, query=query)
    assert (told["endpoint"], told["outcome"], told["words"]) == ("completions", "HIT", None)
    other = await explained(proxy, {"prompt": "hello 18", "temperature": 0}, query=query)
    assert (other["outcome"], "candidates" in other["near"]) == ("MISS", False)
    (span,) = other["nearest_call_elsewhere"]
    assert (span["part"], span["here"], span["there"]) == ("prompt", "18", "17")


async def test_the_query_that_a_client_sends_can_be_named(proxy: Proxy) -> None:
    target = "/v1/chat/completions?beta=true"
    await proxy.post(target, json=asking())
    await proxy.settled()
    here = await explained(proxy, asking(), query=f"?endpoint={quote(target, safe='')}")
    assert (here["outcome"], here["reason"]) == ("HIT", "equal")
    assert (await explained(proxy, asking()))["outcome"] == "MISS"
    assert (await explained(proxy, asking(), query="?endpoint=chat?beta=false"))["outcome"] == "MISS"


async def test_the_endpoint_can_be_named_where_a_body_would_fit_both(start: StartProxy) -> None:
    proxy = await start()
    body = {**asking(), "prompt": "x"}
    assert (await explained(proxy, body))["endpoint"] == "chat"
    for name in ("chat", "completions"):
        assert (await explained(proxy, body, query=f"?endpoint={name}"))["endpoint"] == name
    told = await explained(proxy, asking(), query="?endpoint=completions")
    assert (told["outcome"], told["reason"]) == ("BYPASS", "not-understood")


@pytest.mark.parametrize("name", ["rerank", "CHAT", "/v1/rerank", "%00"])
async def test_an_unknown_endpoint_is_refused_with_those_there_are(proxy: Proxy, name: str) -> None:
    answer = await proxy.post(f"/-/explain?endpoint={name}", json=asking())
    assert (answer.status, answer.json["error"]["code"]) == (400, "unknown_endpoint")
    assert "chat, completions, responses, messages, embeddings" in answer.json["error"]["message"]


def answering(model: FakeModel) -> None:
    """Have it answer on the three endpoints, each vector by its number."""

    async def answer(request: web.Request) -> web.StreamResponse | None:
        told = {"/v1/messages": MESSAGE, "/v1/responses": RESPONSE}.get(request.path)
        if request.path == "/v1/embeddings":
            given = (await request.json())["input"]
            data = [{"object": "embedding", "index": place, "embedding": [place + 1.0]} for place in range(len(given))]
            told = {"object": "list", "data": data, "model": "tiny", "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        return None if told is None else web.json_response(told)

    model.extra = answer


def message(words: str = ASKED, **fields: Any) -> dict[str, Any]:
    return {"max_tokens": 5, "temperature": 0, "messages": [{"role": "user", "content": words}], **fields}


def response(words: str = ASKED, **fields: Any) -> dict[str, Any]:
    return {"input": words, "temperature": 0, "store": False, **fields}


MADE = {"messages": message, "responses": response}
ALONG = {"messages": {"anthropic-version": "2026-10-21"}, "responses": {}}
SYSTEM = {"messages": "system", "responses": "instructions"}


@pytest.mark.parametrize("endpoint", MADE)
@pytest.mark.parametrize("query", ["", "?endpoint={}", "?endpoint=/v1/{}"])
async def test_a_call_of_the_official_client_is_explained_by_its_body_alone(
    start: StartProxy, model: FakeModel, endpoint: str, query: str
) -> None:
    answering(model)
    proxy = await with_near(start)
    body = MADE[endpoint](**{SYSTEM[endpoint]: "Be brief."})
    sent = await proxy.post(f"/v1/{endpoint}", json=body, headers=ALONG[endpoint])
    assert (sent.status, sent.outcome) == (200, "MISS")
    await proxy.settled()
    told = await explained(proxy, body, query=query.format(endpoint))
    assert (told["endpoint"], told["outcome"]) == (endpoint, "HIT")
    assert (f"it is for /v1/{endpoint}" in told["assumed"]) is (query == "")
    assert ("it comes with anthropic-version: 2026-10-21" in told["assumed"]) is (endpoint == "messages")
    near = await explained(proxy, MADE[endpoint](ALIKE, **{SYSTEM[endpoint]: "Be brief."}))
    assert (near["outcome"], near["near"]["candidates"][0]["words"]) == ("NEAR", ASKED)
    said = await explained(proxy, body, {"anthropic-version": "2099-01-01"}, f"?endpoint={endpoint}")
    assert (said["outcome"], said["assumed"]) == ("MISS", [])


@pytest.mark.parametrize("endpoint", MADE)
async def test_a_clock_in_a_system_prompt_is_found_on_every_endpoint(
    start: StartProxy, model: FakeModel, endpoint: str
) -> None:
    answering(model)
    proxy = await with_near(start)

    def made(clock: str) -> dict[str, Any]:
        return MADE[endpoint](**{SYSTEM[endpoint]: f"You switch lamps. It is {clock} now. Be brief, and polite."})

    for minute in range(10, 20):
        await proxy.post(f"/v1/{endpoint}", json=made(f"10:{minute}"), headers=ALONG[endpoint])
    told = await explained(proxy, made("10:47"))
    (span,) = told["nearest_call_elsewhere"]
    assert (span["part"], span["here"], span["looks_like"]) == ("system prompt", "10:47", "a time of day")
    (warning,) = (await proxy.stats())["warnings"]
    assert "system prompt was another one in nearly all of the last 10 calls" in warning


async def test_a_batch_is_explained_input_by_input(start: StartProxy, model: FakeModel) -> None:
    answering(model)
    proxy = await with_near(start)
    await proxy.post("/v1/embeddings", json={"model": "tiny", "input": ["one", "two"]})
    await proxy.settled()
    told = await explained(proxy, {"model": "tiny", "input": ["two", "three", "one"]})
    assert (told["endpoint"], told["outcome"], told["reason"]) == ("embeddings", "MISS", "partial")
    assert (told["items"]["known"], told["items"]["asked"]) == (2, 3)
    assert [one["known"] for one in told["items"]["told"]] == [True, False, True]
    assert (await explained(proxy, {"model": "tiny", "input": ["two"], "encoding_format": "base64"}))[
        "outcome"
    ] == "HIT"
    named = await explained(proxy, {"model": "tiny", "input": "one"}, query="?endpoint=embeddings")
    assert (named["outcome"], named["assumed"]) == ("HIT", [])
    other = await explained(proxy, {"model": "large", "input": ["one"]})
    assert (other["outcome"], other["reason"]) == ("MISS", "absent")
    refused = await explained(proxy, {"model": "tiny", "input": []}, query="?endpoint=embeddings")
    assert (refused["outcome"], refused["reason"]) == ("BYPASS", "not-understood")
    off = await start(cache__mode="off")
    assert (await explained(off, {"input": ["one"]}))["reason"] == "mode-off"


async def test_a_stale_answer_says_so(start: StartProxy) -> None:
    proxy = await with_near(start, cache__stale_while_revalidate_s=3600)
    await ask(proxy, asking(cache={"ttl": 1}))
    async with asyncio.timeout(60):
        while (told := await explained(proxy, asking()))["entry"]["ttl_s"] >= 0:
            await asyncio.sleep(0.05)
    assert (told["outcome"], told["reason"]) == ("STALE", "stale")


# Bodies that are no call


BAD: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut": b'{"messages": [{"role"',
    "a list": b"[1, 2]",
    "a text": b'"messages"',
    "null": b"null",
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a huge number": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 6000 + b"}",
}


@pytest.mark.parametrize("case", BAD)
async def test_a_body_that_is_no_json_object_is_refused_in_the_openai_shape(
    proxy: Proxy, model: FakeModel, case: str
) -> None:
    answer = await proxy.post("/-/explain", data=BAD[case])
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["code"], error["type"]) == ("not_json", "invalid_request_error")
    assert model.generations == []


ODD: dict[str, bytes] = {
    "NaN": b'{"messages": [{"role":"user","content":"a"}], "temperature": NaN}',
    "1e999": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud83d"}], "model": "\\udfff"}',
    "lone surrogate in a name": b'{"messages": [{"role": "user", "content": "a"}], "\\ud83d": 1}',
    "NUL": b'{"messages": [{"role": "user", "content": "\\u0000"}], "model": "\\u0000\\n"}',
    "wrong types": b'{"messages": {"role": 7}, "stream": "maybe", "temperature": []}',
    "messages of anything": b'{"messages": [{"role": ["system"]}, {"content": 5}, {"role": null, "content": {}}]}',
    "empty words": b'{"messages": [{"role": "user", "content": "  "}]}',
    "no prompt": b'{"prompt": [[1, 2], [3]], "model": 5}',
}


@pytest.mark.parametrize("case", ODD)
async def test_whatever_else_arrives_is_explained(start: StartProxy, case: str) -> None:
    proxy = await with_near(start)
    await proxy.post("/v1/chat/completions", data=ODD[case])
    await proxy.settled()
    answer = await proxy.post("/-/explain", data=ODD[case])
    assert answer.status == 200, answer.body
    assert answer.json["outcome"] in ("MISS", "HIT", "BYPASS")


@pytest.mark.parametrize("place", ["a parameter", "the history", "the last message"])
async def test_no_depth_of_nesting_is_an_error_of_ours(start: StartProxy, place: str) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking(x=1))
    for depth in range(850, 1000, 3):
        deep: Any = "[" * depth + "]" * depth
        turns = f'{{"role": "user", "content": {deep}}}'
        messages = {"a parameter": "", "the history": turns + ",", "the last message": ""}[place]
        last = turns if place == "the last message" else '{"role": "user", "content": "a"}'
        more = f', "x": {deep}' if place == "a parameter" else ""
        answer = await proxy.post("/-/explain", data=f'{{"messages": [{messages}{last}]{more}}}')
        assert answer.status in (200, 400), (depth, answer.body)
        assert "outcome" in answer.json or answer.json["error"]["code"] == "not_json"


async def test_a_body_above_the_limit_is_refused(start: StartProxy) -> None:
    proxy = await start(limits__max_request_bytes=4096)

    async def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    for data in (b"x" * 100_000, pieces()):
        answer = await proxy.post("/-/explain", data=data)
        assert answer.status == 413
        assert answer.json["error"]["message"]


async def test_a_body_of_many_values_is_explained_as_it_would_be_treated(start: StartProxy) -> None:
    proxy = await start()
    body = b'{"messages": [{"role": "user", "content": "a"}], "x": [' + b"[]," * 260_000 + b"1]}"
    told = (await proxy.post("/-/explain", data=body)).json
    assert (told["outcome"], told["reason"]) == ("BYPASS", "too-complex")


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 0, "temperature": 0}',
        '{"messages": [{"role": "user", "content": "a"}], "temperature": 0}'.encode("utf-16"),
    ],
)
async def test_the_very_bytes_are_explained(proxy: Proxy, body: bytes) -> None:
    told = await proxy.post("/-/explain", data=body)
    real = await proxy.post("/v1/chat/completions", data=body)
    assert real.outcome == "BYPASS"
    assert told.status == 400 or told.json["outcome"] == "BYPASS"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_other_methods_are_unknown(proxy: Proxy, method: str) -> None:
    assert (await proxy.send(method, "/-/explain")).status == 404


# It changes nothing


async def test_explaining_asks_nobody_and_counts_nothing(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start, cache__flush_s=0.01)
    await ask(proxy, asking())
    before = await written(proxy, 1)
    posts = len([seen for seen in model.seen if seen.method == "POST"])
    for body in (asking(), asking(ALIKE), asking(OTHER), asking("new", "It is 10:41."), asking(store=True)):
        for _ in range(2):
            await explained(proxy, body)
    assert len([seen for seen in model.seen if seen.method == "POST"]) == posts
    after = await proxy.stats()
    assert {**after, "uptime_s": 0} == {**before, "uptime_s": 0}
    assert (await ask(proxy, asking(OTHER))).outcome == "MISS"
    assert (await ask(proxy, asking(OTHER))).outcome == "HIT"
    assert (await written(proxy, 2))["requests"]["MISS"] == 2


async def test_explaining_counts_no_look_up(start: StartProxy) -> None:
    proxy = await with_near(start, cache__hot_bytes=0, cache__flush_s=0.01)
    await ask(proxy, asking())
    before = await written(proxy, 1)
    assert (await explained(proxy, asking()))["outcome"] == "HIT"
    assert (await proxy.stats())["cache.load_ms"] == before["cache.load_ms"]


async def test_explained_calls_are_no_recent_calls(start: StartProxy) -> None:
    proxy = await with_near(start)
    for minute in range(10, 20):
        await explained(proxy, asking(system=f"It is 10:{minute} now. Be brief."))
    assert (await explained(proxy, asking(system="It is 10:59 now. Be brief.")))["nearest_call_elsewhere"] == []
    assert (await proxy.stats())["warnings"] == []


async def test_explaining_is_no_trying_again(start: StartProxy) -> None:
    proxy = await with_near(start, cache__retry_window_s=60)
    body = asking(temperature=0.7)
    assert (await explained(proxy, body))["reason"] == "absent"
    assert (await explained(proxy, body))["reason"] == "absent"
    assert (await ask(proxy, body)).headers["Cache-Status"] == "nearhit; fwd=miss"
    assert (await explained(proxy, body))["outcome"] == "HIT"
    # The client's own second time is one.
    assert (await ask(proxy, body)).headers["Cache-Status"] == "nearhit; fwd=request"


# Who may ask


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Via": "1.1 x"},
        {"X-Nearhit-Admin": "wrong"},
        {"X-Forwarded-For": "127.0.0.1", "Authorization": "Bearer any"},
        {"Origin": "https://evil.example", "Authorization": "Bearer any"},
    ],
)
@pytest.mark.parametrize("path", ["/-/explain", "/-/feedback"])
async def test_whoever_may_not_use_admin_routes_is_refused(proxy: Proxy, headers: dict[str, str], path: str) -> None:
    await ask(proxy, asking())
    answer = await proxy.post(path, json=asking(), headers=headers)
    assert (answer.status, answer.json["error"]["code"]) == (403, "admin_refused")
    assert b"living room" not in answer.body


async def test_a_set_token_is_wanted(start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    assert (await proxy.post("/-/explain", json=asking())).status == 403
    assert (await explained(proxy, asking(), {"X-Nearhit-Admin": "opensesame"}))["outcome"] == "MISS"


async def two_clients(start: StartProxy, model: FakeModel) -> Proxy:
    """Two clients with answers of their own; the first has asked something."""
    model.extra = keyed("mine", "other")
    proxy = await with_near(start, upstream__api_key="mine")
    assert not proxy.services.backends.first.gate.shared
    assert (await ask(proxy, asking(system="The word is xyzzy: 10:41."), MINE)).outcome == "MISS"
    return proxy


async def test_a_client_with_answers_of_its_own_may_explain_them(start: StartProxy, model: FakeModel) -> None:
    proxy = await two_clients(start, model)
    body = asking(system="The word is xyzzy: 10:41.")
    assert (await explained(proxy, body, MINE))["outcome"] == "HIT"
    near = await explained(proxy, asking(ALIKE, "The word is xyzzy: 10:41."), MINE)
    assert (near["outcome"], near["near"]["candidates"][0]["words"]) == ("NEAR", ASKED)
    elsewhere = await explained(proxy, asking(system="The word is xyzzy: 10:47."), MINE)
    assert elsewhere["nearest_call_elsewhere"][0]["there"] == "10:41."


async def test_a_client_never_sees_what_another_has_asked(start: StartProxy, model: FakeModel) -> None:
    proxy = await two_clients(start, model)
    for body in (asking(system="The word is xyzzy: 10:41."), asking(ALIKE, "The word is xyzzy: 10:41.")):
        told = await explained(proxy, body, THEIRS)
        assert (told["outcome"], told["near"]["candidates"], told["entry"]) == ("MISS", [], None)
        assert told["nearest_call_elsewhere"] == []
    answer = await proxy.post("/-/explain", json=asking(system="The word is"), headers=THEIRS)
    assert b"xyzzy" not in answer.body


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Authorization": "Bearer stolen"}, "key_refused"),
        ({}, "admin_refused"),
        ({**MINE, "Origin": "https://evil.example"}, "admin_refused"),
    ],
)
@pytest.mark.parametrize("path", ["/-/explain", "/-/feedback"])
async def test_whom_the_upstream_refuses_sees_nothing(
    start: StartProxy, model: FakeModel, headers: dict[str, str], code: str, path: str
) -> None:
    proxy = await two_clients(start, model)
    answer = await proxy.post(path, json=asking(system="The word is xyzzy: 10:41."), headers=headers)
    assert (answer.status, answer.json["error"]["code"]) == (403, code)
    assert b"xyzzy" not in answer.body


async def test_an_admin_explains_for_the_client_whose_key_comes_along(start: StartProxy, model: FakeModel) -> None:
    proxy = await two_clients(start, model)
    admin = {"X-Nearhit-Admin": proxy.services.local_token}
    body = asking(system="The word is xyzzy: 10:41.")
    assert (await explained(proxy, body, {**admin, **MINE}))["outcome"] == "HIT"
    assert (await explained(proxy, body, {**admin, **THEIRS}))["outcome"] == "MISS"
