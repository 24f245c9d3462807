"""What the server is shown, and says, is one caller's: it vouches for nobody else and is shown to nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, chat_body, chat_events, error, numbered, reply, sse
from tests.web.test_clients import CLIENTS, OURS, by, said
from tests.web.test_sharing import ONLY, keyed

DUMMY = {"Authorization": "Bearer dummy"}
"""What programs send that must send something."""
GOOD = {"Authorization": "Bearer good"}
CHAT = "/v1/chat/completions"


async def ask(proxy: Proxy, headers: dict[str, str] | None = None, target: str = CHAT, **fields: Any) -> Answer:
    body = {"messages": [{"role": "user", "content": "secret?"}], "temperature": 0, **fields}
    answer = await proxy.post(target, json=body, headers=headers or {})
    await proxy.settled()
    return answer


# Keys where nearhit does not look for them


def accepts(headers: dict[str, str], query: dict[str, str]) -> Any:
    """A server that takes any one of these for a key. Its list of models is open to all."""

    async def check(request: web.Request) -> web.StreamResponse | None:
        shown = [request.headers.get(name) == value for name, value in headers.items()]
        shown += [request.query.get(name) == value for name, value in query.items()]
        return None if any(shown) or request.path == "/v1/models" else error(401, "no key", "authentication_error")

    return check


@pytest.mark.parametrize("sharing", ["auto", "shared", "per-credential"])
@pytest.mark.parametrize("headers", [{}, DUMMY])
@pytest.mark.parametrize("fields", [{}, {"store": True}])
async def test_a_key_in_the_query_vouches_for_nobody_else(
    start: StartProxy, model: FakeModel, sharing: str, headers: dict[str, str], fields: dict[str, Any]
) -> None:
    model.extra, model.respond = accepts(GOOD, {"key": "good"}), numbered()
    proxy = await start(sharing=sharing)
    assert (await ask(proxy, GOOD)).status == 200
    # With `store`, it passes by the cache.
    assert (await ask(proxy, headers, target=f"{CHAT}?key=good", **fields)).status == 200
    assert (await ask(proxy, {**headers, **ONLY})).status == 504
    assert (await ask(proxy, headers)).status == 401


@pytest.mark.parametrize("sharing", ["auto", "shared", "per-credential"])
@pytest.mark.parametrize("fields", [{}, {"store": True}])
async def test_a_key_in_an_unknown_field_vouches_for_nobody_else(
    start: StartProxy, model: FakeModel, sharing: str, fields: dict[str, Any]
) -> None:
    model.extra, model.respond = accepts({"X-Tenant": "good"}, {}), numbered()
    proxy = await start(sharing=sharing)
    tenant = {**DUMMY, "X-Tenant": "good"}
    for more in (fields, {}):
        assert (await ask(proxy, tenant, **more)).status == 200
    assert (await ask(proxy, {**DUMMY, **ONLY})).status == 504
    assert (await ask(proxy, DUMMY)).status == 401


@pytest.mark.parametrize("name", ["X_Api_Key", "Api_Key", "X-Access_Key", "Ocp-Apim-Subscription_Key"])
async def test_a_key_is_a_key_in_a_field_that_is_spelled_with_underscores(
    start: StartProxy, model: FakeModel, name: str
) -> None:
    model.respond = numbered()
    proxy = await start(sharing="per-credential")
    told = [said(await ask(proxy, {name: key})) for key in ("mine", "other", "mine")]
    assert told[0] == told[2] != told[1]


# Fields of requests


async def test_a_field_that_the_key_covers_cannot_be_kept_from_the_server(proxy: Proxy, model: FakeModel) -> None:
    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        return await reply(request.headers.get("OpenAI-Beta", "without"))(model, request, asked)

    model.respond = respond
    beta = {"OpenAI-Beta": "with"}
    # Such a field is for the next hop alone, which this one is not.
    await ask(proxy, {**beta, "Connection": "keep-alive, openai-beta"})
    answer = await ask(proxy, beta)
    assert (answer.outcome, said(answer)) == ("HIT", "with")


# Fields and errors of answers

PERSONAL = {
    "OpenAI-Organization": "planted",
    "OpenAI-Processing-Ms": "7",
    "X-Session-Id": "planted",
    "X-RateLimit-Remaining-Requests": "planted",
    "X-Request-Id": "planted",
    "X-Account-Balance": "planted",
    "Set-Cookie": "who=planted",
    "Link": "<http://h/planted>",
}


@pytest.mark.parametrize("stream", [False, True])
async def test_who_joins_a_call_sees_nothing_of_whose_it_is(proxy: Proxy, model: FakeModel, stream: bool) -> None:
    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        await model.release.wait()
        if not stream:
            return web.json_response(chat_body("fine"), headers=PERSONAL)
        kind = {"Content-Type": "text/event-stream"}
        return web.Response(body=sse(*chat_events("fine")), headers={**kind, **PERSONAL})

    model.respond = respond
    leader = asyncio.create_task(proxy.chat("x", stream=stream))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x", stream=stream))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    first, second = await leader, await follower
    assert (first.headers["X-Request-Id"], second.outcome) == ("planted", "JOINED")
    assert "planted" not in repr(second.headers)
    assert second.headers["Content-Type"] == first.headers["Content-Type"]
    assert b'"fine"' in second.body


@pytest.mark.parametrize("status", [402, 404])
async def test_a_refusal_of_one_caller_is_not_told_to_another_who_joined(
    start: StartProxy, model: FakeModel, status: int
) -> None:
    async def respond(model: FakeModel, request: web.Request, asked: Any) -> web.StreamResponse:
        await model.release.wait()
        if request.headers.get("Authorization") == "Bearer poor":
            return error(status, "the balance of poor is 0", "billing_error")
        return web.json_response(chat_body())

    model.respond = respond
    proxy = await start(sharing="shared")
    leader = asyncio.create_task(proxy.chat("x", headers={"Authorization": "Bearer poor"}))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x", headers=GOOD))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    assert ((await leader).status, (await follower).status) == (status, 200)


# Lists of models


@pytest.mark.parametrize("sharing", ["auto", "shared", "per-credential"])
async def test_models_are_not_told_to_whom_the_server_refuses(
    start: StartProxy, model: FakeModel, sharing: str
) -> None:
    model.key, model.models = "good", ["secret-finetune"]
    proxy = await start(sharing=sharing, upstream__api_key="good", models={"friend": "secret-finetune"})
    for headers in ({}, DUMMY):
        refused = await proxy.send("GET", "/v1/models", headers=headers)
        assert (refused.status, refused.json["error"]["message"]) == (401, "Invalid API Key")
    told = (await proxy.send("GET", "/v1/models", headers=GOOD)).json["data"]
    assert [one["id"] for one in told] == ["friend", "secret-finetune"]


async def test_named_clients_are_told_all_models(start: StartProxy, model: FakeModel) -> None:
    model.extra, model.models = keyed(OURS), ["tuned"]
    proxy = await start(sharing="clients", clients=CLIENTS, upstream__api_key=OURS, models={"friend": "tuned"})
    told = (await proxy.send("GET", "/v1/models", headers=by("hermit"))).json["data"]
    assert [one["id"] for one in told] == ["friend", "tuned"]
