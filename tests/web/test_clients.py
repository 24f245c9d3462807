"""Named clients: whose key opens what, who shares answers with whom, and what the upstream hears of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict, MultiMapping

from proxy.cache.dialects import DIALECTS
from proxy.web.clients import namespace_digest, shown_key, stands_in
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.emulators.rockchipllama import rockchipllama
from tests.fake_model import FakeModel, held, numbered, reply
from tests.web.test_access import raw_exchange
from tests.web.test_limits import answer_to_a_head
from tests.web.test_near import ALIKE, ASKED, OTHER
from tests.web.test_sharing import keyed

OURS = "the-key-of-nearhit"
ONLY = {"Cache-Control": "only-if-cached"}
CLIENTS: list[dict[str, Any]] = [
    {"name": "ann", "key": "key-of-ann-0001", "namespace": "home"},
    {"name": "bob", "key": "key-of-bob-0002", "namespace": "home"},
    {"name": "cat", "key": "key-of-cat-0003"},
    {"name": "reader", "key": "key-of-reader-0004", "namespace": "home", "rights": ["read-only"]},
    {"name": "hermit", "key": "key-of-hermit-0005", "namespace": "home", "rights": ["no-store"]},
    {"name": "boss", "key": "key-of-boss-0006", "rights": ["admin"]},
]
KEYS = {one["name"]: one["key"] for one in CLIENTS}


def by(name: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}", **{k.replace("_", "-"): v for k, v in more.items()}}


@pytest.fixture
async def named(start: StartProxy, model: FakeModel) -> Proxy:
    """A nearhit with clients, in front of a server that takes nearhit's own key alone."""
    model.extra, model.respond = keyed(OURS), numbered()
    return await start(sharing="clients", clients=CLIENTS, upstream__api_key=OURS)


async def ask(proxy: Proxy, who: str, content: str = "x", headers: dict[str, str] | None = None, **f: Any) -> Answer:
    answer = await proxy.chat(content, headers={**by(who), **(headers or {})}, **f)
    await proxy.settled()
    return answer


def said(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"])


def heard(model: FakeModel, since: int = 0) -> str:
    """Everything that the upstream was sent, as one text."""
    return repr([(seen.target, seen.raw_headers) for seen in model.seen[since:]])


# The key


ELSEWHERE = [
    ("GET", "/v1/models"),
    ("GET", "/models/tiny"),
    ("HEAD", "/v1/models"),
    ("GET", "/v1/cache"),
    ("DELETE", "/v1/cache/tiny/a"),
    ("POST", "/v1/cache/tiny"),
    ("GET", "/"),
    ("HEAD", "/nothing"),
    ("OPTIONS", "/v1/chat/completions"),
    ("GET", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("GET", "//-/healthy"),
    ("GET", "/-"),
    ("GET", "/%2D/healthy/../../props"),
    ("PROPFIND", "/x"),
]
HOSTILE: list[list[tuple[str, str]]] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", "Bearer ")],
    [("Authorization", KEYS["ann"])],
    [("Authorization", f"Basic {KEYS['ann']}")],
    [("Authorization", f"Token {KEYS['ann']}")],
    [("Authorization", f"Bearer{KEYS['ann']}")],
    [("Authorization", f"Bearer {KEYS['ann'][:-1]}")],
    [("Authorization", f"Bearer {KEYS['ann']}0")],
    [("Authorization", f"Bearer {KEYS['ann'].upper()}")],
    [("Authorization", f"Bearer {KEYS['ann']}, Bearer {KEYS['ann']}")],
    [("Authorization", f"Bearer Bearer {KEYS['ann']}")],
    [("Authorization", f"Bearer {OURS}")],
    [("Authorization", "Bearer ann")],
    [("Authorization", "Bearer ключ")],
    [("Authorization", "Bearer \udcff\udcfe")],
    [("Authorization", "Bearer " + "k" * 30_000)],
    [("Authorization", f"Bearer {KEYS['ann']}"), ("Authorization", f"Bearer {KEYS['ann']}")],
    [("Authorization", f"Bearer {KEYS['ann']}"), ("Authorization", f"Bearer {KEYS['bob']}")],
    [("Authorization", f"Bearer {KEYS['ann']}"), ("X-Api-Key", KEYS["bob"])],
    [("Authorization", f"Basic {KEYS['ann']}"), ("X-Api-Key", KEYS["ann"])],
    [("Authorization", "Bearer "), ("X-Api-Key", KEYS["ann"])],
    [("X-Api-Key", "")],
    [("X-Api-Key", f"Bearer {KEYS['ann']}")],
    [("X-Api-Key", KEYS["ann"]), ("X-Api-Key", KEYS["ann"])],
    [("Api-Key", KEYS["ann"])],
    [("Cookie", f"key={KEYS['ann']}")],
    [("X-Nearhit-Admin", KEYS["ann"])],
    [("Proxy-Authorization", f"Bearer {KEYS['ann']}")],
]


async def test_whoever_shows_no_known_key_gets_401_and_reaches_nothing(named: Proxy, model: FakeModel) -> None:
    await ask(named, "ann")
    before = len(model.generations)
    body = b'{"messages":[{"role":"user","content":"x"}],"temperature":0}'
    length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    path = f"/v1/chat/completions?key={KEYS['ann']}".encode()
    for fields in HOSTILE:
        head = "".join(f"{name}: {value}\r\n" for name, value in fields).encode("utf-8", "surrogateescape")
        answer = await raw_exchange(named, b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n" + head + length + body)
        told, _, content = answer.partition(b"\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 401 "), fields
        assert b"\r\nWWW-Authenticate: Bearer\r\n" in told
        assert json.loads(content)["error"]["code"] == "invalid_api_key"
        assert b"X-Cache" not in told
    assert len(model.generations) == before
    assert named.services.metrics.value("nearhit_unknown_keys_total") == len(HOSTILE)


async def test_a_key_may_come_in_either_field_and_is_the_same_client(named: Proxy) -> None:
    await ask(named, "ann")
    for fields in (
        {"Authorization": f"Bearer {KEYS['ann']}"},
        {"authorization": f"bearer {KEYS['ann']}"},
        {"Authorization": f"BEARER   {KEYS['ann']}  "},
        {"X-Api-Key": KEYS["ann"]},
        {"Authorization": f"Bearer {KEYS['ann']}", "X-Api-Key": KEYS["ann"]},
    ):
        assert (await named.chat("x", headers=fields)).outcome == "HIT", fields


async def test_the_key_is_checked_before_the_body_comes(named: Proxy) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    assert (await answer_to_a_head(named, head)).startswith(b"HTTP/1.1 401 ")


async def test_every_path_of_every_dialect_wants_a_key(named: Proxy, model: FakeModel) -> None:
    before = len(model.generations)
    for path in (path for dialect in DIALECTS for path in dialect.paths):
        assert (await named.post(path, json={"messages": [], "prompt": "x", "input": "x"})).status == 401
    assert len(model.generations) == before


async def test_everything_else_wants_a_key_too(named: Proxy, model: FakeModel) -> None:
    before = len(model.seen)
    for method, path in ELSEWHERE:
        refused = await named.send(method, path)
        assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, path)
    assert not [seen for seen in model.seen[before:] if seen.headers.get("Authorization") != f"Bearer {OURS}"]
    for method, path in ELSEWHERE:
        assert (await named.send(method, path, headers=by("ann"))).status != 401, (method, path)


async def test_a_websocket_wants_a_key(named: Proxy, model: FakeModel) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    before = len(model.seen)
    answer = await named.send(
        "GET", "/v1/realtime", headers={**upgrade, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    )
    assert answer.status == 401
    assert not [seen for seen in model.seen[before:] if "realtime" in seen.target]


async def test_health_needs_no_key(named: Proxy) -> None:
    for path in ("/-/healthy", "/-/ready", "/metrics"):
        assert (await named.send("GET", path)).status == 200


async def test_an_unknown_key_is_refused_while_the_upstream_is_down(start: StartProxy) -> None:
    proxy = await start(sharing="clients", clients=CLIENTS, url="http://127.0.0.1:9")
    assert (await proxy.chat("x")).status == 401
    assert (await proxy.send("GET", "/props")).status == 401
    assert (await ask(proxy, "ann")).status == 502


@pytest.mark.parametrize(
    "target", ["/v1/models?key={}", "/v1/models?a=1&api_key=x%20{}", "/v1/files/{}/x", "/v1/models?a=%6Bey-of-ann-0001"]
)
async def test_a_key_in_the_url_is_refused_and_not_logged(
    named: Proxy, model: FakeModel, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    before = len(model.seen)
    answer = await named.send("GET", target.format(KEYS["ann"]), headers=by("ann"))
    assert (answer.status, answer.json["error"]["code"]) == (400, "key_in_url")
    named.services.access.write()
    await asyncio.sleep(0)
    assert KEYS["ann"] not in heard(model, before)
    assert KEYS["ann"] not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ([("Authorization", "Bearer a")], "a"),
        ([("X-Api-Key", "a")], "a"),
        ([("Authorization", "Bearer a"), ("X-Api-Key", "a")], "a"),
        ([("Authorization", "Bearer a"), ("X-Api-Key", "b")], ""),
        ([("Authorization", "Bearer"), ("X-Api-Key", "b")], ""),
        ([("Authorization", "Bearer a"), ("Authorization", "Bearer a")], ""),
        ([("Authorization", "Basic a")], ""),
        ([], ""),
    ],
)
def test_which_key_a_request_shows(fields: list[tuple[str, str]], key: str) -> None:
    headers: MultiMapping[str] = CIMultiDict(fields)
    assert shown_key(headers) == key


def test_a_key_is_found_in_an_encoded_url() -> None:
    assert stands_in("a+b/c", "/x?y=a%2Bb%2fc")
    assert stands_in("a+b/c", "/x?y=a+b/c")
    assert not stands_in("a+b/c", "/x?y=a%20b/c")


# What the upstream hears


async def test_the_upstream_hears_nearhits_key_and_nothing_of_the_clients(named: Proxy, model: FakeModel) -> None:
    before = len(model.seen)
    more = {
        "X-Api-Key": KEYS["ann"],
        "Cookie": "session=planted-cookie",
        "X-Session-Token": "planted-token",
        "OpenAI-Organization": "planted-organization",
        "X-Debug": f"I am {KEYS['ann']}!",
        "Referer": f"http://page.example/?k={KEYS['ann']}",
        "X-Harmless": "stays",
    }
    assert (await ask(named, "ann", headers=more)).outcome == "MISS"
    assert (await ask(named, "ann", "{", headers={**more, "Cache-Control": "no-store"})).outcome == "BYPASS"
    assert (await named.send("GET", "/v1/models", headers={**by("ann"), **more})).status == 200
    await named.send("POST", "/tokenize", data=b"{}", headers={**by("ann"), **more})
    await ask(named, "ann", headers={**more, "Origin": "http://page.example"})
    sent = heard(model, before)
    assert KEYS["ann"] not in sent
    assert "planted" not in sent
    passed = [seen for seen in model.seen[before:] if "X-Harmless" in seen.headers]
    assert len(passed) == 4
    for seen in passed:
        told = [value for name, value in seen.raw_headers if name.lower() == b"authorization"]
        assert told == [f"Bearer {OURS}".encode()]


async def test_a_client_cannot_take_nearhits_key_out_of_a_request(named: Proxy, model: FakeModel) -> None:
    before = len(model.seen)
    answer = await ask(named, "ann", headers={"Connection": "authorization, x-harmless"})
    assert (answer.status, answer.outcome) == (200, "MISS")
    await named.send("GET", "/v1/models", headers=by("ann", Connection="authorization"))
    passed = [seen for seen in model.seen[before:] if seen.target in ("/v1/chat/completions", "/v1/models")]
    assert {seen.headers.get("Authorization") for seen in passed} == {f"Bearer {OURS}"}
    assert named.services.backends.first.gate.trouble == ""


async def test_without_an_api_key_the_upstream_hears_none(start: StartProxy, model: FakeModel) -> None:
    model.key = OURS
    proxy = await start(sharing="clients", clients=CLIENTS)
    answer = await ask(proxy, "ann")
    assert (answer.status, answer.json["error"]["message"]) == (401, "Invalid API Key")
    await proxy.send("GET", "/props", headers=by("ann"))
    assert KEYS["ann"] not in heard(model)


async def test_nobody_is_tried_out_at_the_upstream(named: Proxy, model: FakeModel) -> None:
    for who in ("ann", "cat"):
        await ask(named, who)
    assert {seen.headers.get("Authorization") for seen in model.seen} == {f"Bearer {OURS}"}
    assert [seen.body for seen in model.seen if seen.body == b"{}"] == []


@pytest.mark.parametrize("setting", ["auto", "shared", "per-credential"])
async def test_with_other_settings_a_clients_own_key_goes_on(start: StartProxy, model: FakeModel, setting: str) -> None:
    model.extra = keyed("mine")
    proxy = await start(sharing=setting, upstream__api_key="mine")
    assert (await proxy.chat("x", headers={"Authorization": "Bearer mine"})).status == 200
    assert (await proxy.chat("x", headers={"Authorization": "Bearer other"})).status == 401


async def test_a_preflight_goes_upstream_without_any_key(named: Proxy, model: FakeModel) -> None:
    before = len(model.seen)
    asks = {
        "Origin": "http://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
        "Cookie": "planted=1",
    }
    answer = await named.send("OPTIONS", "/v1/chat/completions", headers=asks)
    assert answer.status == 401  # This server checks keys of preflights, too; the answer is its own.
    assert answer.json["error"]["message"] == "Invalid API Key"
    (seen,) = [seen for seen in model.seen[before:] if seen.method == "OPTIONS"]
    assert "Authorization" not in seen.headers
    assert "Cookie" not in seen.headers
    assert named.services.backends.first.gate.trouble == ""


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_what_only_looks_like_a_preflight_wants_a_key(named: Proxy, method: str) -> None:
    body = b"{}" if method == "OPTIONS" else None
    headers = {"Access-Control-Request-Method": "POST"}
    assert (await named.send(method, "/tokenize", headers=headers, data=body)).status == 401


async def test_a_wrong_key_of_nearhits_own_is_told_and_the_upstreams_error_passes(
    start: StartProxy, model: FakeModel
) -> None:
    model.key, model.public_models = "another", True
    proxy = await start(sharing="clients", clients=CLIENTS, upstream__api_key=OURS)
    assert "refuses" not in (await proxy.send("GET", "/-/ready")).json["upstream"]["trouble"]
    answer = await ask(proxy, "ann")
    assert (answer.status, answer.json["error"]["message"]) == (401, "Invalid API Key")
    assert "upstream.api_key" in (await proxy.send("GET", "/-/ready")).json["upstream"]["trouble"]
    findings = (await proxy.send("GET", "/-/doctor")).json["findings"]
    assert any(f["severity"] == "problem" and "refuses upstream.api_key" in f["what"] for f in findings)
    model.key = OURS
    assert (await ask(proxy, "ann", "y")).status == 200
    assert (await proxy.send("GET", "/-/ready")).json["upstream"]["trouble"] == ""


async def test_a_follower_hears_the_refusal_of_nearhits_key_as_it_came(start: StartProxy, model: FakeModel) -> None:
    async def refused(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        await model.release.wait()
        return web.json_response({"error": {"message": "no such key"}}, status=401)

    model.respond = refused
    proxy = await start(sharing="clients", clients=CLIENTS, upstream__api_key=OURS)
    asking = [asyncio.create_task(ask(proxy, who)) for who in ("ann", "bob")]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    answers = await asyncio.gather(*asking)
    assert {(answer.status, answer.json["error"]["message"]) for answer in answers} == {(401, "no such key")}


# Who shares answers with whom: two clients of one namespace, and one of another


async def test_equal_calls_are_answered_inside_a_namespace_alone(named: Proxy) -> None:
    first = await ask(named, "ann")
    assert [(await ask(named, who)).outcome for who in ("ann", "bob", "cat", "cat")] == ["HIT", "HIT", "MISS", "HIT"]
    assert said(await ask(named, "bob")) == said(first) != said(await ask(named, "cat"))


async def test_other_words_are_compared_inside_a_namespace_alone(named: Proxy) -> None:
    await eventually(lambda: named.services.near is not None)
    await ask(named, "ann", ASKED)
    theirs = await ask(named, "cat", ALIKE)
    assert (theirs.outcome, "X-Nearhit-Rule" in theirs.headers) == ("MISS", False)
    assert (await ask(named, "bob", ALIKE)).outcome == "NEAR"
    # Nor does a refused candidate of another namespace show.
    assert "X-Nearhit-Rule" not in (await ask(named, "cat", "entirely another matter")).headers
    assert "X-Nearhit-Rule" in (await ask(named, "bob", OTHER)).headers


async def test_calls_under_way_are_joined_inside_a_namespace_alone(named: Proxy, model: FakeModel) -> None:
    model.respond = held(numbered())
    asking = {who: asyncio.create_task(ask(named, who)) for who in ("ann", "bob", "cat")}
    await eventually(lambda: model.started == 2)
    await eventually(lambda: named.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    answers = {who: await task for who, task in asking.items()}
    outcomes = sorted(answer.outcome for who, answer in answers.items() if who != "cat")
    assert outcomes == ["JOINED", "MISS"]
    assert answers["cat"].outcome == "MISS"
    assert said(answers["ann"]) == said(answers["bob"])
    assert len(model.generations) == 2


async def test_only_if_cached_tells_nothing_of_another_namespace(named: Proxy) -> None:
    await ask(named, "ann")
    refused = await named.chat("x", headers=by("cat", **ONLY))
    unasked = await named.chat("never asked", headers=by("cat", **ONLY))
    assert (refused.status, refused.body) == (unasked.status, unasked.body) == (504, unasked.body)
    differing = ("Date",)
    shown = [{k: v for k, v in answer.headers.items() if k not in differing} for answer in (refused, unasked)]
    assert shown[0] == shown[1]
    assert (await named.chat("x", headers=by("bob", **ONLY))).outcome == "HIT"


async def test_explain_tells_of_the_own_namespace_alone(named: Proxy) -> None:
    await eventually(lambda: named.services.near is not None)
    await ask(named, "ann", ASKED)
    told = {}
    for who in ("bob", "cat"):
        for words in (ASKED, ALIKE):
            body = {"messages": [{"role": "user", "content": words}], "temperature": 0}
            answer = await named.post("/-/explain", json=body, headers=by(who))
            assert answer.status == 200, answer.body
            told[who, words] = answer
    assert [told["bob", words].json["outcome"] for words in (ASKED, ALIKE)] == ["HIT", "NEAR"]
    assert [told["cat", words].json["outcome"] for words in (ASKED, ALIKE)] == ["MISS", "MISS"]
    assert told["cat", ALIKE].json["near"]["candidates"] == []
    assert told["cat", ALIKE].json["nearest_call_elsewhere"] == []
    changed = {"messages": [{"role": "user", "content": ASKED}], "temperature": 0, "seed": 7}
    assert (await named.post("/-/explain", json=changed, headers=by("cat"))).json["nearest_call_elsewhere"] == []
    assert (await named.post("/-/explain", json=changed, headers=by("bob"))).json["nearest_call_elsewhere"]


async def test_feedback_reaches_the_own_namespace_alone(named: Proxy) -> None:
    await ask(named, "ann")
    shown = (await ask(named, "bob")).headers["X-Nearhit-Entry"]
    wrong = {"id": shown, "verdict": "wrong"}
    assert (await named.post("/-/feedback", json=wrong, headers=by("cat"))).status == 404
    assert (await ask(named, "ann")).outcome == "HIT"
    assert (await named.post("/-/feedback", json=wrong, headers=by("bob"))).status == 200
    assert (await ask(named, "ann")).outcome == "MISS"


async def test_the_cache_object_makes_a_room_inside_the_namespace(named: Proxy) -> None:
    room: dict[str, Any] = {"cache": {"namespace": "home"}}
    assert [(await ask(named, who, **room)).outcome for who in ("ann", "bob", "cat")] == ["MISS", "HIT", "MISS"]
    assert (await ask(named, "ann")).outcome == "MISS"
    assert (await named.chat("x", headers=by("cat", **ONLY))).status == 504


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/-/export"),
        ("POST", "/-/import"),
        ("POST", "/-/purge"),
        ("GET", "/-/entries"),
        ("GET", "/-/entries/00000000"),
        ("DELETE", "/-/entries/00000000"),
    ],
)
async def test_what_shows_or_removes_others_answers_needs_the_admin_right(named: Proxy, method: str, path: str) -> None:
    await ask(named, "ann")
    for who in ("ann", "cat", "reader"):
        assert (await named.send(method, path, headers=by(who), data=b"{}")).status == 403
    assert (await named.send(method, path, data=b"{}")).status == 403
    assert (await ask(named, "ann")).outcome == "HIT"


async def test_answers_of_earlier_settings_are_out_of_reach(tmp_path: Path, model: FakeModel) -> None:
    model.respond = numbered()
    key = {"Authorization": f"Bearer {KEYS['ann']}"}
    for setting in ("shared", "per-credential"):
        async with running_proxy(settings_for(tmp_path, model.url, sharing=setting)) as proxy:
            await proxy.chat("x", headers=key)
            await proxy.settled()
    async with running_proxy(settings_for(tmp_path, model.url, sharing="clients", clients=CLIENTS)) as proxy:
        assert [(await ask(proxy, "ann")).outcome for _ in range(2)] == ["MISS", "HIT"]


async def test_answers_are_there_after_a_restart_and_with_a_new_key(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url, sharing="clients", clients=CLIENTS)) as proxy:
        await ask(proxy, "ann")
    renewed = [{"name": "anna", "key": "a-new-key-of-hers", "namespace": "home"}]
    async with running_proxy(settings_for(tmp_path, model.url, sharing="clients", clients=renewed)) as proxy:
        new = {"Authorization": "Bearer a-new-key-of-hers"}
        assert (await proxy.chat("x", headers=new)).outcome == "HIT"
        assert (await proxy.chat("x", headers=by("ann"))).status == 401


def test_a_namespace_is_no_credentials_digest_and_not_the_shared_one() -> None:
    names = ["", "home", "Home", "home ", "authorization: bearer home", "\0", "\ud800", "ключ"]
    digests = {namespace_digest(b"s" * 32, name) for name in names}
    assert len(digests) == len(names)
    assert {len(digest) for digest in digests} == {32}
    assert namespace_digest(b"t" * 32, "home") not in digests


# Rights


async def test_a_reader_is_answered_and_stores_nothing(named: Proxy) -> None:
    assert [(await ask(named, "reader")).outcome for _ in range(2)] == ["MISS", "MISS"]
    assert named.services.metrics.value("nearhit_not_stored_total", {"reason": "read-only"}) == 2
    await ask(named, "ann")
    assert (await ask(named, "reader")).outcome == "HIT"


async def test_a_reader_may_join(named: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    leading = asyncio.create_task(ask(named, "ann"))
    await eventually(lambda: model.started == 1)
    following = asyncio.create_task(ask(named, "reader"))
    await eventually(lambda: named.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    assert ((await leading).outcome, (await following).outcome) == ("MISS", "JOINED")
    assert (await ask(named, "bob")).outcome == "HIT"


async def test_a_client_without_the_cache_neither_reads_nor_stores_nor_joins(named: Proxy, model: FakeModel) -> None:
    assert (await ask(named, "hermit")).outcome == "BYPASS"
    assert (await ask(named, "ann")).outcome == "MISS"
    assert (await ask(named, "hermit")).outcome == "BYPASS"
    model.respond = held(reply())
    leading = asyncio.create_task(ask(named, "ann", "y"))
    await eventually(lambda: model.started == 4)
    alone = asyncio.create_task(ask(named, "hermit", "y"))
    await eventually(lambda: model.started == 5)
    model.release.set()
    assert ((await leading).outcome, (await alone).outcome) == ("MISS", "BYPASS")
    assert (await named.chat("x", headers=by("hermit", **ONLY))).status == 504


async def test_explain_knows_what_a_client_may(named: Proxy) -> None:
    await ask(named, "ann")
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    told = {who: (await named.post("/-/explain", json=body, headers=by(who))).json for who in ("reader", "hermit")}
    assert (told["reader"]["outcome"], told["reader"]["would_store"]["reason"]) == ("HIT", "read-only")
    assert (told["hermit"]["outcome"], told["hermit"]["reason"]) == ("BYPASS", "no-store")


async def test_who_stores_nothing_takes_nothing_away_either(named: Proxy) -> None:
    await ask(named, "ann")
    shown = (await ask(named, "reader")).headers["X-Nearhit-Entry"]
    for who in ("reader", "hermit"):
        answer = await named.post("/-/feedback", json={"id": shown, "verdict": "wrong"}, headers=by(who))
        assert (answer.status, answer.json["error"]["code"]) == (403, "read_only")
    assert (await ask(named, "ann")).outcome == "HIT"


@pytest.mark.parametrize("token", ["", "opensesame"])
async def test_the_admin_right_opens_the_admin_routes(start: StartProxy, token: str) -> None:
    proxy = await start(sharing="clients", clients=CLIENTS, admin__token=token)
    shown = (await ask(proxy, "ann")).status
    assert shown == 200
    far = {"Host": "nearhit.example", "X-Forwarded-For": "8.8.8.8"}
    for path in ("/-/stats", "/-/doctor", "/-/entries", "/-/export", "/v1/cache"):
        assert (await proxy.send("GET", path, headers={**by("boss"), **far})).status == 200
        assert (await proxy.send("GET", path, headers={"X-Api-Key": KEYS["boss"], **far})).status == 200
        assert (await proxy.send("GET", path, headers={**by("ann"), **far})).status == 403
    for more in ({"X-Nearhit-Admin": "wrong"}, {"Origin": "https://evil.example"}):
        assert (await proxy.send("GET", "/-/entries", headers={**by("boss"), **more})).status == 403
    purged = await proxy.post("/-/purge", json={"all": True}, headers={**by("boss"), **far})
    assert (purged.status, (await ask(proxy, "ann")).outcome) == (200, "MISS")


async def test_the_admin_right_gives_no_one_elses_answers(named: Proxy) -> None:
    await ask(named, "ann")
    assert (await ask(named, "boss")).outcome == "MISS"


async def test_an_admin_explains_for_the_client_whose_key_comes_along(named: Proxy) -> None:
    await ask(named, "ann")
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    token = {"X-Nearhit-Admin": named.services.local_token}
    for who, outcome in (("bob", "HIT"), ("cat", "MISS"), ("boss", "MISS")):
        told = (await named.post("/-/explain", json=body, headers={**by(who), **token})).json
        assert told["outcome"] == outcome
    nobody = await named.post("/-/explain", json=body, headers=token)
    assert (nobody.json["outcome"], nobody.json["reason"]) == ("MISS", "credential-unconfirmed")


async def test_explain_wants_a_known_key_or_a_token(named: Proxy) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    unknown = await named.post("/-/explain", json=body, headers={"Authorization": "Bearer nobodys-key"})
    assert (unknown.status, unknown.json["error"]["code"]) == (401, "invalid_api_key")
    without = await named.post("/-/explain", json=body)
    assert (without.status, without.json["error"]["code"]) == (403, "admin_refused")


async def test_this_machine_sees_statistics_without_a_key_as_before(named: Proxy) -> None:
    stats = await named.stats()
    assert stats["sharing"]["setting"] == stats["sharing"]["namespaces"] == "clients"
    assert [one["name"] for one in stats["sharing"]["clients"]] == list(KEYS)
    digests = {one["name"]: one["namespace"] for one in stats["sharing"]["clients"]}
    assert digests["ann"] == digests["bob"] != digests["cat"]
    await ask(named, "ann")
    token = {"X-Nearhit-Admin": named.services.local_token}
    purged = await named.post("/-/purge", json={"namespace": digests["cat"]}, headers=token)
    assert purged.json["removed"] == 0
    purged = await named.post("/-/purge", json={"namespace": digests["ann"]}, headers=token)
    assert purged.json["removed"] == 1


# Together with other options


async def test_overrides_for_a_clients_key_still_hold(start: StartProxy, model: FakeModel) -> None:
    overrides = [{"key": KEYS["ann"], "mode": "off"}]
    proxy = await start(sharing="clients", clients=CLIENTS, cache__overrides=overrides)
    assert [(await ask(proxy, who)).outcome for who in ("ann", "bob", "bob")] == ["BYPASS", "MISS", "HIT"]
    plain = {"X-Api-Key": KEYS["ann"]}
    assert (await proxy.chat("x", headers=plain)).outcome == "BYPASS"


async def test_a_retry_is_one_clients(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(sharing="clients", clients=CLIENTS, cache__retry_window_s=60)
    outcomes = [(await ask(proxy, who, temperature=0.8)).outcome for who in ("ann", "bob", "ann")]
    assert outcomes == ["MISS", "HIT", "MISS"]


async def test_models_of_several_upstreams_are_listed_without_the_clients_key(
    start: StartProxy, model: FakeModel
) -> None:
    model.key = OURS
    proxy = await start(
        sharing="clients", clients=CLIENTS, upstream__api_key=OURS, models={"friend": "tiny"}, upstream__models=["tiny"]
    )
    listed = (await proxy.send("GET", "/v1/models", headers=by("ann"))).json["data"]
    assert {one["id"] for one in listed} == {"friend", "tiny"}
    assert (await proxy.send("GET", "/v1/models")).status == 401
    assert (await proxy.send("GET", "/v1/models/friend")).status == 401
    assert KEYS["ann"] not in heard(model)


async def test_prefix_caches_are_for_admins_and_the_command_lines_token(tmp_path: Path) -> None:
    async with rockchipllama() as rock:
        settings = settings_for(
            tmp_path, rock.url, upstream__kind="rockchipllama", sharing="clients", clients=CLIENTS, cache__mode="exact"
        )
        async with running_proxy(settings) as proxy:
            token = {"X-Nearhit-Admin": proxy.services.local_token}
            statuses = [
                (await proxy.send("GET", "/v1/cache", headers=headers)).status
                for headers in ({}, by("ann"), by("boss"), token, {"X-Nearhit-Admin": "wrong"})
            ]
    assert statuses == [401, 403, 200, 200, 403]


async def test_the_json_log_names_the_client_and_no_key(start: StartProxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = await start(sharing="clients", clients=CLIENTS, log__format="json")
    await ask(proxy, "ann")
    await proxy.chat("x", headers={"Authorization": "Bearer nobodys-key-7"})
    proxy.services.access.write()
    lines: list[dict[str, Any]] = []

    def written() -> bool:
        lines.extend(json.loads(line) for line in capsys.readouterr().err.splitlines())
        return len(lines) == 2

    await eventually(written)
    assert [(line.get("client"), line["status"], line["outcome"]) for line in lines] == [
        ("ann", 200, "MISS"),
        (None, 401, "REFUSED"),
    ]
    assert "nobodys-key-7" not in json.dumps(lines)
