"""Fixtures for all tests. Every async test fails on a blocking call, an unclosed session or a leaked task."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import hypothesis
import pytest
from aiohttp import web
from blockbuster import BlockBuster, blockbuster_ctx

from proxy.config import load
from proxy.settings import Settings
from proxy.web.app import make_app
from proxy.web.listen import listening
from proxy.web.services import SERVICES, Services
from storage import lease_file, sqlite_leases
from tests.fake_model import FakeModel, fake_model


def pytest_configure() -> None:
    """Let programs that the tests start hear Ctrl-C: a shell in whose background the tests run has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield None
        return
    with blockbuster_ctx() as blockbuster:
        # Coverage takes a lock of its own where threads run code that it measures.
        blockbuster.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", {"lock_data"})
        yield blockbuster


@pytest.fixture(autouse=True)
async def _nothing_left(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """No task, session or thread outlives an async test."""
    threads = len(_threads())
    # The lists and dictionaries of the near tier are millions of objects: only what comes from here on is looked at.
    gc.freeze()
    yield
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        return
    current = asyncio.current_task()
    with suppress(TimeoutError):
        await eventually(lambda: not _running_beside(current))
    assert not _running_beside(current)
    gc.collect()
    open_sessions = [o for o in gc.get_objects() if isinstance(o, aiohttp.ClientSession) and not o.closed]
    assert not open_sessions
    left = _threads()
    assert len(left) <= max(threads, 1) + 8, left


def _threads() -> list[threading.Thread]:
    """All but those of the loop's own pool: it has more of them on a machine with more cores, and ends them itself."""
    return [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]


def _running_beside(current: asyncio.Task[Any] | None) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task is not current and not task.done()]


@dataclass
class Proxy:
    """A nearhit that listens on a free port in this process."""

    url: str
    app: web.Application
    session: aiohttp.ClientSession

    @property
    def services(self) -> Services:
        return self.app[SERVICES]

    async def chat(self, content: str = "hi", *, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        return await self.post("/v1/chat/completions", json=body, headers=headers)

    async def post(self, path: str, **kwargs: Any) -> Answer:
        return await self.send("POST", path, **kwargs)

    async def send(self, method: str, path: str, **kwargs: Any) -> Answer:
        async with self.session.request(method, self.url + path, allow_redirects=False, **kwargs) as response:
            return Answer(response.status, response.headers.copy(), await response.read())

    async def settled(self) -> None:
        """Wait until every fetch has landed."""
        while self.services.in_flight:
            await asyncio.sleep(0.005)

    async def stats(self) -> dict[str, Any]:
        answer = await self.send("GET", "/-/stats")
        assert answer.status == 200, answer.body
        stats: dict[str, Any] = answer.json
        return stats


@dataclass
class Answer:
    """A response that was read whole."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        import json

        return json.loads(self.body)

    @property
    def outcome(self) -> str:
        return str(self.headers.get("X-Cache", ""))


# How long an example takes on a busy machine says nothing about what is tested. The gate takes the same examples each
# time; `--hypothesis-profile=search` looks for others.
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.register_profile("nearhit", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("nearhit")

CLIENT_TIMEOUT = aiohttp.ClientTimeout(total=60)
"""Ends a test that hangs."""

StartProxy = Callable[..., Awaitable[Proxy]]


def settings_for(data: Path, upstream: str, **options: Any) -> Settings:
    """Settings as the command line would make them; option paths with `__` for dots."""
    flags = {name.replace("__", "."): value for name, value in options.items()}
    return load(None, {}, {"data_dir": str(data), "upstream.url": upstream, "upstream.poll_s": 0.1, **flags}).settings


@asynccontextmanager
async def running_proxy(settings: Settings, *, wait: bool = True) -> AsyncIterator[Proxy]:
    app = make_app(settings)
    async with (
        listening(app, "127.0.0.1", 0, 0.5) as (host, port),
        aiohttp.ClientSession(timeout=CLIENT_TIMEOUT) as session,
    ):
        proxy = Proxy(f"http://{host}:{port}", app, session)
        if wait:
            await proxy.services.backends.first.tracker.looked.wait()
        yield proxy


@pytest.fixture
def patient_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find each other at once, and none that is slow for a moment goes its own way."""
    monkeypatch.setattr(sqlite_leases, "LOOK_S", 0.02)
    monkeypatch.setattr(sqlite_leases, "PATIENCE_S", 60.0)
    monkeypatch.setattr(lease_file, "_BUSY_S", 60.0)


@pytest.fixture
async def model() -> AsyncIterator[FakeModel]:
    async with fake_model() as running:
        yield running


@pytest.fixture
async def start(tmp_path: Path, model: FakeModel) -> AsyncIterator[StartProxy]:
    """Start proxies in front of the fake model; each stops when the test ends."""
    async with AsyncExitStack() as stack:

        async def begin(*, wait: bool = True, **options: Any) -> Proxy:
            settings = settings_for(tmp_path, options.pop("url", model.url), **options)
            return await stack.enter_async_context(running_proxy(settings, wait=wait))

        yield begin


@pytest.fixture
async def proxy(start: StartProxy) -> Proxy:
    return await start()


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until the condition holds; the limit only ends a test that has failed."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
