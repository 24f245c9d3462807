"""The demo server of the RKLLM toolkit (1.3.0): what it answers, and what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from tests.emulators import Asked, Json, Npu, Run, event_stream, flask_json, flask_not_found, parsed, send, serving

DEFAULT_LIMIT = 4096
BUSY = "RKLLM_Server is busy! Maybe you can try again later."


@dataclass
class RkllmFlask:
    """What the server does and has been asked.

    Its state is global: `text` holds the tokens of whatever runs, for whoever reads; `previous` the messages of the
    last request, of whichever client; `running` says that tokens are coming.
    """

    url: str = ""
    model: str = "Qwen3-0.6B-w8a8-rk3588"
    npu: Npu = field(default_factory=Npu)
    answer: Callable[[str], Sequence[str]] | None = None
    blocking: bool = False
    running: bool = False
    text: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    previous: list[Json] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def bodies(self, path: str) -> list[Json]:
        """The bodies of the POSTs to a path."""
        return [asked.json for asked in self.asked if asked.method == "POST" and asked.path == path]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(Asked(request.method, request.path, body))
        if (request.method, request.path) == ("GET", "/v1/models"):
            one = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "rkllm"}
            return flask_json({"object": "list", "data": [one]})
        if (request.method, request.path) != ("POST", "/v1/chat/completions"):
            return flask_not_found()
        if self.blocking or self.running:
            return error(BUSY, "server_error", 503)
        asked = parsed(body)
        if not isinstance(asked, dict) or "messages" not in asked:
            return error("Missing 'messages' in request body.", "invalid_request_error", 400)
        run = self._run(asked)
        head = {"created": int(time.time()), "model": asked.get("model", self.model)}
        if asked.get("stream"):
            # Not busy any more, though it has not begun.
            return await self._stream(request, run, head)
        return await self._whole(run, head)

    async def _whole(self, run: Run, head: Mapping[str, Json]) -> web.Response:
        self.blocking = True
        try:
            text = "".join([token async for token in self._tokens(run)])
        finally:
            self.blocking = False
        asked, said = len(run.fed.split()), len(text.split())
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
        return flask_json({"id": new_id(), "object": "chat.completion", **head, "choices": [choice], "usage": usage})

    async def _stream(self, request: web.Request, run: Run, head: Mapping[str, Json]) -> web.StreamResponse:
        response = await event_stream(request)

        def chunk(delta: Json, finish: str | None = None) -> Json:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return {"id": new_id(), "object": "chat.completion.chunk", **head, "choices": [choice]}

        await send(response, chunk({"role": "assistant"}))
        async for token in self._tokens(run):
            await send(response, chunk({"content": token}))
        await send(response, chunk({"content": ""}, "stop"))
        await send(response, "[DONE]")
        return response

    async def _tokens(self, run: Run) -> AsyncIterator[str]:
        """What comes while this run goes on, whichever run it is from."""
        self.text = asyncio.Queue()

        def heard(token: str) -> None:
            self.running = True
            self.text.put_nowait(token)

        def done() -> None:
            self.running = False
            self.text.put_nowait(None)

        self.npu.start(run, heard, done)
        while True:
            token = await self.text.get()
            if token is not None:
                yield token
            elif len(run.said) == len(run.tokens) and self.text.empty():
                return

    def _run(self, asked: Mapping[str, Json]) -> Run:
        """Only the last new message is fed, and the system prompt with tools alone."""
        messages = asked["messages"]
        fresh = messages[len(self.previous) :] or messages
        self.previous = list(messages)
        inputs = [m for m in fresh if m.get("role") in ("user", "tool")] or [
            m for m in messages if m.get("role") == "user"
        ]
        prompt = str(inputs[-1].get("content") or "") if inputs else ""
        if inputs and all(message["role"] == "tool" for message in inputs):
            prompt = json.dumps([message["content"] for message in inputs])
        system = "".join(str(m.get("content")) for m in messages if m.get("role") == "system")
        fed = system + prompt if asked.get("tools") else prompt
        made = self.answer(fed) if self.answer is not None else ("You", " said", f" {fed}", ".")
        limit = asked.get("max_tokens", DEFAULT_LIMIT)
        return Run(fed, list(made)[:limit] if limit and limit > 0 else list(made), len(fed))


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex[:24]}"


def error(message: str, kind: str, status: int) -> web.Response:
    return flask_json({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


@asynccontextmanager
async def rkllm_flask(port: int = 0) -> AsyncIterator[RkllmFlask]:
    """A demo server that listens on loopback for the life of this block."""
    server = RkllmFlask()
    async with serving(server.handle, server.npu, port) as server.url:
        yield server
