"""Servers for Rockchip NPUs behind nearhit: what it does for them, what it keeps of them, and what it never does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from proxy.upstream.rockchipllama import RockchipLlama as Adapter
from proxy.upstream.rockchipllama_prefixes import NamedCaches
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.emulators import Npu
from tests.emulators.asking import SYSTEM
from tests.emulators.rkllama import TIMEOUT_TEXT, Rkllama, rkllama
from tests.emulators.rkllm_flask import BUSY, RkllmFlask, rkllm_flask
from tests.emulators.rockchipllama import QWEN, TINY, RockchipLlama, rockchipllama
from tests.web.test_exact_tier import said
from tests.web.test_near import ALIKE, ASKED

AnyServer = RockchipLlama | Rkllama | RkllmFlask
SERVERS: dict[str, Callable[[], AbstractAsyncContextManager[AnyServer]]] = {
    "rockchipllama": rockchipllama,
    "rkllama": rkllama,
    "rkllm_flask": rkllm_flask,
}
NO_STORE = {"Cache-Control": "no-store"}
LLAMA = "qwen3:0.6b"
"""A model of rkllama's."""


@pytest.fixture
async def rock() -> AsyncIterator[RockchipLlama]:
    async with rockchipllama() as server:
        yield server


@pytest.fixture
async def house(start: StartProxy, rock: RockchipLlama) -> Proxy:
    """nearhit in front of a RockchipLlama."""
    return await start(url=rock.url, cache__mode="exact")


@pytest.fixture
async def llama() -> AsyncIterator[Rkllama]:
    async with rkllama() as server:
        yield server


@pytest.fixture
async def farm(start: StartProxy, llama: Rkllama) -> Proxy:
    """nearhit in front of an rkllama that has a whole answer behind it."""
    proxy = await start(url=llama.url, cache__mode="exact")
    await ask(proxy, "a whole one", model=LLAMA)
    return proxy


@pytest.fixture
async def demo() -> AsyncIterator[RkllmFlask]:
    async with rkllm_flask() as server:
        yield server


async def ask(proxy: Proxy, content: str, **fields: Any) -> str:
    """Ask until the answer was kept or not; the outcome."""
    answer = await proxy.chat(content, **fields)
    assert answer.status == 200, answer.body
    await proxy.settled()
    return answer.outcome


def hold(npu: Npu, free: int = 1) -> None:
    """From now on, runs stop after so many tokens until they are let go on."""
    npu.free = free
    npu.go.clear()


def asking(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


async def leave(proxy: Proxy, path: str, body: dict[str, Any], **kwargs: Any) -> None:
    """Begin to read a stream, and hang up."""
    async with proxy.session.post(proxy.url + path, json={**body, "stream": True}, **kwargs) as response:
        assert await response.content.readany()
        response.close()


async def told(proxy: Proxy) -> dict[str, Any]:
    upstream: dict[str, Any] = (await proxy.stats())["upstream"]
    return upstream


def paths(server: AnyServer) -> list[str]:
    """The POSTs that reached it."""
    return [asked.path for asked in server.asked if asked.method == "POST"]


def at_length(pieces: int, text: str = "ab ") -> Callable[[str], Sequence[str]]:
    return lambda _prompt: [text] * pieces


@pytest.mark.parametrize("setting", ["auto", "fixed"])
@pytest.mark.parametrize("kind", SERVERS)
async def test_the_kind_is_found_or_given_and_one_call_is_made_at_a_time(
    start: StartProxy, kind: str, setting: str
) -> None:
    async with SERVERS[kind]() as server:
        given = "auto" if setting == "auto" else kind
        proxy = await start(url=server.url, upstream__kind=given, cache__mode="exact")
        seen = await told(proxy)
        assert (seen["kind"], seen["standing"], seen["queue"]["places"]) == (kind, "confirmed", 1)


async def test_a_kind_found_once_is_known_before_the_server_is_back(tmp_path: Path) -> None:
    async with rockchipllama() as server:
        settings = settings_for(tmp_path, server.url, cache__mode="exact")
        async with running_proxy(settings):
            pass
    async with running_proxy(settings) as proxy:
        seen = await told(proxy)
        assert (seen["kind"], seen["queue"]["places"]) == ("rockchipllama", 1)


# RockchipLlama: the model that is loaded


async def test_whatever_a_client_names_the_loaded_model_is_sent(house: Proxy, rock: RockchipLlama) -> None:
    named: list[dict[str, Any]] = [{"model": "gpt-4o"}, {"model": TINY.name}, {}]
    for one in named:
        for headers in ({}, NO_STORE):
            await house.chat("hi", headers=headers, **one)
            await house.post("/v1/completions", json={"prompt": "raw", **one}, headers=headers)
    await house.settled()
    sent = [body["model"] for path in ("/v1/chat/completions", "/v1/completions") for body in rock.bodies(path)]
    assert sent == [QWEN.name] * 12


async def test_while_nothing_is_loaded_nothing_is_kept(start: StartProxy, rock: RockchipLlama) -> None:
    rock.loaded = None
    proxy = await start(url=rock.url, cache__mode="exact", upstream__poll_s=3600)
    answer = await proxy.chat("hi", model=TINY.name)
    assert (answer.status, answer.outcome) == (200, "BYPASS")
    assert "no-fingerprint" in answer.headers["Cache-Status"]
    await proxy.services.backends.first.tracker.look()
    # The first call has loaded what it named.
    assert (await told(proxy))["standing"] == "confirmed"
    assert [await ask(proxy, "hi", model=TINY.name) for _ in range(2)] == ["MISS", "HIT"]


async def test_once_it_is_unloaded_a_client_names_what_is_loaded_next(house: Proxy, rock: RockchipLlama) -> None:
    assert [await ask(house, "hi", model=QWEN.name) for _ in range(2)] == ["MISS", "HIT"]
    assert (await house.post("/v1/models/unload", json={})).json["success"]
    await house.services.backends.first.tracker.look()
    assert await ask(house, "other", model=TINY.name) != "HIT"
    assert rock.bodies("/v1/chat/completions")[-1]["model"] == TINY.name
    assert rock.loaded == TINY.name


async def test_nothing_of_the_old_model_is_served_once_another_was_loaded(
    start: StartProxy, rock: RockchipLlama
) -> None:
    # Nobody looks by himself in the meantime.
    proxy = await start(url=rock.url, cache__mode="exact", upstream__poll_s=3600)
    assert [await ask(proxy, "hi") for _ in range(2)] == ["MISS", "HIT"]
    assert (await proxy.post("/v1/models/load", json={"model": TINY.name})).json["loaded"]
    assert await ask(proxy, "hi") != "HIT"
    assert rock.bodies("/v1/chat/completions")[-1]["model"] == TINY.name
    assert [await ask(proxy, "hi", x=1) for _ in range(2)] == ["MISS", "HIT"]


async def chunked(body: dict[str, Any]) -> AsyncIterator[bytes]:
    text = json.dumps(body).encode()
    for at in range(0, len(text), 5):
        yield text[at : at + 5]
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/models/load", "whole"),
        ("/v1/models/%6Coad", "chunked"),
        ("/v1/models/load?x=1", "untyped"),
        ("/v1/models/load", "chunked"),
    ],
)
async def test_another_model_is_loaded_after_the_first_was_unloaded(
    house: Proxy, rock: RockchipLlama, path: str, form: str
) -> None:
    body = {"model": TINY.name}
    sent: dict[str, dict[str, Any]] = {
        "whole": {"json": body},
        "chunked": {"data": chunked(body)},
        "untyped": {"data": json.dumps(body).encode(), "headers": {"Content-Type": "text/plain"}},
    }
    async with house.session.post(URL(house.url + path, encoded=True), **sent[form]) as response:
        assert (response.status, (await response.json())["model_name"]) == (200, TINY.name)
    assert paths(rock) == ["/v1/models/unload", "/v1/models/load"]
    assert (rock.loaded, rock.deadlocked) == (TINY.name, False)
    assert await ask(house, "hi") in ("MISS", "BYPASS")


async def test_loading_waits_for_the_call_under_way(house: Proxy, rock: RockchipLlama) -> None:
    hold(rock.npu)
    call = asyncio.create_task(house.chat("first", stream=True))
    await eventually(lambda: rock.npu.active == 1)
    load = asyncio.create_task(house.post("/v1/models/load", json={"model": TINY.name}))
    behind = asyncio.create_task(house.chat("second"))
    await eventually(lambda: house.services.backends.first.lane.waiting == 2)
    assert (paths(rock), rock.loaded) == (["/v1/chat/completions"], QWEN.name)
    rock.npu.go.set()
    answers = await asyncio.gather(call, load, behind)
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert (rock.loaded, rock.deadlocked) == (TINY.name, False)
    await house.settled()


async def test_an_answer_that_the_old_model_gave_is_not_served_after_the_new_one_is_loaded(
    house: Proxy, rock: RockchipLlama
) -> None:
    hold(rock.npu)
    call = asyncio.create_task(house.chat("first"))
    await eventually(lambda: rock.npu.active == 1)
    load = asyncio.create_task(house.post("/v1/models/load", json={"model": TINY.name}))
    await eventually(lambda: house.services.backends.first.lane.waiting == 1)
    rock.npu.go.set()
    await asyncio.gather(call, load)
    await house.settled()
    assert await ask(house, "first") != "HIT"


async def test_a_model_that_it_does_not_have_costs_nobody_the_one_that_is_loaded(
    house: Proxy, rock: RockchipLlama
) -> None:
    answer = await house.post("/v1/models/load", json={"model": "nope"})
    assert (answer.status, answer.json["detail"]) == (500, "Failed to load model: Model not found: nope")
    assert (rock.loaded, rock.deadlocked) == (QWEN.name, False)


# RockchipLlama: clients that leave


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", asking("left", temperature=0)), ("/v1/completions", {"prompt": "left"})]
)
async def test_an_answer_whose_client_left_is_read_to_its_end_and_kept(
    house: Proxy, rock: RockchipLlama, path: str, body: dict[str, Any]
) -> None:
    hold(rock.npu)
    await leave(house, path, body)
    following = asyncio.create_task(house.chat("next"))
    await eventually(lambda: house.services.backends.first.lane.waiting == 1)
    assert rock.npu.active == 1
    rock.npu.go.set()
    answer = await following
    assert (answer.status, answer.outcome) == (200, "MISS")
    await house.settled()
    assert [run.said for run in rock.npu.runs] == [list(run.tokens) for run in rock.npu.runs]
    again = await house.post(path, json={**body, "stream": True})
    assert (again.outcome, len(rock.npu.runs)) == ("HIT", 2)


@pytest.mark.parametrize(
    ("path", "headers", "form"),
    [
        ("/api/chat", {}, "at once"),
        ("/api/chat", {}, "chunked"),
        ("/api/chat", {}, "after its head"),
        ("/v1/completions", NO_STORE, "at once"),
        ("/v1/chat/completions", NO_STORE, "chunked"),
    ],
)
async def test_what_is_passed_on_is_read_to_its_end_likewise(
    house: Proxy, rock: RockchipLlama, path: str, headers: dict[str, str], form: str
) -> None:
    body = asking("left", prompt="left")
    hold(rock.npu)
    _, writer = await asyncio.open_connection(*house.url.removeprefix("http://").split(":"))
    text = json.dumps(body).encode()
    length = "Transfer-Encoding: chunked" if form == "chunked" else f"Content-Length: {len(text)}"
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n{fields}{length}\r\n\r\n".encode()
    text = b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text) if form == "chunked" else text
    for piece in [head + text] if form == "at once" else [head, text]:
        writer.write(piece)
        await writer.drain()
        # Where the head comes alone, as with many clients.
        await asyncio.sleep(0.02)
    await eventually(lambda: rock.npu.active == 1)
    writer.close()
    await writer.wait_closed()
    following = asyncio.create_task(house.chat("next"))
    await eventually(lambda: house.services.backends.first.lane.waiting == 1)
    rock.npu.go.set()
    answer = await following
    assert (answer.status, len(rock.npu.runs)) == (200, 2)
    assert rock.npu.runs[0].said == list(rock.npu.runs[0].tokens)
    await house.settled()


async def test_a_client_that_leaves_while_it_sends_is_no_call(house: Proxy, rock: RockchipLlama) -> None:
    _, writer = await asyncio.open_connection(*house.url.removeprefix("http://").split(":"))
    writer.write(b"POST /api/chat HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: not house.services.in_flight and not house.services.backends.first.lane.working)
    assert await ask(house, "next") == "MISS"
    assert len(rock.npu.runs) == 1


# RockchipLlama: what is kept


async def test_later_turns_pass_by_and_first_ones_are_kept(house: Proxy, rock: RockchipLlama) -> None:
    turns = [("user", "hi"), ("assistant", "Hello."), ("user", "and now?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for _ in range(2):
        answer = await house.chat(messages=messages)
        assert (answer.outcome, "detail=multi-turn" in answer.headers["Cache-Status"]) == ("BYPASS", True)
    assert [await ask(house, "hi") for _ in range(2)] == ["MISS", "HIT"]
    assert len(rock.npu.runs) == 3


async def test_with_temperature_zero_it_samples_all_the_same(start: StartProxy, rock: RockchipLlama) -> None:
    proxy = await start(url=rock.url, cache__mode="exact", cache__sampled="bypass")
    answer = await proxy.chat("hi", temperature=0, seed=1)
    assert (answer.outcome, "detail=sampled" in answer.headers["Cache-Status"]) == ("BYPASS", True)


async def test_an_answer_at_the_silent_limit_answers_the_same_call_only(start: StartProxy, rock: RockchipLlama) -> None:
    proxy = await start(url=rock.url)
    await eventually(lambda: proxy.services.near is not None)
    whole = rock.answer
    rock.answer = at_length(600)
    for form in ({"stream": True}, {"stream": False, "x": 1}):
        assert [await ask(proxy, words, **form) for words in (ASKED, ALIKE, ASKED)] == ["MISS", "MISS", "HIT"]
    assert {len(run.said) for run in rock.npu.runs} == {512}
    # Whole ones, and those that were cut where whoever asks wants it, answer other words.
    rock.answer = whole
    for limit in ({"x": 2}, {"max_tokens": 2}):
        assert [await ask(proxy, words, stream=True, **limit) for words in (ASKED, ALIKE)] == ["MISS", "NEAR"]


@pytest.mark.parametrize(
    ("fault", "stream", "reason"),
    [("breaks", True, "error-in-stream"), ("run_error", False, "empty"), ("run_error", True, "empty")],
)
async def test_what_broke_off_is_not_kept(
    house: Proxy, rock: RockchipLlama, fault: str, stream: bool, reason: str
) -> None:
    setattr(rock, fault, True)
    for _ in range(2):
        assert await ask(house, "hi", stream=stream) == "MISS"
    assert (await house.stats())["not_stored"] == {reason: 2}
    setattr(rock, fault, False)
    assert [await ask(house, "hi", stream=stream) for _ in range(2)] == ["MISS", "HIT"]


@pytest.mark.parametrize(("cached", "outcomes"), [("off", ["BYPASS", "BYPASS"]), ("on", ["MISS", "HIT"])])
async def test_the_operator_may_know_better_what_to_keep(
    start: StartProxy, rock: RockchipLlama, cached: str, outcomes: list[str]
) -> None:
    proxy = await start(url=rock.url, cache__mode="exact", upstream__cached=cached)
    assert [await ask(proxy, "hi") for _ in range(2)] == outcomes
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    assert [await ask(proxy, "", messages=messages) for _ in range(2)] == outcomes


# RockchipLlama: its caches


async def with_cache(start: StartProxy, rock: RockchipLlama, **options: Any) -> Proxy:
    """nearhit with a prefix that the server keeps; what that saves is measured by the server's own clock."""
    proxy = await start(url=rock.url, cache__mode="exact", upstream__kind="rockchipllama", **options)
    adapter = proxy.services.backends.first.tracker.adapter
    assert isinstance(adapter, Adapter)
    adapter.caches = NamedCaches(clock=lambda: rock.npu.now)
    made = await proxy.post(f"/v1/cache/{QWEN.name}", json={"cache_name": "shop", "prompt": SYSTEM})
    assert made.status == 200, made.body
    assert rock.caches[QWEN.name]
    return proxy


def client_calls(rock: RockchipLlama) -> list[dict[str, Any]]:
    """What was sent for clients; measuring asks for one token."""
    return [body for body in rock.bodies("/v1/chat/completions") if body.get("max_tokens") != 1]


async def ask_shop(proxy: Proxy, question: str, **fields: Any) -> Answer:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    answer = await proxy.chat(messages=messages, **fields)
    await proxy.settled()
    return answer


async def test_a_cache_is_not_mentioned_before_it_was_proved(start: StartProxy, rock: RockchipLlama) -> None:
    proxy = await with_cache(start, rock)
    name = next(iter(rock.caches[QWEN.name]))
    # What the server says of a client's own use proves nothing.
    claimed = await ask_shop(proxy, "one?", use_cache=name)
    assert claimed.json["usage"]["cache_hit"] is True
    for question in ("two?", "three?"):
        await ask_shop(proxy, question)
    assert ["use_cache" in body for body in client_calls(rock)] == [True, False, False]
    assert len(rock.npu.runs) == 3


async def measured(proxy: Proxy) -> dict[str, Any]:
    """The prefix, once it is known whether it helps."""
    async with asyncio.timeout(60):
        while True:
            (row,) = (await proxy.send("GET", f"/v1/cache/{QWEN.name}")).json["data"]
            if row["effective"] is not None:
                return dict(row)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("reuses", [True, False])
async def test_measuring_decides_whether_it_is_mentioned(start: StartProxy, rock: RockchipLlama, reuses: bool) -> None:
    rock.reuses = reuses
    proxy = await with_cache(start, rock, prefixes__seed_idle_s=0)
    assert (await measured(proxy))["state"] == ("seeded" if reuses else "ineffective")
    assert len(rock.npu.runs) == 6
    answer = await ask_shop(proxy, "what?", model="gpt-4o")
    (sent,) = client_calls(rock)
    assert (answer.status, answer.outcome, sent["model"]) == (200, "MISS", QWEN.name)
    assert sent["messages"][0]["content"] == SYSTEM
    assert ("use_cache" in sent) is reuses


async def test_another_model_never_gets_the_cache(start: StartProxy, rock: RockchipLlama) -> None:
    rock.reuses = True
    proxy = await with_cache(start, rock, prefixes__seed_idle_s=0)
    assert (await measured(proxy))["effective"]
    assert (await proxy.post("/v1/models/load", json={"model": TINY.name})).status == 200
    await ask_shop(proxy, "what?", model=QWEN.name)
    assert "use_cache" not in client_calls(rock)[-1]
    assert rock.poisoned == 0


# rkllama: the end of one answer at the start of the next


async def test_the_answer_after_one_that_was_cut_is_not_kept(farm: Proxy, llama: Rkllama) -> None:
    assert await ask(farm, "cut", model=LLAMA, max_tokens=2) == "MISS"
    leaked = await farm.chat("leaked", model=LLAMA)
    assert said(leaked).startswith(" answerStub")
    assert await ask(farm, "whole", model=LLAMA) == "MISS"
    # The very first one is not kept either: nobody knows what came before it.
    assert (await farm.stats())["not_stored"] == {"tainted": 2}
    assert await ask(farm, "cut", model=LLAMA, max_tokens=2) == "HIT"
    assert await ask(farm, "whole", model=LLAMA) == "HIT"
    assert await ask(farm, "leaked", model=LLAMA) == "MISS"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_the_answer_after_one_that_nobody_read_along_is_not_kept(farm: Proxy, llama: Rkllama, path: str) -> None:
    body = asking("cut", model=LLAMA, max_tokens=2, options={"num_predict": 2})
    assert (await farm.post(path, json=body, headers=NO_STORE)).status == 200
    assert said(await farm.chat("leaked", model=LLAMA)).startswith(" answerStub")
    await farm.settled()
    assert await ask(farm, "leaked", model=LLAMA) == "MISS"


async def test_an_answer_whose_client_left_is_whole_in_the_end(farm: Proxy, llama: Rkllama) -> None:
    hold(llama.npu)
    await leave(farm, "/v1/chat/completions", asking("left", model=LLAMA, temperature=0))
    following = asyncio.create_task(farm.chat("next", model=LLAMA))
    await eventually(lambda: farm.services.backends.first.lane.waiting == 1)
    llama.npu.go.set()
    assert said(await following).startswith("Stub")
    await farm.settled()
    assert await ask(farm, "left", model=LLAMA, stream=True) == "HIT"
    assert await ask(farm, "next", model=LLAMA) == "HIT"


async def test_the_answer_after_one_that_was_left_to_itself_is_not_kept(start: StartProxy, llama: Rkllama) -> None:
    proxy = await start(url=llama.url, cache__mode="exact", upstream__on_disconnect="cancel")
    await ask(proxy, "a whole one", model=LLAMA)
    hold(llama.npu)
    await leave(proxy, "/v1/chat/completions", asking("left", model=LLAMA, temperature=0))
    await proxy.settled()
    llama.npu.go.set()
    await eventually(lambda: llama.npu.active == 0)
    assert said(await proxy.chat("leaked", model=LLAMA)).startswith(" end.Stub")
    await proxy.settled()
    assert await ask(proxy, "leaked", model=LLAMA) == "MISS"


async def test_the_answer_after_one_that_nearhits_end_cut_off_is_not_kept(tmp_path: Path, llama: Rkllama) -> None:
    settings = settings_for(tmp_path, llama.url, cache__mode="exact")
    async with running_proxy(settings) as proxy:
        await ask(proxy, "a whole one", model=LLAMA)
        hold(llama.npu)
        await leave(proxy, "/v1/chat/completions", asking("left", model=LLAMA, temperature=0))
    llama.npu.go.set()
    await eventually(lambda: llama.npu.active == 0)
    async with running_proxy(settings) as proxy:
        assert said(await proxy.chat("leaked", model=LLAMA)).startswith(" end.Stub")
        await proxy.settled()
        assert await ask(proxy, "leaked", model=LLAMA) == "MISS"


async def test_what_it_says_when_it_gives_up_is_not_kept(farm: Proxy, llama: Rkllama) -> None:
    llama.times_out = True
    assert said(await farm.chat("slow", model=LLAMA)) == TIMEOUT_TEXT
    await farm.settled()
    llama.times_out = False
    assert await ask(farm, "slow", model=LLAMA) == "MISS"


async def test_every_model_is_asked_by_its_own_name(farm: Proxy, llama: Rkllama) -> None:
    for model in (LLAMA, "tiny:0.1b"):
        await ask(farm, "hi", model=model)
    assert [body["model"] for body in llama.bodies("/v1/chat/completions")] == [LLAMA, LLAMA, "tiny:0.1b"]


# The vendor's demo


async def test_the_demos_answers_are_not_kept(start: StartProxy, demo: RkllmFlask) -> None:
    proxy = await start(url=demo.url, cache__mode="exact")
    for _ in range(2):
        answer = await proxy.chat("hi")
        assert (answer.outcome, "detail=not-cached-here" in answer.headers["Cache-Status"]) == ("BYPASS", True)
    assert len(demo.npu.runs) == 2


async def test_the_demos_answers_are_kept_where_the_operator_says_so(start: StartProxy, demo: RkllmFlask) -> None:
    proxy = await start(url=demo.url, cache__mode="exact", upstream__cached="on")
    assert [await ask(proxy, "hi") for _ in range(2)] == ["MISS", "HIT"]


async def test_calls_of_several_clients_never_meet_at_the_demo(start: StartProxy, demo: RkllmFlask) -> None:
    proxy = await start(url=demo.url, cache__mode="exact")
    answers = await asyncio.gather(*(proxy.chat(f"call {n}", stream=n % 2 == 0) for n in range(6)))
    assert [said(answer) for answer in answers] == [f"You said call {n}." for n in range(6)]
    assert len(demo.bodies("/v1/chat/completions")) == 6


async def test_a_busy_demo_is_asked_again(start: StartProxy, demo: RkllmFlask) -> None:
    proxy = await start(url=demo.url, cache__mode="exact", upstream__cached="on")
    demo.blocking = True
    call = asyncio.create_task(proxy.chat("hi"))
    await eventually(lambda: len(demo.bodies("/v1/chat/completions")) >= 2)
    demo.blocking = False
    answer = await call
    assert (answer.status, said(answer)) == (200, "You said hi.")
    await proxy.settled()
    assert await ask(proxy, "hi") == "HIT"


@pytest.mark.parametrize(("retry_s", "most", "headers"), [(0, 1, {}), (0.4, 3, {}), (0.4, 3, NO_STORE)])
async def test_a_demo_that_stays_busy_says_so_itself(
    start: StartProxy, demo: RkllmFlask, retry_s: float, most: int, headers: dict[str, str]
) -> None:
    proxy = await start(url=demo.url, cache__mode="exact", upstream__cached="on", upstream__busy_retry_s=retry_s)
    demo.blocking = True
    answer = await proxy.chat("hi", headers=headers)
    assert (answer.status, answer.json["error"]["message"]) == (503, BUSY)
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}
    assert int(answer.headers["Retry-After"]) >= 1
    assert 1 <= len(demo.bodies("/v1/chat/completions")) <= most
    demo.blocking = False
    assert await ask(proxy, "hi") == "MISS"
