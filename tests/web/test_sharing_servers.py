"""Who shares, at servers as they are: what they say to a key that cannot be valid, and what it costs them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from proxy.upstream.adapter import Reply
from proxy.upstream.rkllama import Rkllama
from proxy.upstream.verdict import Trial, Verdict
from tests.conftest import Proxy, StartProxy, running_proxy, settings_for
from tests.fake_model import PROBE, FakeModel, error
from tests.web.test_sharing_paths import ENDPOINTS, MINE, ONLY, OTHER, answer_of, ask, shared

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def ours(shown: str) -> bool:
    return shown.startswith(PROBE)


async def quiet(proxy: Proxy) -> None:
    """Wait until nothing of nearhit's own is under way."""
    for one in proxy.services.backends:
        while one.tasks:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", ["error", "page", "empty"])
async def test_a_refusal_that_comes_with_200_is_no_acceptance(start: StartProxy, model: FakeModel, how: str) -> None:
    async def door(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST" or request.headers.get("Authorization") == "Bearer mine":
            return None
        if how == "error":
            return web.json_response({"error": {"message": "invalid api key", "code": 401}})
        if how == "empty":
            return web.json_response({})
        return web.Response(text="<html>log in</html>", content_type="text/html")

    model.extra = door
    proxy = await start()
    assert (await ask(proxy, CHAT, MINE)).status == 200
    other = await ask(proxy, CHAT, {**OTHER, **ONLY})
    assert other.status == 504, other.body


async def test_a_path_that_was_not_there_and_comes_with_a_guard(start: StartProxy, model: FakeModel) -> None:
    there = False

    async def server(request: web.Request) -> web.StreamResponse | None:
        if request.path != VECTORS:
            return None
        if not there:
            return error(404, "no such path", "not_found_error")
        if request.headers.get("Authorization") != "Bearer mine":
            return error(401, "Invalid API Key", "authentication_error")
        return web.json_response(answer_of("embeddings", 1))

    model.extra = server
    proxy = await start()
    assert shared(proxy)
    there = True
    assert (await ask(proxy, VECTORS, MINE)).status == 200
    await quiet(proxy)
    assert (await ask(proxy, VECTORS, {**OTHER, **ONLY})).status == 504
    assert (await ask(proxy, VECTORS, OTHER)).status == 401


async def test_a_path_that_misses_the_model_first_and_the_key_then(start: StartProxy, model: FakeModel) -> None:
    """As Ollama says it of `/v1/completions` ("model '' not found"), behind a gateway with keys by path."""

    async def server(request: web.Request) -> web.StreamResponse | None:
        if request.path != TEXT:
            return None
        if not (await request.json()).get("model"):
            return error(404, "model '' not found", "not_found_error")
        if request.headers.get("Authorization") != "Bearer mine":
            return error(401, "Invalid API Key", "authentication_error")
        return web.json_response(answer_of("completions", 1))

    model.extra = server
    proxy = await start()
    asked = {"prompt": "x", "temperature": 0, "model": "tiny"}
    assert (await proxy.post(TEXT, json=asked, headers=MINE)).status == 200
    await proxy.settled()
    await quiet(proxy)
    assert (await proxy.post(TEXT, json=asked, headers={**OTHER, **ONLY})).status == 504
    assert (await proxy.post(TEXT, json=asked, headers=OTHER)).status == 401


@pytest.mark.parametrize("status", [302, 200, 503])
async def test_a_login_page_before_a_server_without_keys(status: int) -> None:
    class Page:
        async def get(self, path: str) -> Reply:
            return Reply(status, None)

    told = await Trial(Page(), Rkllama.capabilities).everywhere()  # type: ignore[arg-type]  # no more is asked of it
    assert told.verdict is Verdict.UNCLEAR


async def test_another_server_that_cannot_be_asked_does_not_inherit_that_anybody_was_taken(
    tmp_path: Path, model: FakeModel
) -> None:
    settings = settings_for(tmp_path, model.url)
    async with running_proxy(settings) as before:
        assert shared(before)

    async def another(request: web.Request) -> web.StreamResponse | None:
        """It locks out whoever shows bad keys for a while."""
        if request.method != "POST":
            return None
        key = request.headers.get("Authorization", "")
        if key != "Bearer mine":
            return error(429 if ours(key) else 401, "no", "authentication_error")
        return None

    model.extra = another
    async with running_proxy(settings) as after:
        assert (await ask(after, CHAT, MINE)).status == 200
        assert (await ask(after, CHAT, {**OTHER, **ONLY})).status == 504
        assert (await ask(after, CHAT, OTHER)).status == 401


class Ollama:
    """One model at a time, loaded on demand. An empty body is refused as by ollama's middleware/openai.go."""

    models = ("all-minilm:latest", "llama3:70b", "nomic-embed-text:latest", "qwen3:4b")

    def __init__(self) -> None:
        self.loaded = "qwen3:4b"
        self.loads: list[str] = []
        self.answers = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST":
            return None
        if request.path not in (CHAT, TEXT, VECTORS, "/v1/responses", "/v1/messages"):
            return web.Response(status=404, text="404 page not found")
        asked = await request.json()
        if request.path in (CHAT, "/v1/messages") and not asked.get("messages"):
            return error(400, "[] is too short - 'messages'", "invalid_request_error")
        if request.path == VECTORS and not asked.get("input"):
            return error(400, "invalid input", "invalid_request_error")
        name = asked.get("model", "")
        if name not in self.models:
            return error(404 if name or request.path == TEXT else 400, f"model '{name}' not found", "not_found_error")
        if name != self.loaded:
            self.loads.append(name)
            self.loaded = name
        self.answers += 1
        return web.json_response(answer_of(ENDPOINTS[request.path], self.answers))


async def chat(proxy: Proxy, who: dict[str, str], content: str = "x") -> str:
    answer = await proxy.chat(content, headers=who, model="qwen3:4b")
    await proxy.settled()
    await quiet(proxy)
    assert answer.status == 200, answer.body
    return answer.outcome


async def test_of_several_models_one_at_most_is_loaded_to_find_out(
    start: StartProxy, model: FakeModel, ollama: Ollama
) -> None:
    model.models, model.extra = list(Ollama.models), ollama
    proxy = await start()
    assert len(ollama.loads) <= 1
    for _ in range(2):
        await chat(proxy, MINE)
        await chat(proxy, OTHER)
    # What was loaded to find out, and then the one that is asked.
    assert ollama.loads[1:] in ([], ["qwen3:4b"])


@pytest.fixture
def ollama() -> Ollama:
    return Ollama()


async def test_ollama_callers_with_different_dummy_keys_share(
    start: StartProxy, model: FakeModel, ollama: Ollama
) -> None:
    model.models, model.extra = list(Ollama.models), ollama
    proxy = await start()
    await chat(proxy, MINE, "first")
    assert [await chat(proxy, who) for who in (MINE, OTHER)] == ["MISS", "HIT"]


async def test_a_server_that_was_busy_when_it_was_asked_is_asked_again(start: StartProxy, model: FakeModel) -> None:
    busy = True

    async def server(request: web.Request) -> web.StreamResponse | None:
        return error(503, "server is busy", "server_busy") if busy and request.method == "POST" else None

    model.extra = server
    proxy = await start()
    busy = False
    await ask(proxy, CHAT, MINE)
    await quiet(proxy)
    first = await proxy.chat("y", headers=MINE)
    await proxy.settled()
    assert first.status == 200
    assert (await proxy.chat("y", headers=OTHER)).outcome == "HIT"


async def test_lm_studio_callers_share(start: StartProxy, model: FakeModel) -> None:
    """It says 200 of paths that it does not have: lmstudio-bug-tracker issue 618. Several models, loaded on demand."""
    loads: list[str] = []

    async def server(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST":
            return None
        if not request.path.startswith("/v1/"):
            return web.json_response({"error": f"Unexpected endpoint or method. (POST {request.path})"})
        asked = await request.json()
        if not asked.keys() & {"messages", "input", "prompt"}:
            return error(400, "'messages' field is required", "invalid_request_error")
        if asked.get("model") not in ("", None, "qwen3-4b"):
            loads.append(asked["model"])
        return web.json_response(answer_of(ENDPOINTS[request.path], 1))

    model.models, model.extra = ["google/gemma-27b", "qwen3-4b", "text-embedding-nomic"], server
    proxy = await start()
    outcomes: list[str] = []
    for content in ("first", "second"):
        outcomes.clear()
        for who in (MINE, OTHER):
            answer = await proxy.chat(content, headers=who, model="qwen3-4b")
            await proxy.settled()
            await quiet(proxy)
            outcomes.append(answer.outcome)
    assert outcomes == ["MISS", "HIT"]
    assert len(loads) <= 1


@pytest.mark.parametrize("key", [None, "mine"])
async def test_vllm_chat_model(start: StartProxy, model: FakeModel, key: str | None) -> None:
    """FastAPI: routes that the model has not are 404; the key is checked in a middleware before all."""
    probes: list[str] = []

    async def server(request: web.Request) -> web.StreamResponse | None:
        if request.method != "POST":
            return None
        if ours(request.headers.get("Authorization", "")):
            probes.append(request.path)
        if key and request.path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path not in (CHAT, TEXT, "/v1/responses", "/v1/messages"):
            return web.json_response({"detail": "Not Found"}, status=404)
        if not (await request.json()).keys() & {"messages", "input", "prompt"}:
            return error(400, "Field required", "BadRequestError")
        return web.json_response(answer_of(ENDPOINTS[request.path], 1))

    model.extra = server
    proxy = await start()
    outcomes = [(await ask(proxy, CHAT, who)).outcome for who in (MINE, OTHER)]
    assert key is not None or outcomes == ["MISS", "HIT"]
    assert len(probes) == (12 if key is None else 1)


async def test_a_guard_on_a_path_that_was_never_asked_properly_is_found(
    start: StartProxy, model: FakeModel, ollama: Ollama
) -> None:
    """Several models, and vectors want a key that is checked after the body."""

    async def server(request: web.Request) -> web.StreamResponse | None:
        asked = await request.json() if request.method == "POST" else {}
        if request.path == VECTORS and asked and request.headers.get("Authorization") != "Bearer mine":
            return error(401, "Invalid API Key", "authentication_error")
        return await ollama(request)

    model.models, model.extra = list(Ollama.models), server
    proxy = await start()
    asked = {"input": "x", "model": "all-minilm:latest"}
    assert (await proxy.post(VECTORS, json=asked, headers=MINE)).status == 200
    assert (await proxy.post(VECTORS, json=asked, headers={**OTHER, **ONLY})).status == 504
    assert (await proxy.post(VECTORS, json=asked, headers=OTHER)).status == 401
    await proxy.settled()
    await quiet(proxy)
    assert proxy.services.backends.first.gate.verdict in (Verdict.REFUSED, Verdict.REFUSED_UNREAD)
    await chat(proxy, MINE)
    assert await chat(proxy, OTHER) == "MISS"


@pytest.mark.parametrize("broken", [False, True])
async def test_another_server_that_takes_its_place_between_two_looks(
    start: StartProxy, model: FakeModel, broken: bool
) -> None:
    proxy = await start()
    backend = proxy.services.backends.first
    assert shared(proxy)
    before = backend.tracker.current.fingerprint
    if broken:
        backend.tracker.unreachable()
    model.key, model.public_models, model.models = "mine", True, model.models if broken else ["another"]
    async with asyncio.timeout(60):
        while not backend.tracker.current.confirmed or (backend.tracker.current.fingerprint == before and not broken):
            await asyncio.sleep(0.005)
    assert (await ask(proxy, CHAT, MINE)).status == 200
    assert (await ask(proxy, CHAT, {**OTHER, **ONLY})).status == 504
    assert (await ask(proxy, CHAT, OTHER)).status == 401
