"""The real llama.cpp behind nearhit: files swapped under one path, other flags, restarts."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.demo.parts import model_file
from proxy.upstream.adapter import Probe
from proxy.upstream.canary import Vector, alike, ask_llamacpp
from proxy.upstream.client import Upstream, client_session
from tests.conftest import Proxy, running_proxy, settings_for
from tests.llama_server import Flags, LlamaServer, patched

pytestmark = pytest.mark.model


class Models:
    """Two models of one shape and size, of which one at a time is served under one path."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "small.gguf"
        self.one = Path(shutil.copy(model_file(), folder / "one.gguf"))
        self.other = patched(self.one, folder / "other.gguf")
        assert self.one.stat().st_size == self.other.stat().st_size
        self.swap_in(self.one)

    def swap_in(self, file: Path) -> None:
        """Put a file in the place of the one that is served, which may be in use."""
        fresh = self.path.with_suffix(".new")
        shutil.copy(file, fresh)
        fresh.replace(self.path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[LlamaServer]:
    with LlamaServer(Flags(model=str(models.path), context=512, alias="small")) as server:
        yield server


@pytest.fixture
async def proxy(tmp_path: Path, server: LlamaServer) -> AsyncIterator[Proxy]:
    async with running_proxy(settings_for(tmp_path, server.url)) as proxy:
        await confirmed(proxy)
        yield proxy


async def confirmed(proxy: Proxy, *, beside: str | None = None) -> bytes:
    """The fingerprint once it is confirmed, for another run than `beside` where one is named."""
    tracker = proxy.services.backends.first.tracker
    async with asyncio.timeout(60):
        while not (tracker.current.confirmed and tracker.current.instance != beside):
            await asyncio.sleep(0.02)
    assert tracker.current.fingerprint is not None
    return tracker.current.fingerprint


async def started_again(
    proxy: Proxy, server: LlamaServer, meanwhile: Callable[[], None] | None = None, **flags: Any
) -> bytes:
    """The fingerprint after the server was killed and started again with these flags."""
    before = proxy.services.backends.first.tracker.current.instance

    def again() -> None:
        server.kill()
        if meanwhile is not None:
            meanwhile()
        server.start(replace(server.flags, **flags))

    await asyncio.to_thread(again)
    return await confirmed(proxy, beside=before)


async def outcome(proxy: Proxy) -> str:
    answer = await proxy.chat("Name one fruit.", max_tokens=4)
    assert answer.status == 200
    await proxy.settled()
    return answer.outcome


async def test_what_really_runs_decides_which_answers_are_in_reach(
    proxy: Proxy, server: LlamaServer, models: Models
) -> None:
    first = await confirmed(proxy)
    assert [await outcome(proxy) for _ in range(2)] == ["MISS", "HIT"]
    assert await started_again(proxy, server) == first
    assert await outcome(proxy) == "HIT"

    second = await started_again(proxy, server, lambda: models.swap_in(models.other))
    assert second != first
    assert [await outcome(proxy) for _ in range(2)] == ["MISS", "HIT"]

    assert await started_again(proxy, server, lambda: models.swap_in(models.one)) == first
    assert await outcome(proxy) == "HIT"

    assert await started_again(proxy, server, kv_type="q8_0") not in (first, second)
    assert await outcome(proxy) == "MISS"

    assert await started_again(proxy, server, kv_type="f16", chat_template="{{ messages }}") != first
    assert await started_again(proxy, server, chat_template="", alias="another") != first
    assert await started_again(proxy, server, alias="small") == first
    assert await outcome(proxy) == "HIT"


async def test_what_it_says_is_the_same_whatever_else_it_is_doing(server: LlamaServer) -> None:
    async with client_session(connect_timeout_s=5, read_timeout_s=60) as session:
        probe = Probe(Upstream(server.url, session, lambda: None), {}, 60)
        alone = await ask_llamacpp(probe)
        busy = asyncio.create_task(probe.post("/completion", {"prompt": "Once", "n_predict": 24, "ignore_eos": True}))
        beside = [await ask_llamacpp(probe) for _ in range(2)]
        await busy
    assert isinstance(alone, Vector)
    assert len(alone.logprobs) == 8
    assert all(isinstance(found, Vector) and alike(alone, found) for found in beside)
