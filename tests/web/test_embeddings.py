"""`/v1/embeddings`: each input is kept by itself; the upstream is asked for those that are missing, once."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, error, is_nearhits_own
from tests.web.test_identity import props

PATH = "/v1/embeddings"
Change = Callable[[Any, Any], Any]
"""Makes the answer to a request, its body given first, another one."""


@dataclass
class Vectors:
    """An embeddings server: its answers, and what it was asked."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    change: Change | None = None
    status: int = 200
    hangs_up: bool = False
    kind: str = "application/json"
    held: bool = False
    release: asyncio.Event = field(default_factory=asyncio.Event)
    started: int = 0
    gone: int = 0

    @property
    def inputs(self) -> list[Any]:
        """What each request asked for."""
        return [asked["input"] for asked in self.asked]

    async def serve(self, request: web.Request) -> web.StreamResponse | None:
        if request.path != PATH:
            return None
        body = await request.read()
        if body == b"{}":
            return error(400, "input is needed", "invalid_request_error")
        asked = json.loads(body)
        if is_nearhits_own(request.headers, body):
            return web.json_response(answer_to(asked))
        self.raw.append(body)
        self.asked.append(asked)
        self.started += 1
        if self.held:
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.gone += 1
                raise
        if self.hangs_up and request.transport is not None:
            request.transport.abort()
        if self.status != 200:
            return error(self.status, "it went wrong", "server_error")
        answered: Any = answer_to(asked)
        if self.change is not None:
            answered = self.change(asked, answered)
        content = answered if isinstance(answered, bytes) else json.dumps(answered).encode()
        return web.Response(body=content, content_type=self.kind, headers={"X-Up": "yes"})


def vector_of(text: Any) -> list[float]:
    """A vector that nothing else has."""
    seed = sum(map(ord, json.dumps(text)))
    return [seed / 1024, len(str(text)) + 0.5, -1.0]


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    items = asked["input"]
    items = items if isinstance(items, list) and not isinstance(items[0], int) else [items]
    vectors = [vector_of(item) for item in items]
    shown = [packed(one) if asked.get("encoding_format") == "base64" else one for one in vectors]
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(shown)]
    tokens = sum(len(str(item)) for item in items) + len(items)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.get("model", "tiny"), "usage": usage}


def packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


@pytest.fixture
def vectors(model: FakeModel) -> Vectors:
    served = Vectors()
    model.extra = served.serve
    return served


Embed = Callable[..., Coroutine[Any, Any, Answer]]


def embedding(proxy: Proxy) -> Embed:
    async def embed(given: Any, *, headers: dict[str, str] | None = None, settle: bool = True, **more: Any) -> Answer:
        answered = await proxy.post(PATH, json={"input": given, "model": "tiny", **more}, headers=headers)
        if settle:
            await proxy.settled()
        return answered

    return embed


@pytest.fixture
def embed(proxy: Proxy, vectors: Vectors) -> Embed:
    return embedding(proxy)


def told(answer: Answer) -> list[Any]:
    assert answer.status == 200, answer.body
    assert [one["index"] for one in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [one["embedding"] for one in answer.json["data"]]


def of(*texts: Any) -> list[list[float]]:
    return [vector_of(text) for text in texts]


def status(answer: Answer) -> str:
    return str(answer.headers["Cache-Status"])


def value(proxy: Proxy, name: str, **labels: str) -> float:
    return proxy.services.metrics.value(f"nearhit_{name}", labels)


# --- hits and misses


async def test_a_batch_is_asked_as_it_came_and_then_known(proxy: Proxy, vectors: Vectors) -> None:
    raw = b'{ "input": ["a", "b"],  "model": "tiny", "truncate": 1.50 }'
    first = await proxy.post(PATH, data=raw, headers={"Content-Type": "application/json"})
    await proxy.settled()
    second = await proxy.post(PATH, data=raw, headers={"Content-Type": "application/json"})
    assert vectors.raw == [raw]
    assert (first.outcome, second.outcome) == ("MISS", "HIT")
    assert status(first) == "nearhit; fwd=miss"
    assert re.fullmatch("nearhit; hit; ttl=259[12][0-9]{2}; detail=exact", status(second))
    assert first.json == second.json
    assert first.headers["X-Up"] == "yes"
    assert int(second.headers["Age"]) < 60
    assert second.headers["Content-Type"].startswith("application/json")


async def test_ninety_of_a_hundred_known_sends_ten(embed: Embed, vectors: Vectors) -> None:
    texts = [f"text {number}" for number in range(100)]
    await embed(texts[:90])
    mixed = [texts[(37 * place) % 100] for place in range(100)]
    answer = await embed(mixed, dimensions=None)
    assert told(answer) == of(*mixed)
    vectors.asked.clear()
    answer = await embed(list(reversed(mixed)), dimensions=None)
    assert (answer.outcome, vectors.asked) == ("HIT", [])
    await embed(texts[:90], user="me")
    assert vectors.asked == []
    answer = await embed(mixed)
    assert sorted(vectors.inputs[0]) == sorted(texts[90:])
    assert vectors.inputs[0] == [text for text in mixed if text in texts[90:]]
    assert (answer.outcome, status(answer)) == ("MISS", "nearhit; fwd=partial")
    assert answer.headers["X-Nearhit-Items"] == "90/100"
    assert answer.headers["X-Up"] == "yes"
    assert told(answer) == of(*mixed)


async def test_a_reduced_request_keeps_all_other_fields(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"], dimensions=3, task={"x": None})
    await embed(["a", "b"], dimensions=3, task={"x": None}, cache={"ttl": 60}, user="u")
    assert vectors.asked[1] == {"input": ["b"], "model": "tiny", "dimensions": 3, "task": {"x": None}, "user": "u"}


async def test_repeated_inputs_are_asked_once(embed: Embed, vectors: Vectors) -> None:
    answer = await embed(["a", "b", "a", "a"])
    assert vectors.inputs == [["a", "b"]]
    assert told(answer) == of("a", "b", "a", "a")
    assert (answer.outcome, status(answer)) == ("MISS", "nearhit; fwd=miss")
    # What the server would have said of all four.
    assert answer.json["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    again = await embed(["a", "b", "a", "a"])
    assert (again.outcome, again.json) == ("HIT", answer.json)


@pytest.mark.parametrize("given", ["one", ["one"], [1, 2, 3], [[1, 2, 3]], [[1], [2, 3], "text"], {"prompt": "x"}])
async def test_inputs_of_every_kind_are_known_the_second_time(embed: Embed, given: Any) -> None:
    first, second = await embed(given), await embed(given)
    assert (first.outcome, second.outcome, first.json) == ("MISS", "HIT", second.json)


@pytest.mark.parametrize("stored", ["float", "base64"])
async def test_both_forms_are_served_from_one_entry(embed: Embed, vectors: Vectors, stored: str) -> None:
    await embed(["a", "b"], encoding_format=stored)
    numbers, text = await embed(["a", "b"]), await embed(["b", "a"], encoding_format="base64")
    assert (numbers.outcome, text.outcome, len(vectors.asked)) == ("HIT", "HIT", 1)
    assert told(numbers) == of("a", "b")
    assert told(text) == [packed(vector_of("b")), packed(vector_of("a"))]


async def test_a_batch_of_the_other_form_is_completed_in_its_own(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"])
    answer = await embed(["b", "a"], encoding_format="base64")
    assert vectors.asked[1]["encoding_format"] == "base64"
    assert told(answer) == [packed(vector_of("b")), packed(vector_of("a"))]


async def test_numbers_beyond_32_bits_are_given_again_as_they_came(embed: Embed, vectors: Vectors) -> None:
    vectors.change = lambda asked, answered: {**answered, "data": [{"index": 0, "embedding": [0.1, 1e-9]}]}
    await embed("a")
    assert told(await embed("a")) == [[0.1, 1e-9]]
    assert told(await embed("a", encoding_format="base64")) == [packed([0.1, 1e-9])]


async def test_usage_adds_up(embed: Embed) -> None:
    first = await embed(["a", "bcd", "efghij"])
    second = await embed(["efghij", "a", "bcd"])
    assert second.json["usage"] == first.json["usage"] == {"prompt_tokens": 13, "total_tokens": 13}
    shares = [(await embed([text])).json["usage"]["prompt_tokens"] for text in ("a", "bcd", "efghij")]
    assert sum(shares) == 13
    partial = await embed(["a", "new"])
    assert partial.json["usage"]["prompt_tokens"] == shares[0] + 4


async def test_an_id_and_a_time_are_made_anew(embed: Embed, vectors: Vectors) -> None:
    vectors.change = lambda asked, answered: {"id": "embd-1", "created": 1, **answered}
    first, second, third = await embed("a"), await embed("a"), await embed("a")
    assert first.json["id"] == "embd-1"
    assert len({answer.json["id"] for answer in (first, second, third)}) == 3
    assert second.json["created"] > 1


async def test_what_is_kept_survives_a_restart(start: StartProxy, vectors: Vectors) -> None:
    first = await start()
    texts = [f"text {number}" for number in range(300)]
    await embedding(first)(texts)
    await first.services.buffer.flush()
    second = await start()
    answer = await embedding(second)([*texts, "new"])
    assert vectors.inputs[1:] == [["new"]]
    assert told(answer) == of(*texts, "new")
    assert (await embedding(second)(texts)).outcome == "HIT"


async def test_a_sealed_store_answers_too(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start(cache__store_words="digest")
    await embedding(proxy)(["a", "b"])
    await proxy.services.buffer.flush()
    proxy.services.hot.clear()
    answer = await embedding(proxy)(["b", "c"])
    assert (told(answer), vectors.inputs[1:]) == (of("b", "c"), [["c"]])


# --- what is not kept


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b'{"input":"a","input":"b"}',
        b'{"input":[]}',
        b'{"input":""}',
        b'{"input":["a",""]}',
        b'{"input":[1,"a"]}',
        b'{"input":[null]}',
        b'{"model":"tiny"}',
        b'{"input":"a","encoding_format":"int8"}',
        b'{"input":"a","cache":{"ttl":"soon"}}',
        b'{"input":"a","x":NaN}',
        b'{"input":"\xff"}',
        b"",
    ],
)
async def test_what_is_not_understood_goes_upstream_as_it_came(proxy: Proxy, model: FakeModel, body: bytes) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse | None:
        return error(422, "no", "invalid_request_error") if request.path == PATH else None

    model.extra = refuse
    for _ in range(2):
        answer = await proxy.post(PATH, data=body, headers={"Content-Type": "application/json"})
        assert (answer.status, answer.outcome) == (422, "BYPASS")
    assert [seen.body for seen in model.seen if seen.target == PATH and seen.body != b"{}"][-2:] == [body, body]


async def test_text_that_is_no_unicode_is_sent_on_in_parts_too(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"])
    answer = await embed(["\ud800", "a"])
    assert (vectors.inputs[1], answer.status, len(answer.json["data"])) == (["\ud800"], 200, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda asked, answered: b"not json",
        lambda asked, answered: [answered],
        lambda asked, answered: {**answered, "data": answered["data"][:1]},
        lambda asked, answered: {**answered, "data": answered["data"] * 2},
        lambda asked, answered: {**answered, "data": [{**one, "index": 0} for one in answered["data"]]},
        lambda asked, answered: {**answered, "data": [{**one, "embedding": []} for one in answered["data"]]},
        lambda asked, answered: {**answered, "data": [{**one, "embedding": [[1.0]]} for one in answered["data"]]},
        lambda asked, answered: {**answered, "error": {"message": "out of memory"}},
        lambda asked, answered: json.dumps(answered).replace("-1.0", "NaN").encode(),
        lambda asked, answered: json.dumps(answered).encode()[:-9],
    ],
)
async def test_an_answer_that_is_not_understood_is_passed_on_and_not_kept(
    embed: Embed, vectors: Vectors, change: Change
) -> None:
    vectors.change = change
    for _ in range(2):
        answer = await embed(["a", "b"])
        expected = change({}, answer_to({"input": ["a", "b"], "model": "tiny"}))
        assert answer.body == (expected if isinstance(expected, bytes) else json.dumps(expected).encode())
        assert answer.outcome == "MISS"
    assert vectors.inputs == [["a", "b"], ["a", "b"]]


async def test_a_reduced_answer_that_is_not_understood_brings_the_whole_request(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"])

    def only_whole(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        return answered if len(asked["input"]) == 2 else {"data": "?"}

    vectors.change = only_whole
    answer = await embed(["a", "b"])
    assert vectors.inputs[1:] == [["b"], ["a", "b"]]
    assert told(answer) == of("a", "b")
    assert (answer.outcome, status(answer)) == ("BYPASS", "nearhit; fwd=bypass; detail=not-shareable")


async def test_vectors_of_another_length_are_not_mixed(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"])

    def longer(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        return {**answered, "data": [{**one, "embedding": [1.0] * 5} for one in answered["data"]]}

    vectors.change = longer
    answer = await embed(["a", "b"])
    assert vectors.inputs[1:] == [["b"], ["a", "b"]]
    assert told(answer) == [[1.0] * 5, [1.0] * 5]


async def test_a_vector_of_zeros_is_given_and_not_kept(proxy: Proxy, embed: Embed, vectors: Vectors) -> None:
    def zero(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        for one in answered["data"][1:]:
            one["embedding"] = [0.0, 0.0, 0.0]
        return answered

    vectors.change = zero
    assert told(await embed(["a", "b"])) == [vector_of("a"), [0.0, 0.0, 0.0]]
    vectors.change = None
    assert told(await embed(["a", "b"])) == of("a", "b")
    assert vectors.inputs[1] == ["b"]
    assert value(proxy, "not_stored_total", reason="empty") == 1


@pytest.mark.parametrize("code", [400, 404, 413, 429, 500, 501, 503])
async def test_errors_pass_on_unchanged(start: StartProxy, vectors: Vectors, code: int) -> None:
    embed = embedding(await start(upstream__busy_retry_s=0))
    await embed(["a"])
    vectors.status = code
    for given in (["b", "c"], ["a", "b"], ["b", "b"]):
        answer = await embed(given)
        assert (answer.status, answer.outcome) == (code, "MISS")
        assert answer.json["error"]["message"] == "it went wrong"
    assert vectors.inputs[1:] == [["b", "c"], ["b"], ["b"]]
    vectors.status = 200
    assert told(await embed(["a", "b"])) == of("a", "b")


async def test_what_a_key_may_not_ask_is_told_as_the_upstream_tells_it(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"])
    vectors.status = 401
    for given in (["a", "b"], ["b", "b"]):
        answer = await embed(given)
        assert (answer.status, answer.json["error"]["message"]) == (401, "it went wrong")


async def test_an_upstream_that_hangs_up_is_told_as_elsewhere(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    await embed(["a"])
    vectors.hangs_up = True
    for given in (["a", "b"], ["c"], ["d", "d"]):
        answer = await embed(given)
        assert (answer.status, answer.outcome, answer.json["error"]["code"]) == (502, "MISS", "upstream_unreachable")
    vectors.held = True
    tasks = [asyncio.create_task(embed(["c", "d"], settle=False)) for _ in range(2)]
    await eventually(lambda: value(proxy, "joined_total") == 2)
    vectors.release.set()
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [502, 502]
    await proxy.settled()


async def test_other_paths_pass_through(proxy: Proxy, model: FakeModel) -> None:
    async def own(request: web.Request) -> web.StreamResponse | None:
        return web.json_response([{"index": 0, "embedding": [[1.0]]}]) if request.path == "/embeddings" else None

    model.extra = own
    for _ in range(2):
        answer = await proxy.post("/embeddings", json={"input": "a"})
        assert (answer.json, answer.outcome) == ([{"index": 0, "embedding": [[1.0]]}], "")
    assert [seen.target for seen in model.seen].count("/embeddings") == 2


# --- what a call may ask of the cache


async def test_no_store_neither_reads_nor_keeps(embed: Embed, vectors: Vectors) -> None:
    for _ in range(2):
        answer = await embed(["a"], headers={"Cache-Control": "no-store"})
        assert (answer.outcome, status(answer)) == ("BYPASS", "nearhit; fwd=bypass; detail=no-store")
    assert (await embed(["a"])).outcome == "MISS"


async def test_no_cache_asks_again_and_keeps(embed: Embed, vectors: Vectors) -> None:
    await embed(["a", "b"])
    answer = await embed(["a", "b"], headers={"Cache-Control": "no-cache"})
    assert (answer.outcome, status(answer)) == ("MISS", "nearhit; fwd=request")
    answer = await embed(["a", "b"], cache={"no-cache": True})
    assert vectors.asked[2] == {"input": ["a", "b"], "model": "tiny"}
    assert (await embed(["a", "b"])).outcome == "HIT"


async def test_only_if_cached_is_refused_unless_all_is_known(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"])
    only = {"Cache-Control": "only-if-cached"}
    known, partial, nothing = await embed(["a"], headers=only), await embed(["a", "b"], headers=only), None
    nothing = await embed("c", headers=only)
    assert (known.outcome, known.status) == ("HIT", 200)
    for answer in (partial, nothing):
        assert (answer.status, answer.json["error"]["code"]) == (504, "only_if_cached")
        assert status(answer) == "nearhit; detail=only-if-cached"
    assert vectors.inputs == [["a"]]


async def test_max_age_is_looked_at_for_each_input(start: StartProxy, vectors: Vectors) -> None:
    embed = embedding(await start())
    await embed(["a"])
    answer = await embed(["a", "b"], headers={"Cache-Control": "max-age=3600"})
    assert status(answer) == "nearhit; fwd=partial"
    answer = await embed(["a", "b"], headers={"Cache-Control": "min-fresh=400000"})
    assert (answer.outcome, status(answer), vectors.inputs[-1]) == ("MISS", "nearhit; fwd=request", ["a", "b"])


async def test_a_ttl_of_zero_keeps_nothing(proxy: Proxy, embed: Embed, vectors: Vectors) -> None:
    await embed(["a"], cache={"ttl": 0})
    assert (await embed(["a"])).outcome == "MISS"
    assert value(proxy, "stored_total") == 1


async def test_rooms_of_the_cache_object_are_apart(embed: Embed, vectors: Vectors) -> None:
    await embed(["a"], cache={"namespace": "mine"})
    assert (await embed(["a"])).outcome == "MISS"
    assert (await embed(["a"], cache={"namespace": "mine"})).outcome == "HIT"
    assert all("cache" not in asked for asked in vectors.asked)


async def test_the_cache_may_be_off(start: StartProxy, vectors: Vectors) -> None:
    embed = embedding(await start(cache__mode="off"))
    for _ in range(2):
        assert (await embed(["a"])).outcome == "BYPASS"


@pytest.mark.parametrize("sampled", ["bypass", "exact"])
async def test_vectors_are_never_sampled(start: StartProxy, vectors: Vectors, sampled: str) -> None:
    proxy = await start(cache__sampled=sampled, cache__retry_window_s=60.0, cache__variants=3)
    embed = embedding(proxy)
    await embed(["a"])
    assert (await embed(["a"])).outcome == "HIT"


# --- several at a time


async def test_equal_batches_share_one_request(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    vectors.held = True
    tasks = [asyncio.create_task(embed(["a", "b"], settle=False)) for _ in range(5)]
    await eventually(lambda: value(proxy, "joined_total") == 8)
    vectors.release.set()
    answers = await asyncio.gather(*tasks)
    assert vectors.inputs == [["a", "b"]]
    assert sorted(answer.outcome for answer in answers) == ["JOINED"] * 4 + ["MISS"]
    assert {status(answer) for answer in answers if answer.outcome == "JOINED"} == {"nearhit; fwd=miss; collapsed"}
    assert all(told(answer) == of("a", "b") for answer in answers)
    await proxy.settled()


async def test_batches_that_share_inputs_ask_each_once(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    await embed(["known"])
    vectors.held = True
    first = asyncio.create_task(embed(["a", "b"], settle=False))
    await eventually(lambda: vectors.started == 2)
    second = asyncio.create_task(embed(["b", "c", "known"], settle=False, encoding_format="base64"))
    await eventually(lambda: vectors.started == 3)
    third = asyncio.create_task(embed(["c", "a", "known"], settle=False))
    await eventually(lambda: value(proxy, "joined_total") == 3)
    vectors.release.set()
    one, two, three = await asyncio.gather(first, second, third)
    assert vectors.inputs[1:] == [["a", "b"], ["c"]]
    assert told(one) == of("a", "b")
    assert told(two) == [packed(vector_of(text)) for text in ("b", "c", "known")]
    assert told(three) == of("c", "a", "known")
    assert [answer.outcome for answer in (one, two, three)] == ["MISS", "MISS", "JOINED"]
    assert status(three) == "nearhit; fwd=partial; collapsed"
    assert three.headers["X-Nearhit-Items"] == "1/3"
    await proxy.settled()


async def test_a_leader_that_leaves_does_not_take_it_away_from_others(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    vectors.held = True
    leader = asyncio.create_task(embed(["a", "b"], settle=False))
    await eventually(lambda: vectors.started == 1)
    follower = asyncio.create_task(embed(["b"], settle=False))
    await eventually(lambda: value(proxy, "joined_total") == 1)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    vectors.release.set()
    assert told(await follower) == of("b")
    await proxy.settled()
    assert (vectors.gone, (await embed(["a"])).outcome) == (0, "HIT")


@pytest.mark.parametrize("given", [["a", "b"], ["a", "known"], ["a", "a"]])
async def test_the_last_to_leave_ends_the_request(proxy: Proxy, vectors: Vectors, given: list[str]) -> None:
    embed = embedding(proxy)
    await embed(["known"])
    vectors.held = True
    tasks = [asyncio.create_task(embed(given, settle=False)) for _ in range(3)]
    await eventually(lambda: value(proxy, "joined_total") >= 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await eventually(lambda: vectors.gone == 1)
    await proxy.settled()
    assert vectors.started == 2


async def test_a_failure_is_that_of_all_who_wait(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    vectors.held, vectors.status = True, 500
    tasks = [asyncio.create_task(embed(given, settle=False)) for given in (["a", "b"], ["a", "b", "c"], ["b", "a"])]
    await eventually(lambda: value(proxy, "joined_total") == 4)
    vectors.release.set()
    answers = await asyncio.gather(*tasks)
    assert {(answer.status, answer.json["error"]["message"]) for answer in answers} == {(500, "it went wrong")}
    assert sorted(vectors.inputs) == [["a", "b"], ["c"]]
    await proxy.settled()


async def test_what_is_wrong_with_one_input_fails_no_batch_without_it(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    vectors.held = True

    def picky(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        if "bad" in asked["input"]:
            raise web.HTTPBadRequest(text='{"error": "bad"}')
        return answered

    vectors.change = picky
    first = asyncio.create_task(embed(["bad", "a"], settle=False))
    await eventually(lambda: vectors.started == 1)
    second = asyncio.create_task(embed(["a", "b"], settle=False))
    await eventually(lambda: vectors.started == 2)
    vectors.release.set()
    one, two = await asyncio.gather(first, second)
    assert (one.status, two.status) == (400, 200)
    assert told(two) == of("a", "b")
    assert two.outcome == "MISS"
    await proxy.settled()


async def test_followers_may_ask_again_after_a_failure(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start(cache__join_failures="retry")
    embed = embedding(proxy)
    vectors.held = True

    def once(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        vectors.change = None
        raise web.HTTPInternalServerError(text='{"error": "once"}')

    vectors.change = once
    first = asyncio.create_task(embed(["a"], settle=False))
    await eventually(lambda: vectors.started == 1)
    second = asyncio.create_task(embed(["a"], settle=False))
    await eventually(lambda: value(proxy, "joined_total") == 1)
    vectors.release.set()
    one, two = await asyncio.gather(first, second)
    assert (one.status, two.status, two.outcome) == (500, 200, "MISS")
    assert vectors.inputs == [["a"], ["a"]]
    await proxy.settled()


async def test_nobody_waits_for_another_for_too_long(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start(cache__join_timeout_s=0.05)
    embed = embedding(proxy)
    vectors.held = True
    first = asyncio.create_task(embed(["a", "x"], settle=False))
    await eventually(lambda: vectors.started == 1)
    second = asyncio.create_task(embed(["a"], settle=False))
    await eventually(lambda: vectors.started == 2)
    vectors.release.set()
    assert [answer.outcome for answer in await asyncio.gather(first, second)] == ["MISS", "MISS"]
    assert vectors.inputs == [["a", "x"], ["a"]]
    await proxy.settled()


@pytest.mark.parametrize("code", [401, 403, 429])
async def test_what_is_said_to_one_caller_is_not_said_to_another(proxy: Proxy, vectors: Vectors, code: int) -> None:
    embed = embedding(proxy)
    vectors.held, vectors.status = True, code
    first = asyncio.create_task(embed(["a"], settle=False))
    await eventually(lambda: vectors.started == 1)
    second = asyncio.create_task(embed(["a"], settle=False))
    await eventually(lambda: value(proxy, "joined_total") == 1)
    vectors.release.set()
    await asyncio.gather(first, second)
    assert vectors.inputs == [["a"], ["a"]]
    await proxy.settled()


async def test_uncacheable_answers_make_nobody_wait_in_a_row(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    vectors.held = True
    vectors.change = lambda asked, answered: {"data": "?"}
    tasks = [asyncio.create_task(embed(["a"], settle=False)) for _ in range(4)]
    await eventually(lambda: value(proxy, "joined_total") == 3)
    vectors.release.set()
    answers = await asyncio.gather(*tasks)
    assert all(answer.json == {"data": "?"} for answer in answers)
    vectors.release.clear()
    # From now on, all are under way at a time.
    tasks = [asyncio.create_task(embed(["a"], settle=False)) for _ in range(3)]
    started = vectors.started
    await eventually(lambda: vectors.started >= started and proxy.services.backends.first.batches.in_flight == 3)
    vectors.release.set()
    await asyncio.gather(*tasks)
    assert value(proxy, "joined_total") == 3
    await proxy.settled()


async def test_no_cache_never_joins(proxy: Proxy, vectors: Vectors) -> None:
    embed = embedding(proxy)
    vectors.held = True
    first = asyncio.create_task(embed(["a"], settle=False))
    await eventually(lambda: vectors.started == 1)
    second = asyncio.create_task(embed(["a"], settle=False, headers={"Cache-Control": "no-cache"}))
    await eventually(lambda: vectors.started == 2)
    vectors.release.set()
    assert {answer.outcome for answer in await asyncio.gather(first, second)} == {"MISS"}
    await proxy.settled()


async def test_many_overlapping_batches_ask_each_input_once_and_all_get_their_own(
    proxy: Proxy, vectors: Vectors
) -> None:
    embed, chance = embedding(proxy), random.Random(7)
    vectors.held = True
    texts = [f"text {number}" for number in range(40)]
    wanted = [chance.choices(texts, k=chance.randint(1, 12)) for _ in range(60)]
    tasks = [asyncio.create_task(embed(given, settle=False)) for given in wanted]
    asked = {text for given in wanted for text in given}
    await eventually(lambda: sum(map(len, vectors.inputs)) == len(asked))
    for task in tasks[::7]:
        task.cancel()
    vectors.release.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    for number, (given, answer) in enumerate(zip(wanted, answers, strict=True)):
        if number % 7:
            assert isinstance(answer, Answer)
            assert told(answer) == of(*given)
    await proxy.settled()
    once = [text for given in vectors.inputs for text in given]
    assert len(once) == len(set(once)) == len(asked)


# --- whose vectors they are


async def test_callers_with_their_own_keys_share_nothing(start: StartProxy, model: FakeModel, vectors: Vectors) -> None:
    proxy = await start(sharing="per-credential")
    embed = embedding(proxy)
    keys = [{"Authorization": f"Bearer {name}"} for name in ("one", "two")]
    for key in keys:
        assert (await embed(["a"], headers=key)).outcome == "MISS"
    for key in keys:
        assert (await embed(["a"], headers=key)).outcome == "HIT"
    assert len(vectors.asked) == 2


async def test_a_key_that_the_upstream_refuses_reads_nothing(
    start: StartProxy, model: FakeModel, vectors: Vectors
) -> None:
    async def checked(request: web.Request) -> web.StreamResponse | None:
        known = request.headers.get("Authorization") == "Bearer right"
        return await vectors.serve(request) if known else error(401, "Invalid API Key", "authentication_error")

    model.extra = checked
    proxy = await start(sharing="shared", upstream__api_key="right")
    embed = embedding(proxy)
    right, wrong = {"Authorization": "Bearer right"}, {"Authorization": "Bearer wrong"}
    await embed(["a"], headers=right)
    await embed(["a"], headers=right)
    refused = await embed(["a"], headers=wrong)
    assert (refused.outcome, refused.status) == ("MISS", 401)


async def test_a_model_that_changes_meanwhile_is_not_mixed_with_the_old_one(
    start: StartProxy, model: FakeModel, vectors: Vectors
) -> None:
    model.props = props()
    proxy = await start()
    embed = embedding(proxy)
    await embed(["a"])

    def swap(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        model.props = props("run-2", "/b.gguf")
        return {**answered, "data": [{**one, "embedding": [7.0, 7.0, 7.0]} for one in answered["data"]]}

    vectors.change = swap
    answer = await embed(["a", "b"])
    assert told(answer) == [[7.0] * 3, [7.0] * 3]
    assert vectors.inputs[1:] == [["b"], ["a", "b"]]
    await eventually(lambda: proxy.services.backends.first.tracker.current.confirmed)
    # What it said meanwhile was kept for neither.
    assert (await embed(["b"])).outcome == "MISS"


# --- when time has passed, and when the upstream fails


async def outlived(embed: Embed, text: str) -> None:
    """Have a vector kept whose time is over."""
    await embed([text], cache={"ttl": 0.001})
    await asyncio.sleep(0.02)


async def test_stale_vectors_stand_in_for_a_failing_server(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start(upstream__busy_retry_s=0)
    embed = embedding(proxy)
    await outlived(embed, "old")
    await embed(["fresh"])
    vectors.status = 500
    for given in (["old"], ["old", "fresh"], ["old", "old"]):
        answer = await embed(given)
        assert (answer.status, answer.outcome) == (200, "STALE")
        assert told(answer) == of(*given)
        assert "fwd-status=500; detail=stale" in status(answer)
    assert (await embed(["old", "new"])).status == 500
    assert (await embed(["old"], headers={"Cache-Control": "stale-if-error=0"})).status == 500
    vectors.status = 200
    assert (await embed(["old", "fresh"])).outcome == "MISS"


async def test_a_client_may_take_stale_vectors(embed: Embed, vectors: Vectors) -> None:
    await outlived(embed, "old")
    answer = await embed(["old"], headers={"Cache-Control": "max-stale"})
    assert (answer.outcome, len(vectors.asked)) == ("STALE", 1)
    assert status(answer).endswith("detail=stale")


async def test_stale_vectors_are_given_while_new_ones_are_fetched(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start(cache__stale_while_revalidate_s=600)
    embed = embedding(proxy)
    await outlived(embed, "old")
    answer = await embed(["old"])
    assert (answer.outcome, vectors.inputs) == ("STALE", [["old"], ["old"]])
    assert (await embed(["old"])).outcome == "HIT"


# --- what is counted


async def test_everything_is_counted_by_item(proxy: Proxy, embed: Embed) -> None:
    await embed(["a", "b"])
    await embed(["a", "b", "c", "a"])
    await embed(["a"], headers={"Cache-Control": "no-store"})
    await embed(["c"])
    assert value(proxy, "stored_total") == 3
    assert value(proxy, "hits_total", tier="exact") == 3
    assert value(proxy, "misses_total", reason="absent") == 3
    assert value(proxy, "saved_tokens_total", kind="prompt") == 6
    assert value(proxy, "bypass_total", reason="no-store") == 1
    counted = {o: value(proxy, "requests_total", endpoint="embeddings", outcome=o) for o in ("MISS", "HIT", "BYPASS")}
    assert counted == {"MISS": 2, "HIT": 1, "BYPASS": 1}


async def test_entries_can_be_listed_exported_and_imported(
    start: StartProxy, vectors: Vectors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    proxy = await start()
    await embedding(proxy)(["a", "b"])
    listed = await proxy.send("GET", "/-/entries?endpoint=embeddings")
    assert len(listed.json["entries"]) == 2
    exported = await proxy.send("GET", "/-/export")
    lines = exported.body.splitlines()
    assert (await proxy.post("/-/purge", json={"endpoint": "embeddings"})).json["removed"] == 2
    assert (await embedding(proxy)(["a"])).outcome == "MISS"
    await proxy.post("/-/purge", json={"all": True})
    imported = await proxy.post("/-/import", data=exported.body)
    assert imported.json["imported"] == 2
    assert (await embedding(proxy)(["b", "a"])).outcome == "HIT"
    broken = json.loads(lines[1])
    broken["answer"]["data"][0]["embedding"] = "!"
    refused = await proxy.post("/-/import", data=json.dumps(broken).encode() + b"\n")
    assert refused.status == 400


async def test_a_damaged_entry_is_a_miss(proxy: Proxy, embed: Embed, vectors: Vectors) -> None:
    from dataclasses import replace

    await embed(["a", "b"])
    services = proxy.services
    await services.buffer.flush()
    page = (await proxy.send("GET", "/-/entries?endpoint=embeddings")).json["entries"]
    entry = (await services.store.find(bytes.fromhex(page[0]["id"]), 1))[0]
    services.hot.clear()
    services.buffer.put(replace(entry, answer=b"{}"))
    answer = await embed(["a", "b"])
    assert (told(answer), status(answer)) == (of("a", "b"), "nearhit; fwd=partial")
    assert len(vectors.inputs[1]) == 1


async def test_what_is_being_kept_is_not_asked_again_though_memory_is_too_small_for_it(
    start: StartProxy, vectors: Vectors
) -> None:
    proxy = await start(cache__hot_bytes=0)
    embed = embedding(proxy)
    texts = [f"text {number}" for number in range(400)]
    await embed(texts, settle=False)
    answers = [await embed(texts, settle=False) for _ in range(3)]
    assert [told(answer) for answer in answers] == [of(*texts)] * 3
    assert len(vectors.asked) == 1
    await proxy.settled()


async def test_a_large_batch_holds_nobody_up(start: StartProxy, vectors: Vectors) -> None:
    proxy = await start()
    embed = embedding(proxy)
    texts = [f"text {number}" for number in range(2048)]
    await embed(texts)
    await proxy.services.buffer.flush()
    proxy.services.hot.clear()
    answer, other = await asyncio.gather(embed(texts), proxy.send("GET", "/-/healthy"))
    assert (answer.outcome, other.status, len(vectors.asked)) == ("HIT", 200, 1)
    assert told(answer) == of(*texts)


async def test_a_browser_gets_the_fields_that_the_upstream_would_send(
    proxy: Proxy, model: FakeModel, vectors: Vectors
) -> None:
    embed = embedding(proxy)
    model.cors = True
    origin = {"Origin": "http://page.example"}
    for given in (["a"], ["a"], ["a", "b"]):
        answer = await embed(given, headers=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == "http://page.example", answer.outcome
