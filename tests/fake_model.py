"""A fake LLM server that is a real aiohttp server: it counts, holds, fails, stalls and hangs up as told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = Any
Respond = Callable[["FakeModel", web.Request, dict[str, Json]], Awaitable[web.StreamResponse]]

GENERATION = ("/v1/chat/completions", "/chat/completions", "/v1/completions")
PROBE = "Bearer nearhit-probe-"
"""How the credential begins that nearhit shows to find out whether keys are checked; those calls count for nothing."""
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def is_nearhits_own(headers: Mapping[str, str], body: bytes) -> bool:
    """Whether a request is nearhit's own, to find out whether keys are checked."""
    return body == b"{}" or headers.get("Authorization", "").startswith(PROBE)


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    target: str
    headers: Mapping[str, str]
    raw_headers: Sequence[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Json:
        return json.loads(self.body)


@dataclass
class FakeModel:
    """What the server does and has seen. `respond` answers generation requests; the rest follows the fields."""

    url: str = ""
    respond: Respond | None = None
    seen: list[Seen] = field(default_factory=list)
    key: str | None = None
    public_models: bool = False
    checks_body_first: bool = False
    models: list[str] = field(default_factory=lambda: ["tiny"])
    props: dict[str, Json] | None = None
    vector: list[tuple[int, float]] | None = None
    """The likeliest next tokens and their logprobs, as `/completion` tells them; None: there is no such path."""
    completion_status: int = 200
    loading: bool = False
    cors: bool = False
    started: int = 0
    finished: int = 0
    gone: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    extra: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None

    @property
    def generations(self) -> list[Seen]:
        """The well-formed generation requests, nearhit's own probes left out."""
        mine = [s for s in self.seen if s.method == "POST" and s.target.partition("?")[0] in GENERATION]
        return [s for s in mine if not is_nearhits_own(s.headers, s.body)]

    @property
    def canaries(self) -> int:
        """How often `/completion` was asked."""
        return sum(seen.target == "/completion" for seen in self.seen)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.method, request.raw_path, request.headers.copy(), request.raw_headers, body))
        response = await self._response(request, body)
        if self.cors and not response.prepared and "Origin" in request.headers:
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        return response

    async def _response(self, request: web.Request, body: bytes) -> web.StreamResponse:
        if self.extra is not None:
            response = await self.extra(request)
            if response is not None:
                return response
        if self.loading:
            return error(503, "Loading model", "unavailable_error")
        if request.path in GENERATION and request.method == "POST":
            return await self._generate(request, body)
        open_path = request.path == "/health" or (self.public_models and request.path == "/v1/models")
        if not open_path and not self._key_is_right(request):
            return error(401, "Invalid API Key", "authentication_error")
        return self._shown(request.path)

    def _shown(self, path: str) -> web.StreamResponse:
        if path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})
        if path == "/props" and self.props is not None:
            return web.json_response(self.props)
        if path == "/health" and self.props is not None:
            return web.json_response({"status": "ok"})
        if path == "/completion" and self.vector is not None:
            if self.completion_status != 200:
                return error(self.completion_status, "no", "server_error")
            return web.json_response(completion_body(self.vector))
        return error(404, "File Not Found", "not_found_error")

    async def _generate(self, request: web.Request, body: bytes) -> web.StreamResponse:
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            asked = None
        malformed = not isinstance(asked, dict) or not ("messages" in asked or "prompt" in asked)
        if malformed and self.checks_body_first:
            return error(400, "'messages' is required", "invalid_request_error")
        if not self._key_is_right(request):
            return error(401, "Invalid API Key", "authentication_error")
        if malformed:
            return error(400, "'messages' is required", "invalid_request_error")
        if request.headers.get("Authorization", "").startswith(PROBE):
            return web.json_response(chat_body())
        self.started += 1
        try:
            response = await (self.respond or reply())(self, request, asked)
        except (asyncio.CancelledError, ConnectionError):
            self.gone += 1
            raise
        self.finished += 1
        return response

    def _key_is_right(self, request: web.Request) -> bool:
        return self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}"


def error(status: int, message: str, kind: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message, "type": kind}}, status=status)


def completion_body(vector: Sequence[tuple[int, float]]) -> dict[str, Json]:
    """llama.cpp's answer to a `/completion` that asks for one token and the likeliest ones."""
    top = [{"id": token, "token": f"t{token}", "bytes": [116], "logprob": logprob} for token, logprob in vector]
    return {"content": "t", "tokens": [], "stop": True, "completion_probabilities": [{**top[0], "top_logprobs": top}]}


def chat_body(content: str | None = "Hello there.", **changes: Json) -> dict[str, Json]:
    """A chat answer as a server sends it."""
    message = {"role": "assistant", "content": content, **changes.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish_reason", "stop")}
    base = {"id": "chatcmpl-up", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}
    return {**base, "usage": USAGE, **changes}


def chunk(delta: dict[str, Json] | None = None, *, finish: str | None = None, **changes: Json) -> dict[str, Json]:
    """One event of a chat stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    base = {"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": choices}
    return {**base, **changes}


def chat_events(*pieces: str, usage: bool = False, finish: str = "stop") -> list[dict[str, Json]]:
    """The events of a whole chat stream, `[DONE]` left out."""
    said = [chunk({"content": piece}) for piece in pieces]
    end = [chunk(None, usage=USAGE)] if usage else []
    return [chunk({"role": "assistant", "content": None}), *said, chunk({}, finish=finish), *end]


def sse(*events: Json, done: bool = True) -> bytes:
    """Events as they go over the wire."""
    lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return b"".join([*lines, b"data: [DONE]\n\n" if done else b""])


def reply(*pieces: str) -> Respond:
    """Answer with these pieces of text, as a stream where one is asked for, whole where not."""
    words = pieces or ("Hello", " there.")

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        if not asked.get("stream"):
            return web.json_response(chat_body("".join(words)))
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        return await send(request, [sse(event, done=False) for event in chat_events(*words, usage=usage)] + [sse()])

    return respond


def numbered() -> Respond:
    """Answer each request with another number, so that a replay is told from a new answer."""

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        return await reply("answer ", str(model.started))(model, request, asked)

    return respond


def raw(
    body: bytes, *, status: int = 200, kind: str = "application/json", headers: Mapping[str, str] | None = None
) -> Respond:
    """Answer with exactly these bytes."""

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers={"Content-Type": kind, **(headers or {})})

    return respond


def streamed(*pieces: bytes, hang_up: bool = False, hold_after: int | None = None) -> Respond:
    """Stream these bytes; wait for `release` after some of them; perhaps hang up instead of ending."""

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        return await send(request, pieces, model=model, hold_after=hold_after, hang_up=hang_up)

    return respond


def held(then: Respond) -> Respond:
    """Wait for `release` before answering at all."""

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        await model.release.wait()
        return await then(model, request, asked)

    return respond


async def send(
    request: web.Request,
    pieces: Sequence[bytes],
    *,
    model: FakeModel | None = None,
    hold_after: int | None = None,
    hang_up: bool = False,
) -> web.StreamResponse:
    """Stream pieces of an event stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for number, piece in enumerate(pieces):
        if model is not None and number == hold_after:
            await model.release.wait()
        await response.write(piece)
    if hang_up and request.transport is not None:
        request.transport.abort()
    return response


@asynccontextmanager
async def fake_model(port: int = 0) -> AsyncIterator[FakeModel]:
    """A fake model that listens on loopback for the life of this block."""
    model = FakeModel()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:(?s:.*)}", model.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2, auto_decompress=False)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        model.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield model
    finally:
        await runner.cleanup()
