"""Who gets whose answers: nobody gets another's, and nobody whom the upstream would refuse gets any."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict

from proxy.upstream import sharing
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, chat_body, held, numbered, reply

MINE = {"Authorization": "Bearer mine"}
OTHER = {"Authorization": "Bearer other"}
ONLY = {"Cache-Control": "only-if-cached"}


def keyed(*keys: str) -> Any:
    """A server that takes several keys and checks them before the body."""

    async def check(request: web.Request) -> web.StreamResponse | None:
        known = request.headers.get("Authorization", "").removeprefix("Bearer ") in keys
        return None if known else web.json_response({"error": {"message": "Invalid API Key"}}, status=401)

    return check


async def ask(proxy: Proxy, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    answer = await proxy.chat("x", headers=headers, **fields)
    await proxy.settled()
    return answer


async def test_a_server_without_keys_is_shared_by_all(proxy: Proxy) -> None:
    assert (await ask(proxy, MINE)).outcome == "MISS"
    for headers in (OTHER, None, {"X-Api-Key": "k"}, {"Cookie": "a=b"}):
        assert (await ask(proxy, headers)).outcome == "HIT"


async def test_a_server_with_keys_gives_each_credential_its_own_answers(start: StartProxy, model: FakeModel) -> None:
    model.extra, model.respond = keyed("mine", "other"), numbered()
    proxy = await start(upstream__api_key="mine")
    assert not proxy.services.backends.first.gate.shared
    mine = await ask(proxy, MINE)
    other = await ask(proxy, OTHER)
    assert (mine.outcome, other.outcome) == ("MISS", "MISS")
    assert mine.json["choices"] != other.json["choices"]
    again = [await ask(proxy, MINE), await ask(proxy, OTHER)]
    assert [a.outcome for a in again] == ["HIT", "HIT"]
    assert again[0].json["choices"] == mine.json["choices"]


@pytest.mark.parametrize("setting", ["auto", "shared", "per-credential"])
async def test_whom_the_upstream_refuses_gets_nothing_from_the_cache(
    start: StartProxy, model: FakeModel, setting: str
) -> None:
    model.extra = keyed("mine")
    proxy = await start(sharing=setting, upstream__api_key="mine")
    await ask(proxy, MINE)
    assert (await ask(proxy, MINE)).outcome == "HIT"
    for headers in (OTHER, None, {"X-Api-Key": "mine"}, {"Authorization": "bearer  mine"}):
        assert (await ask(proxy, headers)).status == 401
        assert (await ask(proxy, {**(headers or {}), **ONLY})).status == 504


async def test_fixed_sharing_shares_among_those_whom_the_upstream_takes(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine", "other")
    proxy = await start(sharing="shared", upstream__api_key="mine")
    await ask(proxy, MINE)
    assert (await ask(proxy, OTHER)).outcome == "HIT"


async def test_fixed_per_credential_separates_although_the_upstream_takes_anybody(start: StartProxy) -> None:
    proxy = await start(sharing="per-credential")
    await ask(proxy, MINE)
    assert (await ask(proxy, OTHER)).outcome == "MISS"
    assert (await ask(proxy, MINE)).outcome == "HIT"


async def test_a_refused_caller_does_not_lead_others_into_its_refusal(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine")
    proxy = await start(sharing="shared", upstream__api_key="mine")
    model.respond = held(reply())
    good = asyncio.create_task(ask(proxy, MINE))
    await eventually(lambda: model.started == 1)
    assert (await proxy.chat("x", headers=OTHER)).status == 401
    model.release.set()
    assert (await good).status == 200


async def test_a_key_that_was_taken_back_ends_its_answers(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.extra = keyed("mine", "other")
    proxy = await start(upstream__api_key="mine")
    await ask(proxy, OTHER)
    assert (await ask(proxy, OTHER)).outcome == "HIT"
    model.extra = keyed("mine")
    # Any refusal that passes is heard at once ...
    assert (await proxy.send("GET", "/v1/models", headers=OTHER)).status == 401
    assert (await ask(proxy, OTHER)).status == 401
    # ... and without one, the belief ends after its time.
    model.extra = keyed("mine", "other")
    monkeypatch.setattr(sharing, "REFUSED_S", 0.0)
    monkeypatch.setattr(sharing, "CONFIRMED_S", 0.0)
    await proxy.services.backends.first.gate.heard(OTHER, 200, generation=True)
    model.extra = keyed("mine")
    assert (await ask(proxy, OTHER)).status == 401


async def test_a_key_that_appears_later_ends_sharing_at_once(proxy: Proxy, model: FakeModel) -> None:
    await ask(proxy)
    assert (await ask(proxy)).outcome == "HIT"
    model.extra = keyed("mine")
    assert (await proxy.send("GET", "/slots")).status == 401
    assert not proxy.services.backends.first.gate.shared
    assert (await ask(proxy)).status == 401
    assert (await ask(proxy, MINE)).outcome in ("MISS", "BYPASS")


@pytest.mark.parametrize(
    ("key", "body_first", "shared"), [(None, False, True), (None, True, True), ("k", False, False), ("k", True, False)]
)
async def test_auto_tells_servers_with_keys_from_those_without(
    tmp_path: Path, model: FakeModel, key: str | None, body_first: bool, shared: bool
) -> None:
    model.key, model.checks_body_first, model.public_models = key, body_first, True
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        assert proxy.services.backends.first.gate.shared is shared
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        await ask(proxy, headers)
        assert (await ask(proxy, headers)).outcome == "HIT"
        assert (await ask(proxy, {"Authorization": "Bearer wrong"})).status == (200 if shared else 401)


async def test_the_last_verdict_holds_while_the_upstream_is_down(tmp_path: Path, model: FakeModel) -> None:
    model.extra = keyed("mine")
    async with running_proxy(settings_for(tmp_path, model.url, upstream__api_key="mine")) as first:
        await ask(first, MINE)
    model.loading, model.extra = True, None
    async with running_proxy(settings_for(tmp_path, model.url, upstream__api_key="mine")) as second:
        assert not second.services.backends.first.gate.shared
        assert (await ask(second, MINE)).outcome == "HIT"
        assert (await ask(second, OTHER)).status == 503


async def test_before_anything_is_known_nothing_is_shared(tmp_path: Path, model: FakeModel) -> None:
    model.loading = True
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        assert not proxy.services.backends.first.gate.shared
        assert (await ask(proxy)).status == 503


async def test_no_credential_is_anywhere_at_rest_or_in_print(
    tmp_path: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        "Authorization": "Bearer planted-authorization",
        "X-Api-Key": "planted-x-api-key",
        "Cookie": "planted-cookie=1",
    }
    settings = settings_for(
        tmp_path, model.url, sharing="per-credential", log__format="json", upstream__api_key="planted-own-key"
    )
    async with running_proxy(settings) as proxy:
        await proxy.chat("planted-prompt", headers=secrets)
        await proxy.settled()
        assert (await proxy.chat("planted-prompt", headers=secrets)).outcome == "HIT"
        told = (await proxy.send("GET", "/metrics")).body + (await proxy.send("GET", "/-/stats")).body
    files = await asyncio.to_thread(lambda: [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()])
    printed = "".join(capsys.readouterr())
    for planted in ("planted-authorization", "planted-x-api-key", "planted-cookie", "planted-own-key"):
        assert planted.encode() not in b"".join([told, *files])
        assert planted not in printed
    assert b"planted-prompt" not in told
    assert "planted-prompt" not in printed


async def test_cors_fields_of_a_hit_are_the_upstreams_for_that_origin(proxy: Proxy, model: FakeModel) -> None:
    model.cors = True
    await ask(proxy, {"Origin": "http://a.example"})
    for origin in ("http://a.example", "http://b.example"):
        hit = await ask(proxy, {"Origin": origin})
        assert (hit.outcome, hit.headers["Access-Control-Allow-Origin"]) == ("HIT", origin)
    plain = await ask(proxy)
    assert "Access-Control-Allow-Origin" not in plain.headers
    model.loading = True
    assert (await ask(proxy, {"Origin": "http://a.example"})).headers[
        "Access-Control-Allow-Origin"
    ] == "http://a.example"


async def test_a_follower_gets_cors_fields_of_its_own(proxy: Proxy, model: FakeModel) -> None:
    model.cors = True
    model.respond = held(reply())
    tasks = [
        asyncio.create_task(ask(proxy, {"Origin": f"http://{name}.example"}, stream=name == "s"))
        for name in ("a", "b", "s")
    ]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    model.release.set()
    answers = await asyncio.gather(*tasks)
    told = [answer.headers["Access-Control-Allow-Origin"] for answer in answers]
    assert told == ["http://a.example", "http://b.example", "http://s.example"]


async def test_a_cookie_set_for_the_leader_is_not_given_to_a_follower(proxy: Proxy, model: FakeModel) -> None:
    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        await model.release.wait()
        return web.json_response(chat_body(finish_reason="strange"), headers={"Set-Cookie": "session=leader"})

    model.respond = respond
    tasks = [asyncio.create_task(ask(proxy)) for _ in range(2)]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    answers = {answer.outcome: answer for answer in await asyncio.gather(*tasks)}
    assert "Set-Cookie" in answers["MISS"].headers
    assert "Set-Cookie" not in answers.get("JOINED", Answer(0, {}, b"")).headers


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_an_open_path_of_a_server_with_keys_proves_nothing(
    start: StartProxy, model: FakeModel, method: str
) -> None:
    async def keys_for_answers_alone(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST":
            return web.json_response({"object": "list", "data": [{"id": "tiny"}]})
        return await keyed("mine")(request)  # type: ignore[no-any-return]

    model.extra = keys_for_answers_alone
    proxy = await start(sharing="shared")
    await ask(proxy, MINE)
    assert (await ask(proxy, OTHER)).status == 401
    assert (await proxy.send(method, "/v1/models", headers=OTHER)).status == 200
    assert (await ask(proxy, OTHER)).status == 401


async def test_a_key_in_a_field_that_we_do_not_know_opens_nothing_to_those_without(
    start: StartProxy, model: FakeModel
) -> None:
    async def unusual(request: web.Request) -> web.StreamResponse | None:
        known = request.headers.get("X-Door") == "open" or request.method != "POST"
        return None if known else web.json_response({"error": {"message": "no"}}, status=401)

    model.extra = unusual
    proxy = await start()
    assert (await ask(proxy, {"X-Door": "open"})).status == 200
    assert (await ask(proxy)).status == 401


async def test_every_repeated_field_of_a_credential_counts(start: StartProxy) -> None:
    proxy = await start(sharing="per-credential")
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    outcomes = []
    for session in ("alice", "bob", "alice"):
        headers = CIMultiDict([("Cookie", "theme=dark"), ("Cookie", f"session={session}")])
        outcomes.append((await proxy.post("/v1/chat/completions", json=body, headers=headers)).outcome)
        await proxy.settled()
    assert outcomes == ["MISS", "MISS", "HIT"]


@pytest.mark.parametrize("status", [401, 403, 429])
async def test_what_was_said_to_one_caller_is_not_said_to_those_who_joined(
    proxy: Proxy, model: FakeModel, status: int
) -> None:
    async def personal(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        await model.release.wait()
        if request.headers["Authorization"] == "Bearer mine":
            return web.json_response({"error": {"message": "quota of mine"}}, status=status)
        return await reply("fine")(model, request, asked)

    model.respond = personal
    leader = asyncio.create_task(proxy.chat("x", headers=MINE))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x", headers=OTHER))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    assert ((await leader).status, (await follower).status) == (status, 200)


async def test_a_failed_answer_does_not_take_an_origins_cors_fields_away(proxy: Proxy, model: FakeModel) -> None:
    model.cors = True
    origin = {"Origin": "http://a.example"}
    await ask(proxy, origin)
    model.cors, model.loading = False, True
    await proxy.chat("another", headers=origin)
    assert (await ask(proxy, origin)).headers["Access-Control-Allow-Origin"] == "http://a.example"
