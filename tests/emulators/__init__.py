"""Servers for Rockchip NPUs, imitated by real HTTP servers: their shapes, rules and faults, without the NPU."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = Any
Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    body: bytes

    @property
    def json(self) -> Json:
        return json.loads(self.body)


@dataclass
class Run:
    """One inference: `fed` is what reached the runtime, `computed` how many characters of it were not reused."""

    fed: str
    tokens: Sequence[str]
    computed: int
    said: list[str] = field(default_factory=list)


@dataclass
class Npu:
    """Runs inferences as background work, which no client that leaves can stop.

    `now` counts the seconds that it has worked, at `prefill_s` for each character and `token_s` for each token; with
    `sleeps` they really pass. Tokens after the first `free` wait for `go`.
    """

    prefill_s: float = 0.001
    token_s: float = 0.01
    sleeps: bool = False
    now: float = 0.0
    free: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)
    lane: asyncio.Lock = field(default_factory=asyncio.Lock)
    runs: list[Run] = field(default_factory=list)
    active: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.go.set()

    def start(
        self, run: Run, heard: Callable[[str], None], done: Callable[[], None] = lambda: None
    ) -> asyncio.Task[None]:
        """Begin; `heard` gets each token, `done` is called at the end."""
        self.runs.append(run)
        self.active += 1
        task = asyncio.create_task(self._work_through(run, heard, done))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _work_through(self, run: Run, heard: Callable[[str], None], done: Callable[[], None]) -> None:
        try:
            await self._take(self.prefill_s * run.computed)
            for number, token in enumerate(run.tokens):
                if number >= self.free:
                    await self.go.wait()
                await self._take(self.token_s)
                run.said.append(token)
                heard(token)
        finally:
            self.active -= 1
            done()

    async def _take(self, seconds: float) -> None:
        self.now += seconds
        if self.sleeps:
            await asyncio.sleep(seconds)

    async def end(self) -> None:
        """Stop whatever runs."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def tokens_of(run: Run, npu: Npu, done: Callable[[], None] = lambda: None) -> AsyncIterator[str]:
    """Start a run, and its tokens as they come."""
    heard: asyncio.Queue[str | None] = asyncio.Queue()

    def end() -> None:
        heard.put_nowait(None)
        done()

    npu.start(run, heard.put_nowait, end)
    while (token := await heard.get()) is not None:
        yield token


async def never() -> None:
    """Wait until the server is stopped."""
    await asyncio.Event().wait()


def flask_json(body: Json, status: int = 200) -> web.Response:
    """JSON as Flask writes it: sorted, compact, a newline at the end."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    return web.Response(text=text, status=status, content_type="application/json")


def flask_not_found() -> web.Response:
    """Flask's page for a path that it does not know."""
    page = "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n"
    return web.Response(
        text=page, status=404, content_type="text/html", headers={"Server": "Werkzeug/3.1.3 Python/3.11.2"}
    )


def parsed(body: bytes) -> Json:
    """The JSON of a body; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


async def event_stream(request: web.Request, kind: str = "text/event-stream") -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-cache"})
    await response.prepare(request)
    return response


async def send(response: web.StreamResponse, event: Json, *, compact: bool = False) -> None:
    """One event; `compact` as pydantic writes it."""
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":") if compact else None)
    await response.write(f"data: {text}\n\n".encode())


@asynccontextmanager
async def serving(handle: Handle, npu: Npu | None = None, port: int = 0) -> AsyncIterator[str]:
    """A server on loopback that answers everything with `handle`; its URL."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:(?s:.*)}", handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        if npu is not None:
            await npu.end()
        await runner.cleanup()
