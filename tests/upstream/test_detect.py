"""A server's own answers tell its kind, and where they do not, that is said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from aiohttp import web

from proxy.upstream.adapter import Kind, Loading, Seen, Silent, Unidentified, Unreachable
from proxy.upstream.detect import Detected, Found, detect
from tests.emulators import Asked, flask_json, flask_not_found, never, serving
from tests.emulators.asking import probing
from tests.emulators.rkllama import rkllama
from tests.emulators.rkllm_flask import rkllm_flask
from tests.emulators.rockchipllama import rockchipllama
from tests.fake_model import FakeModel, fake_model

PROPS = {"default_generation_settings": {"params": {}}, "media_marker": "a"}


def listing(*owners: str) -> dict[str, Any]:
    return {"data": [{"id": f"m{number}", "owned_by": owner} for number, owner in enumerate(owners)]}


class Scripted:
    """A server that answers paths as told, and 404 to all others."""

    def __init__(self, **answers: web.Response | Any) -> None:
        self.answers = {"/" + path.replace("__", "/"): answer for path, answer in answers.items()}
        self.asked: list[str] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        answer = self.answers.get(request.path)
        if answer is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        if isinstance(answer, int):
            return web.json_response({"error": "no"}, status=answer)
        if answer == "hang":
            await never()
        return web.json_response(answer)


async def found(server: Scripted, timeout_s: float = 20.0) -> Any:
    async with serving(server.handle) as url, probing(url, timeout_s) as probe:
        return await detect(probe)


async def test_llama_cpp_takes_one_request(model: FakeModel) -> None:
    model.props = PROPS
    async with probing(model.url) as probe:
        assert await detect(probe) == Found(Kind.LLAMACPP)
    assert [seen.target for seen in model.seen] == ["/props"]


async def test_llama_cpp_behind_a_key(model: FakeModel) -> None:
    model.props, model.key = PROPS, "secret"
    async with probing(model.url) as probe:
        assert await detect(probe) == Found(Kind.LLAMACPP)


async def test_an_openai_compatible_server_is_asked_twice(model: FakeModel) -> None:
    async with probing(model.url) as probe:
        assert await detect(probe) == Found(Kind.OPENAI)
    assert [seen.target for seen in model.seen] == ["/props", "/v1/models"]


async def test_rockchipllama_loaded_or_not() -> None:
    async with rockchipllama() as server, probing(server.url) as probe:
        assert await detect(probe) == Found(Kind.ROCKCHIPLLAMA)
        server.loaded = None
        assert await detect(probe) == Found(Kind.ROCKCHIPLLAMA)
        server.models = []
        assert await detect(probe) == Found(Kind.ROCKCHIPLLAMA)


async def test_rkllama_with_and_without_models() -> None:
    async with rkllama() as server, probing(server.url) as probe:
        assert await detect(probe) == Found(Kind.RKLLAMA)
        assert len(server.asked) == 2
        server.models = []
        assert await detect(probe) == Found(Kind.RKLLAMA)


async def test_the_vendors_demo() -> None:
    async with rkllm_flask() as server, probing(server.url) as probe:
        assert await detect(probe) == Found(Kind.RKLLM_FLASK)


@pytest.mark.parametrize(
    "server",
    [
        Scripted(v1__models=listing("rkllm"), health={"status": "ok"}),
        Scripted(v1__models=listing("rkllm", "rkllm")),
        Scripted(v1__models=listing("rkllm")),
        Scripted(v1__models=listing("rkllm_server")),
        Scripted(v1__models=listing("rockchip")),
        Scripted(v1__models=listing("rockchip"), v1__health={"status": "healthy"}),
        Scripted(v1__models=listing("rockchip"), v1__health={"model_loaded": "yes", "loaded_model": 1}),
    ],
)
async def test_other_servers_for_the_npu_are_not_taken_for_those_we_know(server: Scripted) -> None:
    told = await found(server)
    assert told.kind is Kind.OPENAI
    assert "set upstream.kind" in told.doubt


@pytest.mark.parametrize(
    ("server", "advice"),
    [
        (Scripted(v1__models=listing("llamacpp")), "let nearhit read it"),
        (Scripted(v1__models={"data": []}), "lists no models"),
        (Scripted(v1__models={"data": [3, None, {"id": 5}]}), "lists no models"),
        (Scripted(v1__models="nothing"), "lists no models"),
        (Scripted(v1__models=401), "set upstream.api_key"),
        (Scripted(props=401, health={"status": "other"}), "set upstream.api_key"),
    ],
)
async def test_what_cannot_be_told_says_what_to_do(server: Scripted, advice: str) -> None:
    told = await found(server)
    assert told.kind is Kind.OPENAI
    assert advice in told.doubt


@pytest.mark.parametrize(
    "server",
    [
        Scripted(),
        Scripted(v1__models=501),
        Scripted(v1__models=listing("vllm")),
        Scripted(props={"some": "thing"}, v1__models=listing("me")),
        Scripted(v1__models={"data": [{"id": "m"}]}),
    ],
)
async def test_plain_servers_leave_no_doubt(server: Scripted) -> None:
    assert await found(server) == Found(Kind.OPENAI)


@pytest.mark.parametrize(
    ("server", "sighting"),
    [
        (Scripted(props=503), Loading()),
        (Scripted(props=500), Unidentified()),
        (Scripted(v1__models=503), Loading()),
        (Scripted(v1__models=500), Unidentified()),
        (Scripted(props="hang"), Silent()),
        (Scripted(v1__models="hang"), Silent()),
        (Scripted(v1__models=listing("rockchip"), v1__health="hang"), Silent()),
        (Scripted(v1__models=listing("rockchip"), v1__health=503), Loading()),
        (Scripted(v1__models=listing("rkllm"), health="hang"), Silent()),
    ],
)
async def test_a_server_in_trouble_is_no_kind_at_all(server: Scripted, sighting: object) -> None:
    assert await found(server, 0.1 if sighting == Silent() else 20.0) == sighting


async def test_nobody_there() -> None:
    async with serving(Scripted().handle) as url:
        pass
    async with probing(url) as probe:
        assert await detect(probe) == Unreachable()


async def test_the_kind_known_from_an_earlier_run_holds_until_another_shows_itself() -> None:
    async with rockchipllama() as server, probing(server.url) as probe:
        adapter = Detected("", Kind.ROCKCHIPLLAMA)
        assert adapter.capabilities.max_concurrency == 1
        prefixing = adapter.prefixing
        assert isinstance(await adapter.look(probe), Seen)
        assert adapter.prefixing is prefixing, "what it remembers is not thrown away"
    async with fake_model() as other, probing(other.url) as probe:
        adapter = Detected("", Kind.ROCKCHIPLLAMA)
        other.loading = True
        assert (await adapter.look(probe), adapter.kind) == (Loading(), Kind.ROCKCHIPLLAMA)
        other.loading = False
        assert isinstance(await adapter.look(probe), Seen)
        assert adapter.kind is Kind.OPENAI


async def test_a_doubt_is_logged_once_and_shown_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    server = Scripted(v1__models={"data": []})
    async with serving(server.handle) as url, probing(url) as probe:
        adapter = Detected("", None)
        with caplog.at_level(logging.WARNING, "nearhit.upstream"):
            await adapter.look(probe)
            adapter._sure = False
            await adapter.look(probe)
        assert [record.message for record in caplog.records] == [
            f"the kind of the upstream is a guess, openai: {adapter.doubt}"
        ]
        server.answers["/v1/models"] = listing("vllm")
        adapter._sure = False
        await adapter.look(probe)
        assert adapter.doubt == ""


async def test_a_busy_demo_server_stays_what_it_was() -> None:
    """It works on one connection at a time: even its list of models waits."""
    asked: list[Asked] = []
    hangs = False

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(Asked(request.method, request.path, b""))
        if hangs:
            await never()
        found = request.path == "/v1/models"
        return flask_json({"data": [{"id": "m", "owned_by": "rkllm"}]}) if found else flask_not_found()

    async with serving(handle) as url, probing(url) as probe:
        adapter = Detected("", None)
        assert isinstance(await adapter.look(probe), Seen)
        hangs = True
        assert await adapter.look(probe.within(0.1)) == Silent()
        assert adapter.kind is Kind.RKLLM_FLASK
