"""`/v1/cache`: the shapes that RockchipLlama documents, on every kind of upstream."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy import __version__
from proxy.config import load
from proxy.settings import Settings
from proxy.upstream.prefix import lead_of, lead_of_prompt
from proxy.web.prefix_request import MOST_BYTES, BadPrefix, read_wanted
from tests.conftest import Answer, Proxy, StartProxy, running_proxy
from tests.emulators.rkllm_flask import rkllm_flask
from tests.emulators.rockchipllama import QWEN, RockchipLlama, rockchipllama
from tests.fake_model import FakeModel
from tests.llama_server import Flags, LlamaServer
from tests.web.test_sharing import MINE, keyed

PROMPT = "You are the assistant of a small house. " * 10
CHATML = f"<|im_start|>system\n{PROMPT}<|im_end|>\n"
MODEL = QWEN.name
ROW = {
    *("cache_name", "model_name", "path", "size_mb", "created_at", "modified_at", "prompt_length", "source"),
    *("tokens", "state", "reason", "effective", "restores", "tokens_reused", "used_at", "bytes", "upstream"),
}
TOKEN = {"X-Nearhit-Admin": "open-sesame"}

Begin = Callable[..., Awaitable[Proxy]]


def settings_from(file: Path, sections: dict[str, Any]) -> Settings:
    """Settings as a configuration file makes them."""
    file.write_text(yaml.safe_dump(sections))
    return load(file, {}, {}).settings


@pytest.fixture
async def rock() -> AsyncIterator[RockchipLlama]:
    async with rockchipllama() as server:
        yield server


@pytest.fixture
async def begin(tmp_path: Path, rock: RockchipLlama) -> AsyncIterator[Begin]:
    """Start nearhit in front of a RockchipLlama; options are the sections of a configuration file."""
    async with AsyncExitStack() as stack:

        async def start(**sections: Any) -> Proxy:
            upstream = {"url": rock.url, "kind": "rockchipllama", "poll_s": 0.1, **sections.pop("upstream", {})}
            chosen = {"data_dir": str(tmp_path / "data"), "upstream": upstream, "cache": {"mode": "exact"}, **sections}
            settings = await asyncio.to_thread(settings_from, tmp_path / "config.yaml", chosen)
            proxy = await stack.enter_async_context(running_proxy(settings))
            for one in proxy.services.backends:
                await one.tracker.looked.wait()
            return proxy

        yield start


@pytest.fixture
async def house(begin: Begin) -> Proxy:
    return await begin()


async def create(proxy: Proxy, path: str = f"/v1/cache/{MODEL}", **fields: Any) -> Answer:
    return await proxy.post(path, json={"cache_name": "house", "prompt": PROMPT, **fields})


async def get(proxy: Proxy, path: str = "/v1/cache", **more: Any) -> Any:
    answer = await proxy.send("GET", path, **more)
    assert answer.status == 200, answer.body
    assert answer.json["version"] == __version__
    assert abs(answer.json["timestamp"] - time.time()) < 60
    return answer.json


async def names(proxy: Proxy, path: str = "/v1/cache", **more: Any) -> list[tuple[str, str]]:
    """Model and name of every prefix in a list."""
    data = (await get(proxy, path, **more))["data"]
    rows = data if isinstance(data, list) else [row for rows in data.values() for row in rows]
    return [(row["model_name"], row["cache_name"]) for row in rows]


def refused(answer: Answer, status: int, message: str) -> None:
    """The answer is an error in both shapes."""
    assert answer.status == status, answer.body
    assert message in answer.json["detail"]
    assert set(answer.json) == {"error", "detail"}
    assert set(answer.json["error"]) == {"message", "type", "code"}
    assert answer.json["error"]["message"] == answer.json["detail"]


# Making one, and finding it


async def test_a_prefix_is_made_listed_shown_and_deleted(house: Proxy) -> None:
    created = (await create(house)).json
    assert {name: created[name] for name in ("object", "model", "cache_name", "prompt_length")} == {
        "object": "cache.created",
        "model": MODEL,
        "cache_name": "house",
        "prompt_length": len(PROMPT),
    }
    assert created["ttft_ms"] > 0
    assert 0 < created["size_mb"] < 0.001
    assert created["message"].startswith("Prefix of ")

    listed = await get(house)
    assert (listed["object"], list(listed["data"])) == ("list", [MODEL])
    (row,) = listed["data"][MODEL]
    assert set(row) == ROW
    assert (row["cache_name"], row["model_name"], row["source"]) == ("house", MODEL, "api")
    assert abs(row["created_at"] - time.time()) < 60

    of_model = await get(house, f"/v1/cache/{MODEL}")
    assert (of_model["object"], of_model["model"], of_model["count"]) == ("list", MODEL, 1)
    assert of_model["data"] == [row]

    one = await get(house, f"/v1/cache/{MODEL}/house")
    assert (one["object"], one["model"], one["cache_name"]) == ("cache", MODEL, "house")
    assert {name: one[name] for name in ROW - {"cache_name"}} == {name: row[name] for name in ROW - {"cache_name"}}

    deleted = await house.send("DELETE", f"/v1/cache/{MODEL}/house")
    assert deleted.status == 200
    assert {name: deleted.json[name] for name in ("object", "model", "cache_name", "deleted")} == {
        "object": "cache.deleted",
        "model": MODEL,
        "cache_name": "house",
        "deleted": True,
    }
    assert (await get(house))["data"] == {}


async def test_the_path_leads_to_the_record(house: Proxy) -> None:
    await create(house)
    row = await get(house, f"/v1/cache/{MODEL}/house")
    record = json.loads(await asyncio.to_thread(Path(row["path"]).read_bytes))
    assert record["cache_name"] == "house"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": PROMPT},
        {"prompt": CHATML},
        {"prompt": f"\n{CHATML}<|im_start|>user\nhi<|im_end|>\n"},
        {"prompt": CHATML.removesuffix("<|im_end|>\n")},
        {"prompt": None, "messages": [{"role": "system", "content": PROMPT}]},
        {"prompt": "", "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": "hi"}]},
        {"messages": [], "stream": True, "model": "whatever"},
    ],
)
async def test_the_system_prompt_is_what_is_seeded(house: Proxy, rock: RockchipLlama, fields: dict[str, Any]) -> None:
    assert (await create(house, **fields)).status == 200
    assert [cache.prompt for cache in rock.caches[MODEL].values()] == [CHATML]


async def test_a_name_given_again_stands_for_the_new_text(house: Proxy) -> None:
    await create(house)
    await create(house, prompt=PROMPT * 2)
    assert await names(house) == [(MODEL, "house")]
    assert (await get(house, f"/v1/cache/{MODEL}/house"))["prompt_length"] == 2 * len(PROMPT)


async def test_without_a_model_it_is_made_for_what_the_first_upstream_runs(house: Proxy) -> None:
    assert (await create(house, "/v1/cache")).json["model"] == MODEL
    assert await names(house) == [(MODEL, "house")]


async def test_no_answer_shows_any_text(house: Proxy) -> None:
    secret = "The code of the safe is 4711. " * 20
    answers = [await create(house, prompt=secret)]
    paths = ("/v1/cache", f"/v1/cache/{MODEL}", f"/v1/cache/{MODEL}/house")
    answers += [await house.send("GET", path) for path in paths]
    answers.append(await house.send("DELETE", paths[-1]))
    assert [answer.status for answer in answers] == [200] * 5
    assert not [answer for answer in answers if b"4711" in answer.body]


async def test_an_unknown_model_has_an_empty_list(house: Proxy, rock: RockchipLlama) -> None:
    assert (await get(house, "/v1/cache/nobody"))["data"] == []
    assert (await get(house, "/v1/cache/nobody"))["count"] == 0
    assert not [asked for asked in rock.asked if asked.path.startswith("/v1/cache")]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_what_is_not_there_is_not_found(house: Proxy, method: str) -> None:
    for path, name in (("none", "none"), ("system", "system"), ("NONE%20of", "NONE of")):
        answer = await house.send(method, f"/v1/cache/{MODEL}/{path}")
        refused(answer, 404, "")
        assert answer.json["detail"] == f"Cache '{name}' not found for model '{MODEL}'"


async def test_a_prefix_may_be_called_system(house: Proxy) -> None:
    assert (await create(house, cache_name="system")).status == 200
    assert (await house.send("DELETE", f"/v1/cache/{MODEL}/system")).status == 200


async def test_head_is_a_get_without_a_body(house: Proxy) -> None:
    answer = await house.send("HEAD", "/v1/cache")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("path", ["/v1/cache/", f"/v1/cache/{MODEL}/"])
async def test_a_slash_at_the_end_changes_nothing(house: Proxy, path: str) -> None:
    await create(house)
    assert await names(house, path) == [(MODEL, "house")]


# Configured ones


async def test_a_configured_prefix_is_listed_and_comes_back_when_it_is_deleted(begin: Begin, tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "system.txt").write_text, PROMPT)
    seeds = [{"name": "house", "file": str(tmp_path / "system.txt")}]
    proxy = await begin(prefixes={"seeds": seeds, "seed_idle_s": 0})
    while (await get(proxy, f"/v1/cache/{MODEL}/house"))["state"] not in ("seeded", "ineffective"):
        await asyncio.sleep(0.02)
    refused(await create(proxy), 400, "configured")
    deleted = await proxy.send("DELETE", f"/v1/cache/{MODEL}/house")
    assert "take it out of prefixes.seeds" in deleted.json["message"]
    assert await names(proxy) == [(MODEL, "house")]


# Names of models


async def test_a_model_with_a_slash_is_understood_in_every_spelling(begin: Begin) -> None:
    proxy = await begin(models={"org/model": MODEL})
    for path in ("/v1/cache/org/model", "/v1/cache/org%2Fmodel", "/v1/cache/org%2fmodel/"):
        created = await create(proxy, path)
        assert (created.status, created.json["model"]) == (200, "org/model")
        assert await names(proxy, path) == [("org/model", "house")]
    for path in ("/v1/cache/org/model/house", "/v1/cache/org%2Fmodel/house"):
        one = await get(proxy, path)
        assert (one["model"], one["cache_name"]) == ("org/model", "house")
    assert (await proxy.send("DELETE", "/v1/cache/org/model/house")).status == 200
    assert await names(proxy) == []


async def test_all_names_of_a_model_lead_to_its_prefixes(begin: Begin) -> None:
    proxy = await begin(models={"assistant": MODEL, "butler": {"model": MODEL, "upstream": "default"}})
    for number, name in enumerate(("assistant", "butler", MODEL)):
        created = await create(proxy, f"/v1/cache/{name}", cache_name=f"c{number}", prompt=f"{number} {PROMPT}")
        assert created.json["model"] == "assistant"
    expected = [("assistant", name) for name in ("c0", "c1", "c2")]
    for name in ("assistant", "butler", MODEL):
        assert await names(proxy, f"/v1/cache/{name}") == expected
    assert (await proxy.send("DELETE", f"/v1/cache/{MODEL}/c0")).status == 200


@pytest.mark.parametrize("path", ["%ff", "a/%ed%a0%80", "%c3"])
async def test_a_path_that_is_no_unicode_is_refused(house: Proxy, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = await house.send(method, f"/v1/cache/{path}")
        assert answer.status in (400, 405)
        assert "detail" in answer.json


@pytest.mark.parametrize("name", ["%00", "%1b%5b31m", "..%2f..", "%252F", "💡", "a%3Fb=c", "x" * 5000])
async def test_odd_names_are_only_names(house: Proxy, name: str) -> None:
    assert await names(house, f"/v1/cache/{name}") == []
    for method in ("GET", "DELETE"):
        answer = await house.send(method, f"/v1/cache/{name}/{name}")
        assert answer.status in (404, 405)
        assert answer.json["detail"].isprintable()
    refused(await create(house, f"/v1/cache/{name}"), 400, "is not loaded")


async def test_two_upstreams_with_the_same_model_are_one_list(begin: Begin) -> None:
    async with rockchipllama() as second:
        more = {"name": "second", "url": second.url, "kind": "rockchipllama", "poll_s": 0.1}
        proxy = await begin(upstreams=[more], models={"other": {"model": MODEL, "upstream": "second"}})
        await create(proxy, f"/v1/cache/{MODEL}")
        await create(proxy, "/v1/cache/other")
        rows = [row for rows in (await get(proxy))["data"].values() for row in rows]
        assert sorted((row["upstream"], row["model_name"]) for row in rows) == [("default", MODEL), ("second", "other")]
        assert (await proxy.send("DELETE", "/v1/cache/other/house")).status == 200
        assert await names(proxy) == [(MODEL, "house")]


# Bad bodies


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": PROMPT}, "cache_name is required"),
        ({"cache_name": None, "prompt": PROMPT}, "cache_name is required"),
        ({"cache_name": "", "prompt": PROMPT}, "cache_name is required"),
        ({"cache_name": 7, "prompt": PROMPT}, "cache_name must be a string"),
        ({"cache_name": ["a"], "prompt": PROMPT}, "cache_name must be a string"),
        ({"cache_name": "a/b", "prompt": PROMPT}, "cache_name must be alphanumeric (hyphens and underscores allowed)"),
        ({"cache_name": "..", "prompt": PROMPT}, "cache_name must be alphanumeric (hyphens and underscores allowed)"),
        ({"cache_name": "é", "prompt": PROMPT}, "cache_name must be alphanumeric (hyphens and underscores allowed)"),
        ({"cache_name": "a\n", "prompt": PROMPT}, "cache_name must be alphanumeric (hyphens and underscores allowed)"),
        ({"cache_name": "-rf", "prompt": PROMPT}, "begin with a letter or a digit"),
        ({"cache_name": "x" * 65, "prompt": PROMPT}, "64 characters at most"),
        ({"cache_name": "a"}, "Either 'prompt' or 'messages' is required"),
        ({"cache_name": "a", "prompt": "", "messages": []}, "Either 'prompt' or 'messages' is required"),
        ({"cache_name": "a", "prompt": 7}, "prompt must be a string"),
        ({"cache_name": "a", "prompt": [PROMPT]}, "prompt must be a string"),
        ({"cache_name": "a", "prompt": PROMPT, "messages": [{"role": "system", "content": "b"}]}, "not both"),
        ({"cache_name": "a", "prompt": "<|im_start|>user\nhi<|im_end|>\n"}, "must begin with a system message"),
        ({"cache_name": "a", "prompt": "<|im_start|>system\n<|im_end|>\n"}, "must begin with a system message"),
        ({"cache_name": "a", "messages": "hi"}, "messages must be a list"),
        ({"cache_name": "a", "messages": {"role": "system"}}, "messages must be a list"),
        ({"cache_name": "a", "messages": ["hi"]}, "messages must be a list"),
        ({"cache_name": "a", "messages": [{"role": "user", "content": "hi"}]}, "must begin with a system message"),
        ({"cache_name": "a", "messages": [{"role": ["system"], "content": "hi"}]}, "must begin with a system message"),
        ({"cache_name": "a", "messages": [{"role": "system"}]}, "must begin with a system message"),
        ({"cache_name": "a", "messages": [{"role": "system", "content": 7}]}, "must begin with a system message"),
        ({"cache_name": "a", "messages": [{"role": "system", "content": [{"type": "image_url"}]}]}, "must begin with"),
        ({"cache_name": "a", "prompt": "\ud800" + PROMPT}, "the body is not JSON"),
        ({"cache_name": "a", "prompt": PROMPT, "x": float("nan")}, "the body is not JSON"),
        ([], "the body is not a JSON object"),
        (None, "the body is not a JSON object"),
        ("text", "the body is not a JSON object"),
    ],
)
async def test_a_bad_field_is_refused_by_its_name(house: Proxy, rock: RockchipLlama, body: Any, message: str) -> None:
    refused(await house.post(f"/v1/cache/{MODEL}", data=json.dumps(body)), 400, message)
    assert rock.caches == {}
    assert await names(house) == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"cache_name": "a", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"cache_name": "a", "messages": [' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"]}",
        b'{"cache_name": ' + b"9" * 5000 + b"}",
    ],
)
async def test_what_is_no_json_is_refused(house: Proxy, raw: bytes) -> None:
    refused(await house.post(f"/v1/cache/{MODEL}", data=raw), 400, "the body is ")


async def test_a_body_that_is_too_large_is_refused(house: Proxy) -> None:
    whole = io.BytesIO(json.dumps({"cache_name": "a", "prompt": "x" * MOST_BYTES}).encode())
    refused(await house.post(f"/v1/cache/{MODEL}", data=whole), 413, str(MOST_BYTES))

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(MOST_BYTES // 65_536 + 1):
            yield b" " * 65_536

    refused(await house.post(f"/v1/cache/{MODEL}", data=chunks()), 413, str(MOST_BYTES))


async def test_a_body_that_claims_to_be_compressed_is_refused(house: Proxy) -> None:
    answer = await house.post(f"/v1/cache/{MODEL}", data=b"\x00no gzip", headers={"Content-Encoding": "gzip"})
    assert answer.status == 400


def test_tools_and_the_like_belong_to_what_is_shared() -> None:
    call = {
        "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "lamp"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "temperature": 0,
    }
    wanted = read_wanted(json.dumps({"cache_name": "a", **call}).encode())
    assert wanted.lead == lead_of(call)
    only_tools = {"messages": [{"role": "user", "content": "hi"}], "tools": call["tools"]}
    assert read_wanted(json.dumps({"cache_name": "a", **only_tools}).encode()).lead == lead_of(only_tools)


def test_a_prompt_is_taken_to_the_letter() -> None:
    for text in (" You are.\n", "It says <|im_start|>system in the middle", "a\r\nb\u2028c"):
        for prompt in (text, f"<|im_start|>system\n{text}<|im_end|>\n"):
            wanted = read_wanted(json.dumps({"cache_name": "a", "prompt": prompt}).encode())
            assert wanted.lead.id == lead_of_prompt(text).id


def test_several_system_messages_are_taken_together() -> None:
    messages = [{"role": "system", "content": "one"}, {"role": "developer", "content": "two"}]
    rendered = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    wanted = read_wanted(json.dumps({"cache_name": "a", "prompt": rendered}).encode())
    assert wanted.lead == lead_of({"messages": messages})


def test_a_lora_of_its_own_is_no_part_of_what_can_be_asked_for() -> None:
    with pytest.raises(BadPrefix, match="Either 'prompt' or 'messages'"):
        read_wanted(b'{"cache_name": "a", "lora": [{"id": 0}]}')


# Methods


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/cache", "GET, HEAD, POST"),
        ("PUT", "/v1/cache", "GET, HEAD, POST"),
        ("PATCH", f"/v1/cache/{MODEL}", "GET, HEAD, POST"),
        ("DELETE", f"/v1/cache/{MODEL}", "GET, HEAD, POST"),
        ("PUT", f"/v1/cache/{MODEL}/house", "DELETE, GET, HEAD, POST"),
        ("OPTIONS", f"/v1/cache/{MODEL}/house", "DELETE, GET, HEAD, POST"),
    ],
)
async def test_other_methods_are_refused(
    house: Proxy, rock: RockchipLlama, method: str, path: str, allowed: str
) -> None:
    answer = await house.send(method, path)
    refused(answer, 405, f"{method} means nothing here")
    assert answer.headers["Allow"] == allowed
    assert not [asked for asked in rock.asked if asked.path.startswith("/v1/cache")]


@pytest.mark.parametrize("path", ["/v1/caches", "/v1/cache-info", "/cache", "/v2/cache"])
async def test_paths_that_only_look_alike_go_upstream(start: StartProxy, model: FakeModel, path: str) -> None:
    proxy = await start()
    await proxy.send("GET", path)
    assert path in [seen.target for seen in model.seen]


# Who may


async def test_changes_want_the_token_and_paths_are_for_admins(begin: Begin) -> None:
    proxy = await begin(admin={"token": TOKEN["X-Nearhit-Admin"]}, sharing="shared")
    url = f"/v1/cache/{MODEL}"
    body = {"cache_name": "house", "prompt": PROMPT}
    refused(await proxy.post(url, json=body), 403, "X-Nearhit-Admin")
    assert (await proxy.post(url, json=body, headers=TOKEN)).status == 200
    refused(await proxy.send("DELETE", f"{url}/house"), 403, "X-Nearhit-Admin")
    for path in (url, f"{url}/house"):
        told = [await get(proxy, path, headers=headers) for headers in ({}, TOKEN)]
        paths = [one.get("path", "") or one.get("data", [{}])[0].get("path", "") for one in told]
        assert paths[0] == ""
        assert paths[1].endswith("house.json")
    assert (await proxy.send("DELETE", f"{url}/house", headers=TOKEN)).status == 200


async def test_other_machines_may_look_and_not_touch(begin: Begin) -> None:
    proxy = await begin(sharing="shared")
    elsewhere = {"X-Forwarded-For": "192.0.2.7"}
    await create(proxy)
    assert await names(proxy, headers=elsewhere) == [(MODEL, "house")]
    for method in ("POST", "DELETE"):
        refused(await proxy.send(method, f"/v1/cache/{MODEL}/house", headers=elsewhere), 403, "only this machine")


async def test_a_wrong_token_is_worse_than_none(begin: Begin) -> None:
    proxy = await begin(sharing="shared")
    refused(await proxy.send("GET", "/v1/cache", headers={"X-Nearhit-Admin": "wrong"}), 403, "is wrong")


async def test_where_callers_have_their_own_only_admins_may_look(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine")
    proxy = await start(sharing="per-credential", admin__token=TOKEN["X-Nearhit-Admin"])
    for path in ("/v1/cache", "/v1/cache/tiny", "/v1/cache/tiny/house"):
        refused(await proxy.send("GET", path, headers=MINE), 403, "X-Nearhit-Admin")
    assert await names(proxy, headers=TOKEN) == []


async def test_where_callers_have_their_own_this_machine_needs_the_token_too(
    start: StartProxy, model: FakeModel
) -> None:
    model.extra = keyed("mine")
    proxy = await start(sharing="per-credential")
    refused(await proxy.send("GET", "/v1/cache"), 403, "callers have answers of their own")
    assert await names(proxy, headers={"X-Nearhit-Admin": proxy.services.local_token}) == []


async def test_pages_of_other_sites_change_nothing(house: Proxy) -> None:
    answer = await house.post(
        f"/v1/cache/{MODEL}", json={"cache_name": "a", "prompt": PROMPT}, headers={"Origin": "https://evil.example"}
    )
    refused(answer, 403, "other sites")


# Where it cannot be done


async def test_switched_off_nothing_is_listed_and_nothing_made(begin: Begin) -> None:
    proxy = await begin(prefixes={"mode": "off"})
    assert (await get(proxy))["data"] == {}
    assert (await get(proxy, f"/v1/cache/{MODEL}"))["data"] == []
    refused(await create(proxy), 503, "prefixes.mode is off")
    refused(await proxy.send("DELETE", f"/v1/cache/{MODEL}/house"), 503, "prefixes.mode is off")
    refused(await proxy.send("GET", f"/v1/cache/{MODEL}/house"), 404, "not found")


async def test_what_is_too_short_is_refused_and_not_listed(house: Proxy) -> None:
    refused(await create(house, prompt="Be brief."), 400, "too short")
    assert await names(house) == []


async def test_what_the_server_cannot_do_is_refused_and_not_listed(house: Proxy) -> None:
    messages = [{"role": "developer", "content": PROMPT}]
    refused(await create(house, prompt=None, messages=messages), 400, "this server cannot do it")
    assert await names(house) == []


async def test_what_the_server_refuses_is_told(house: Proxy, rock: RockchipLlama) -> None:
    rock.fails = True
    refused(await create(house), 400, "the server refused to compute it")
    assert await names(house) == []


async def test_a_model_that_is_not_loaded_is_told(house: Proxy) -> None:
    refused(await create(house, "/v1/cache/tiny-b"), 400, f"'{MODEL}' is")
    assert await names(house) == []


async def test_a_kind_of_server_that_cannot_be_seeded_says_so(begin: Begin) -> None:
    async with rkllm_flask() as server:
        proxy = await begin(upstream={"url": server.url, "kind": "rkllm_flask", "epoch": "1"})
        refused(await create(proxy, "/v1/cache"), 400, "cannot be seeded")
        assert await names(proxy) == []


async def test_an_upstream_that_is_away_is_told_with_a_time_to_come_back(start: StartProxy) -> None:
    proxy = await start(url="http://127.0.0.1:1", sharing="shared")
    for path in ("/v1/cache", "/v1/cache/tiny"):
        answer = await create(proxy, path)
        refused(answer, 503, "cannot be reached")
        assert int(answer.headers["Retry-After"]) > 0
    assert (await get(proxy))["data"] == {}


async def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(begin: Begin, rock: RockchipLlama) -> None:
    proxy = await begin(prefixes={"seed_timeout_s": 0.3}, upstream={"poll_s": 3600})
    rock.deadlocked = True
    answer = await create(proxy)
    refused(answer, 503, "'house' is not seeded yet")
    assert int(answer.headers["Retry-After"]) > 0


# A real server


@pytest.mark.model
async def test_a_real_llama_cpp_keeps_what_it_was_given(start: StartProxy, tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    await asyncio.to_thread(slots.mkdir)
    async with LlamaServer(Flags(slot_save_path=f"{slots}/", alias="tiny")) as server:
        proxy = await start(url=server.url, upstream__slot_dir=str(slots))
        created = await create(proxy, "/v1/cache/tiny")
        assert created.status == 200, created.body
        assert created.json["tokens"] > 64
        assert created.json["message"].startswith(f"Prefix of {created.json['tokens']} tokens computed; kept")
        (row,) = (await get(proxy, "/v1/cache/tiny"))["data"]
        assert (row["state"], row["source"], row["tokens"]) == ("seeded", "api", created.json["tokens"])
        assert await asyncio.to_thread(lambda: [file.stat().st_size for file in slots.iterdir()]) == [row["bytes"]]
        refused(await create(proxy, "/v1/cache/tiny", cache_name="b", prompt="Be brief."), 400, "too short")
        assert (await proxy.send("DELETE", "/v1/cache/tiny/house")).status == 200
        assert await asyncio.to_thread(lambda: list(slots.iterdir())) == []
