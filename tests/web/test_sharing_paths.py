"""Keys that are checked on some paths alone: nobody gets another's answer, before anybody was refused or after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from proxy.cache.dialects import DIALECTS
from proxy.upstream.sharing import Sharing, Verdict
from proxy.upstream.verdict import PATHS
from tests.conftest import Answer, Proxy, StartProxy, running_proxy, settings_for
from tests.emulators.rockchipllama import rockchipllama
from tests.fake_model import PROBE, FakeModel, Json, chat_body, error
from tests.web.test_messages import message
from tests.web.test_responses import answer as response
from tests.web.test_responses import message as output

MINE = {"Authorization": "Bearer mine"}
OTHER = {"Authorization": "Bearer other"}
ONLY = {"Cache-Control": "only-if-cached"}

CALLS: dict[str, dict[str, Json]] = {
    "chat": {"messages": [{"role": "user", "content": "x"}], "temperature": 0},
    "completions": {"prompt": "x", "temperature": 0},
    "responses": {"input": "x", "temperature": 0, "store": False},
    "messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "temperature": 0},
    "embeddings": {"input": "x"},
}
ENDPOINTS = {path: dialect.endpoint for dialect in DIALECTS for path in dialect.paths}


def answer_of(endpoint: str, number: int) -> Json:
    """What a server says; each time something else."""
    match endpoint:
        case "responses":
            return response(output(f"answer {number}"))
        case "messages":
            return message({"type": "text", "text": f"answer {number}"})
        case "embeddings":
            return {
                "object": "list",
                "model": "tiny",
                "data": [{"object": "embedding", "index": 0, "embedding": [number]}],
            }
        case "completions":
            choice = {"index": 0, "text": f"answer {number}", "finish_reason": "stop"}
            return {**chat_body(), "object": "text_completion", "choices": [choice]}
        case _:
            return chat_body(f"answer {number}")


Answering = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


class Server:
    """A server with all paths, which checks keys on some. `odd` says something else than an answer there."""

    def __init__(self, *guarded: str, keys: tuple[str, ...] = ("mine",), body_first: bool = False) -> None:
        self.guarded = set(guarded)
        self.keys = keys
        self.body_first = body_first
        self.status = 401
        self.odd: dict[str, int] = {}
        self.absent: set[str] = set()
        self.header = "Authorization"
        self.asked: list[tuple[str, bool, bool]] = []
        """Path, whether the body was empty, and whether the credential was nearhit's invalid one."""
        self._answers = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse | None:
        if request.path not in ENDPOINTS or request.method != "POST":
            return None
        asked = await request.json()
        shown = request.headers.get("Authorization", "")
        self.asked.append((request.path, not asked, shown.startswith(PROBE)))
        if request.path in self.absent:
            return error(404, "no such path", "not_found_error")
        if not asked and self.body_first:
            return error(400, "something is missing", "invalid_request_error")
        key = request.headers.get(self.header, "").removeprefix("Bearer ")
        if request.path in self.guarded and key not in self.keys:
            return error(self.status, "Invalid API Key", "authentication_error")
        if not asked:
            return error(400, "something is missing", "invalid_request_error")
        if request.path in self.odd:
            return error(self.odd[request.path], "not this model", "server_error")
        self._answers += 1
        return web.json_response(answer_of(ENDPOINTS[request.path], self._answers))


async def ask(proxy: Proxy, path: str, headers: dict[str, str] | None = None) -> Answer:
    answer = await proxy.post(path, json=CALLS[ENDPOINTS[path]], headers=headers or {})
    await proxy.settled()
    return answer


def verdict(proxy: Proxy) -> Verdict:
    return proxy.services.backends.first.gate.verdict


def shared(proxy: Proxy) -> bool:
    return proxy.services.backends.first.gate.shared


def test_every_path_whose_answers_are_kept_is_asked() -> None:
    assert sorted(PATHS) == sorted(ENDPOINTS)


@pytest.mark.parametrize("body_first", [False, True])
@pytest.mark.parametrize("path", [path for path in ENDPOINTS if path != "/v1/chat/completions"])
async def test_one_guarded_path_is_enough(start: StartProxy, model: FakeModel, path: str, body_first: bool) -> None:
    model.extra = Server(path, body_first=body_first)
    proxy = await start()
    assert (await ask(proxy, path, MINE)).outcome == "MISS"
    assert (await ask(proxy, path, MINE)).outcome == "HIT"
    # Nobody was refused before: the first one is not answered with what another was told.
    assert (await ask(proxy, path, OTHER)).status == 401
    assert (await ask(proxy, path, {**OTHER, **ONLY})).status == 504
    assert (await ask(proxy, path)).status == 401
    assert not shared(proxy)


@pytest.mark.parametrize("status", [401, 403])
async def test_what_is_open_is_kept_for_each_caller(start: StartProxy, model: FakeModel, status: int) -> None:
    model.extra = server = Server("/v1/messages")
    server.status = status
    proxy = await start()
    outcomes = [(await ask(proxy, "/v1/chat/completions", who)).outcome for who in (MINE, OTHER, None) * 2]
    assert outcomes == ["MISS"] * 3 + ["HIT"] * 3


async def test_a_gateway_that_refuses_all_but_chat_leaves_chat_its_answers(start: StartProxy, model: FakeModel) -> None:
    model.extra = server = Server(*ENDPOINTS, keys=())
    server.guarded.remove("/v1/chat/completions")
    server.status = 403
    proxy = await start()
    assert [(await ask(proxy, "/v1/chat/completions", MINE)).outcome for _ in range(2)] == ["MISS", "HIT"]


@pytest.mark.parametrize("setting", [Sharing.AUTO, Sharing.SHARED, Sharing.PER_CREDENTIAL])
async def test_a_key_that_opens_one_path_opens_no_other(start: StartProxy, model: FakeModel, setting: str) -> None:
    model.extra = Server("/v1/embeddings")
    proxy = await start(sharing=setting)
    await ask(proxy, "/v1/embeddings", MINE)
    assert (await ask(proxy, "/v1/chat/completions", OTHER)).status == 200
    assert (await ask(proxy, "/v1/embeddings", {**OTHER, **ONLY})).status == 504
    assert (await ask(proxy, "/v1/embeddings", OTHER)).status == 401


async def test_a_key_that_is_not_seen_opens_nothing_on_a_guarded_path(start: StartProxy, model: FakeModel) -> None:
    model.extra = server = Server("/v1/embeddings")
    server.header = "X-Door"
    proxy = await start()
    assert (await ask(proxy, "/v1/chat/completions")).status == 200
    assert (await ask(proxy, "/v1/embeddings", {"X-Door": "mine"})).status == 200
    assert (await ask(proxy, "/v1/embeddings", ONLY)).status == 504
    assert (await ask(proxy, "/v1/embeddings")).status == 401


async def test_a_guard_that_comes_later_is_found(start: StartProxy, model: FakeModel) -> None:
    model.extra = server = Server()
    proxy = await start(sharing="shared")
    await ask(proxy, "/v1/embeddings", MINE)
    assert (await ask(proxy, "/v1/embeddings", OTHER)).outcome == "HIT"
    server.guarded = {"/v1/embeddings", "/v1/messages"}
    assert (await ask(proxy, "/v1/messages", OTHER)).status == 401
    assert (await ask(proxy, "/v1/chat/completions", OTHER)).status == 200
    assert (await ask(proxy, "/v1/embeddings", OTHER)).status == 401
    assert (await ask(proxy, "/v1/embeddings", MINE)).outcome == "HIT"


async def test_a_server_that_takes_anybody_is_asked_little(start: StartProxy, model: FakeModel) -> None:
    model.extra = server = Server(body_first=True)
    server.absent = {"/chat/completions", "/messages", "/responses"}
    proxy = await start()
    assert shared(proxy)
    # All that costs nothing before anything that costs a token.
    empty = [(path, True, True) for path in PATHS]
    assert server.asked == empty + [(path, False, True) for path in PATHS if path not in server.absent]
    await ask(proxy, "/v1/embeddings", MINE)
    assert (await ask(proxy, "/v1/embeddings", OTHER)).outcome == "HIT"


async def test_a_refusal_ends_the_asking(start: StartProxy, model: FakeModel) -> None:
    model.extra = server = Server(*PATHS)
    await start()
    assert server.asked == [("/v1/chat/completions", True, True)]


async def test_llama_cpp_is_not_made_to_work(start: StartProxy, model: FakeModel) -> None:
    async def complaining(request: web.Request) -> web.StreamResponse | None:
        # As llama.cpp says it.
        if request.path == "/v1/messages" and await request.read() == b"{}":
            return error(500, "'messages' is required", "server_error")
        if request.path == "/v1/embeddings":
            return error(501, "This server does not support embeddings", "not_supported_error")
        return None

    model.props = {"default_generation_settings": {}, "model_path": "a.gguf", "build_info": "b1"}
    model.extra = complaining
    proxy = await start()
    assert shared(proxy)
    mine = [seen for seen in model.seen if seen.headers.get("Authorization", "").startswith(PROBE)]
    assert {seen.body for seen in mine} == {b"{}"}


CHAT, VECTORS = "/v1/chat/completions", "/v1/embeddings"


async def as_told(proxy: Proxy) -> str:
    """What `/-/stats` says of the upstream and keys."""
    answer = await proxy.send("GET", "/-/stats", headers={"X-Nearhit-Admin": proxy.services.local_token})
    return str(answer.json["sharing"]["upstream_checks_keys"])


@pytest.mark.parametrize("status", [400, 404, 422, 500])
async def test_a_path_that_does_not_tell_takes_nothing_from_those_that_do(
    start: StartProxy, model: FakeModel, status: int
) -> None:
    model.extra = server = Server()
    server.odd = {VECTORS: status}
    proxy = await start()
    assert await as_told(proxy) == "accepted-in-part"
    asked = len(server.asked)
    assert [(await ask(proxy, CHAT, who)).outcome for who in (MINE, OTHER, None)] == ["MISS", "HIT", "HIT"]
    assert (await ask(proxy, VECTORS, MINE)).status == status
    assert len(server.asked) == asked + 2, "nobody need be tried out where nobody is refused"
    # It would have had to say so for each of them to be told what another was.
    server.odd = {}
    assert [(await ask(proxy, VECTORS, who)).outcome for who in (MINE, OTHER) * 2] == ["MISS"] * 2 + ["HIT"] * 2


async def test_with_fixed_sharing_a_path_that_does_not_tell_gives_nobody_anothers_answer(
    start: StartProxy, model: FakeModel
) -> None:
    model.extra = server = Server()
    server.odd = {VECTORS: 400}
    proxy = await start(sharing="shared")
    # From now on it does check them, and for good questions alone.
    server.odd, server.guarded, server.body_first = {}, {VECTORS}, True
    assert (await ask(proxy, VECTORS, MINE)).status == 200
    assert (await ask(proxy, VECTORS, {**OTHER, **ONLY})).status == 504
    assert (await ask(proxy, VECTORS, OTHER)).status == 401
    assert [(await ask(proxy, CHAT, who)).outcome for who in (MINE, OTHER)] == ["MISS", "HIT"]


async def test_what_one_path_did_not_tell_is_not_guessed_while_the_server_is_away(
    tmp_path: Path, model: FakeModel
) -> None:
    model.extra = server = Server()
    server.odd = {VECTORS: 400}
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as before:
        assert (await ask(before, CHAT, MINE)).status == 200
        server.odd = {}
        assert (await ask(before, VECTORS, MINE)).status == 200
    model.loading, model.extra = True, None
    async with running_proxy(settings) as after:
        assert await as_told(after) == "accepted-in-part"
        # Only that some path took anybody is remembered, not which.
        outcomes = [
            (await ask(after, path, {**who, **ONLY})).status for path in (CHAT, VECTORS) for who in (MINE, OTHER)
        ]
        assert outcomes == [504, 504, 200, 504]


@pytest.mark.parametrize("status", [429, 502, 503, 504, 302])
async def test_a_path_that_cannot_be_asked_now_leaves_it_open(start: StartProxy, model: FakeModel, status: int) -> None:
    model.extra = server = Server()

    async def broken(request: web.Request) -> web.StreamResponse | None:
        gone = request.path == "/v1/messages" and request.method == "POST"
        return web.Response(status=status, headers={"Location": "/login"}) if gone else await server(request)

    model.extra = broken
    proxy = await start()
    assert verdict(proxy) is Verdict.UNCLEAR
    await ask(proxy, "/v1/chat/completions", MINE)
    assert (await ask(proxy, "/v1/chat/completions", OTHER)).outcome == "MISS"
    assert (await ask(proxy, "/v1/chat/completions", MINE)).outcome == "HIT"


async def test_what_was_found_out_of_one_path_alone_is_not_believed_any_more(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as before:
        assert shared(before)
        backend = before.services.backends.first
        # As versions kept it that asked one path alone.
        await before.services.store.note(backend.upstream.origin, "sharing", "accepted", 1)
    model.loading = True
    async with running_proxy(settings) as after:
        assert not shared(after)


async def test_what_was_found_out_of_all_paths_is_remembered(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as before:
        assert shared(before)
    model.loading = True
    async with running_proxy(settings) as after:
        assert shared(after)


KEY = "key-in-a-path-0001"


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_a_key_in_the_path_of_somebody_unknown_is_not_logged(
    start: StartProxy, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    clients = [{"name": "ann", "key": "key-of-ann-0001"}]
    proxy = await start(sharing="clients", clients=clients, log__format=log_format)
    asks = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    for method, target, headers in (
        ("GET", f"/{KEY}/v1/models", {}),
        ("GET", f"/{KEY}/v1/models", OTHER),
        ("POST", f"/v1/{KEY}/chat/completions", {}),
        ("GET", f"/v1/models/{KEY}", {}),
        ("DELETE", f"/v1/cache/{KEY}/a", {}),
        ("OPTIONS", f"/{KEY}/v1/chat/completions", asks),
        ("POST", "/v1/chat/completions", {}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/embeddings", {}),
    ):
        await proxy.send(method, target, headers=headers)
    proxy.services.access.write()
    logged = ""
    async with asyncio.timeout(10):
        while logged.count("\n") < 9:
            await asyncio.sleep(0.005)
            logged += capsys.readouterr().err
    assert KEY not in logged
    lines = logged.splitlines()
    paths = [json.loads(line)["path"] if log_format == "json" else line.split()[3] for line in lines]
    assert paths == [
        "/…",
        "/…",
        "/…",
        "/v1/models/…",
        "/v1/cache/…",
        "/…",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/embeddings",
    ]


@asynccontextmanager
async def gateway(upstream: str, guarded: tuple[str, ...]) -> AsyncIterator[str]:
    """A gateway before a server without keys, which wants one on some paths."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path in guarded and request.headers.get("Authorization") != MINE["Authorization"]:
            return error(401, "who are you?", "authentication_error")
        async with session.request(request.method, upstream + request.path, data=await request.read()) as response:
            kind = {"Content-Type": response.headers.get("Content-Type", "application/json")}
            return web.Response(status=response.status, body=await response.read(), headers=kind)

    app = web.Application()
    app.router.add_route("*", "/{path:(?s:.*)}", handle)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.mark.parametrize("guarded", [(), ("/v1/chat/completions",), ("/v1/completions",), PATHS])
async def test_a_gateway_before_a_server_without_keys_is_heard(tmp_path: Path, guarded: tuple[str, ...]) -> None:
    async with rockchipllama() as server, gateway(server.url, guarded) as url:
        settings = settings_for(tmp_path, url, upstream__api_key="mine", upstream__kind="rockchipllama")
        async with running_proxy(settings) as proxy:
            assert shared(proxy) is not bool(guarded)
            for who in (MINE, OTHER):
                refused = who is OTHER and "/v1/chat/completions" in guarded
                assert (await ask(proxy, "/v1/chat/completions", who)).status == (401 if refused else 200)
                if not refused:
                    assert (await ask(proxy, "/v1/chat/completions", who)).outcome == "HIT"
