"""Reference servers and the fake upstream: `python -m bench.servers bare|passthrough|upstream`."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Awaitable, Callable

import aiohttp
import click
from aiohttp import web

from bench.loop import loop_factory
from bench.messages import MODEL, answer, events

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_WORK_S = 1.0
_PACE_S = (0.001, 0.005)
"""Between two chunks of a stream; slow enough that a relay reads them one by one."""
_OF_A_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "content-length"})
_ANSWER = answer()
_JSON = {"Content-Type": "application/json"}


def _addresses(command: Callable[[int, str], None]) -> Callable[[int, str], None]:
    command = click.option("--upstream", default="", metavar="URL", help="Where requests go on to.")(command)
    return click.option("--port", default=0, show_default=True, help="0 takes a free one.")(command)


@click.group()
def main() -> None:
    """Run one server until it is told to stop; it prints its address on stderr."""


@main.command()
@_addresses
def bare(port: int, upstream: str) -> None:
    """The least that an aiohttp application does: read the body, send constant bytes."""

    del upstream

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(body=_ANSWER, headers=_JSON)

    _run("bare", port, _application(handle))


@main.command()
@_addresses
def passthrough(port: int, upstream: str) -> None:
    """The least that a proxy of aiohttp does: no look, no memory."""
    sessions: list[aiohttp.ClientSession] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in _OF_A_CONNECTION]
        async with sessions[0].request(request.method, upstream + request.path_qs, headers=headers, data=body) as got:
            response = web.StreamResponse(status=got.status)
            for name, value in got.headers.items():
                if name.lower() not in ("connection", "transfer-encoding"):
                    response.headers[name] = value
            await response.prepare(request)
            async for chunk in got.content.iter_any():
                await response.write(chunk)
            return response

    async def connect(_app: web.Application) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        sessions.append(aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False))

    async def disconnect(_app: web.Application) -> None:
        await sessions[0].close()

    app = _application(handle)
    app.on_startup.append(connect)
    app.on_cleanup.append(disconnect)
    _run("passthrough", port, app)


@main.command("upstream")
@_addresses
def fake_upstream(port: int, upstream: str) -> None:
    """An LLM server that needs no time: whole answers at once, streams in small chunks of their own."""
    del upstream
    app = web.Application()
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/chat/completions", _complete)
    app.router.add_route("*", "/{path:.*}", _absent)
    _run("upstream", port, app)


@main.command("one-at-a-time")
@_addresses
def one_at_a_time(port: int, upstream: str) -> None:
    """An LLM server that takes a second for each answer, and begins with the next one then."""
    del upstream
    turn, asked = asyncio.Semaphore(1), 0

    async def answer_in_turn(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        if b'"messages"' in await request.read():
            asked += 1
            async with turn:
                await asyncio.sleep(_WORK_S)
        return await _complete(request)

    async def tell(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"asked": asked})

    app = _application(answer_in_turn)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/asked", tell)
    app.router.add_route("*", "/{path:.*}", _absent)
    _run("one-at-a-time", port, app)


async def _models(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def _absent(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "no such path", "type": "not_found_error"}}, status=404)


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    if b'"messages"' not in body:
        return web.json_response({"error": {"message": "'messages' is required"}}, status=400)
    if b'"stream":true' in body:
        return await _stream(request, int(json.loads(body)["max_tokens"]))
    return web.Response(body=_ANSWER, headers=_JSON)


async def _stream(request: web.Request, chunks: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events(chunks):
        await response.write(event)
        await asyncio.sleep(random.uniform(*_PACE_S))
    return response


def _application(handle: Handler) -> web.Application:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    return app


def _run(name: str, port: int, app: web.Application) -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(name, port, app))


async def _serve(name: str, port: int, app: web.Application) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        click.echo(f"{name} listens on http://127.0.0.1:{runner.addresses[0][1]}", err=True)
        await stop.wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()
