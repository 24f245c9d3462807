"""rkllama (0.0.74): what it answers, and what is wrong with it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from tests.emulators import (
    Asked,
    Json,
    Npu,
    Run,
    event_stream,
    flask_json,
    flask_not_found,
    parsed,
    send,
    serving,
    tokens_of,
)

TIMEOUT_TEXT = "Aborted inference by Timeout (300 seconds). Try again."


@dataclass(frozen=True)
class Model:
    """A model on its disk."""

    name: str
    size: int = 1048576
    modified_at: str = "2026-01-21T19:10:26.334695Z"
    quantization: str = "Q8_0"

    @property
    def shown(self) -> Json:
        details = {"family": "llama", "format": "rkllm", "parameter_size": "0.6B"}
        return {
            "details": {**details, "quantization_level": self.quantization},
            "digest": "",
            "model": self.name,
            "modified_at": self.modified_at,
            "name": self.name,
            "size": self.size,
        }


@dataclass
class Rkllama:
    """What the server does and has been asked.

    `leaks`: the last token of an answer that was cut, or left, comes first in the next. `times_out`: the worker gives
    up. `prefixes` are its KV files: system prompt, first user's message and number of messages.
    """

    url: str = ""
    models: list[Model] = field(default_factory=lambda: [Model("qwen3:0.6b"), Model("tiny:0.1b", 524288)])
    loaded: set[str] = field(default_factory=set)
    npu: Npu = field(default_factory=Npu)
    answer: Callable[[str], Sequence[str]] | None = None
    leaks: bool = True
    times_out: bool = False
    prefixes: set[tuple[str, str, int]] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    _tail: str = ""
    _answers: int = 0

    def bodies(self, path: str) -> list[Json]:
        """The bodies of the POSTs to a path."""
        return [asked.json for asked in self.asked if asked.method == "POST" and asked.path == path]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(Asked(request.method, request.path, body))
        if request.method == "GET":
            return self._get(request.path)
        if request.method != "POST" or request.path not in self._posts:
            return flask_not_found()
        asked = parsed(body)
        if not isinstance(asked, dict):
            return flask_json(
                {"error": "400 Bad Request: The browser (or proxy) sent a request that is not JSON."}, 500
            )
        return await self._posts[request.path](self, request, asked)

    def _get(self, path: str) -> web.Response:
        match path:
            case "/":
                welcome = "Welcome to RKLLama with Ollama API compatibility!"
                return flask_json({"message": welcome, "github": "https://github.com/notpunhnox/rkllama"})
            case "/api/version":
                return flask_json({"version": "0.0.74"})
            case "/v1/models":
                ids = [{"created": 1, "id": m.name, "object": "model", "owned_by": "rkllama"} for m in self.models]
                return flask_json({"data": ids, "object": "list"})
            case "/models":
                return flask_json({"models": [model.name for model in self.models]})
            case "/api/tags":
                return flask_json({"models": [model.shown for model in self.models]})
            case "/api/ps" | "/current_models":
                more = {
                    "base_domain_id": [9],
                    "expires_at": "..",
                    "last_call": "..",
                    "loaded_at": "..",
                    "loaded_by": "..",
                }
                return flask_json({"models": [{**m.shown, **more} for m in self.models if m.name in self.loaded]})
            case _:
                return flask_not_found()

    async def _load(self, request: web.Request, asked: Mapping[str, Json]) -> web.StreamResponse:
        name = asked.get("model_name")
        if name in self.loaded:
            return flask_json({"error": "A model is already loaded. Nothing to do."})
        missing = self._loads(name)
        return flask_json({"message": f"Model {name} loaded successfully."}) if missing is None else missing

    async def _unload(self, request: web.Request, asked: Mapping[str, Json]) -> web.StreamResponse:
        name = asked.get("model_name")
        if name not in self.loaded:
            return flask_json({"error": f"No model {name} are currently loaded."}, 400)
        self.loaded.remove(name)
        return flask_json({"message": f"Model {name} successfully unloaded!"})

    def _loads(self, name: Json) -> web.Response | None:
        """Load on demand; several at a time."""
        if name not in [model.name for model in self.models]:
            text = f"Failed to load model '{name}': Model directory '{name}' not found."
            return flask_json({"error": text}, 500)
        self.loaded.add(name)
        return None

    async def _chat(self, request: web.Request, asked: Mapping[str, Json]) -> web.StreamResponse:
        missing = self._loads(asked.get("model"))
        if missing is not None:
            return missing
        prompt = "".join(f"{message['role']}:{message['content']}|" for message in asked["messages"])
        await self.npu.lane.acquire()
        run = self._run(prompt, asked, self._reused(asked["messages"], prompt))
        return await self._answer(request, asked, run, "delta")

    async def _complete(self, request: web.Request, asked: Mapping[str, Json]) -> web.StreamResponse:
        missing = self._loads(asked.get("model"))
        if missing is not None:
            return missing
        await self.npu.lane.acquire()
        return await self._answer(request, asked, self._run(str(asked.get("prompt")), asked, 0), "text")

    async def _answer(
        self, request: web.Request, asked: Mapping[str, Json], run: Run, shape: str
    ) -> web.StreamResponse:
        head = {"created": int(time.time()), "model": asked["model"]}
        if asked.get("stream"):
            return await self._stream(request, run, head, shape)
        text = "".join([token async for token in tokens_of(run, self.npu, self.npu.lane.release)])
        text = TIMEOUT_TEXT if self.times_out else text
        choice: Json = {"finish_reason": "stop", "index": 0}
        choice |= {"message": {"content": text, "role": "assistant"}} if shape == "delta" else {"text": text}
        kind = "chat.completion" if shape == "delta" else "text_completion"
        return flask_json({"choices": [choice], **head, "id": new_id(), "object": kind, "usage": usage_of(run)})

    async def _stream(self, request: web.Request, run: Run, head: Mapping[str, Json], shape: str) -> web.StreamResponse:
        response = await event_stream(request)

        def chunk(text: str, finish: str | None) -> Json:
            said: Json = {"delta": {"content": text, "role": "assistant"}} if shape == "delta" else {"text": text}
            choice = {"index": 0, **said, "finish_reason": finish}
            return {"id": new_id(), "object": "chat.completion.chunk", **head, "choices": [choice]}

        left = True
        try:
            async for token in tokens_of(run, self.npu, self.npu.lane.release):
                await send(response, chunk(token, None))
            left = False
        finally:
            if left and self.leaks:
                self._tail = run.tokens[-1]
        await send(response, chunk("", "stop"))
        await send(response, {**chunk("", None), "choices": [], "usage": usage_of(run)})
        await send(response, "[DONE]")
        return response

    async def _ollama_chat(self, request: web.Request, asked: Mapping[str, Json]) -> web.StreamResponse:
        missing = self._loads(asked.get("model"))
        if missing is not None:
            return missing
        limit = (asked.get("options") or {}).get("num_predict")
        prompt = "".join(f"{message['role']}:{message['content']}|" for message in asked["messages"])
        await self.npu.lane.acquire()
        run = self._run(prompt, {"max_tokens": limit}, self._reused(asked["messages"], prompt))
        tokens = [token async for token in tokens_of(run, self.npu, self.npu.lane.release)]
        head = {"model": asked["model"], "created_at": "2026-01-01T00:00:00.000000Z"}
        end = {"done": True, "done_reason": "stop", "total_duration": 1, "eval_count": len(tokens)}
        if asked.get("stream") is False:
            return flask_json({**head, "message": {"role": "assistant", "content": "".join(tokens)}, **end})
        response = await event_stream(request, "application/x-ndjson")
        for token in tokens:
            line = {**head, "message": {"role": "assistant", "content": token}, "done": False}
            await response.write(json.dumps(line).encode() + b"\n")
        await response.write(
            json.dumps({**head, "message": {"role": "assistant", "content": ""}, **end}).encode() + b"\n"
        )
        return response

    def _run(self, prompt: str, asked: Mapping[str, Json], reused: int) -> Run:
        self._answers += 1
        made = list(
            self.answer(prompt) if self.answer is not None else ("Stub", " answer", f" {self._answers}", " end.")
        )
        limit = asked.get("max_tokens") or asked.get("max_new_tokens")
        said = made[:limit] if isinstance(limit, int) and limit > 0 else made
        leaked, self._tail = self._tail, said[-1] if self.leaks and len(said) < len(made) else ""
        tokens = [] if self.times_out else [leaked, *said] if leaked else said
        return Run(prompt, tokens, len(prompt) - reused)

    def _reused(self, messages: Sequence[Mapping[str, Json]], prompt: str) -> int:
        """What a KV file saves: there is one for the turn that follows the last one of the same conversation."""
        system = "".join(str(m["content"]) for m in messages if m["role"] == "system")
        first = next((str(m["content"]) for m in messages if m["role"] == "user"), "")
        mine = (system, first, len(messages))
        known = mine in self.prefixes
        self.prefixes.discard(mine)
        self.prefixes.add((system, first, len(messages) + 2))
        return len(prompt) - len(str(messages[-1]["content"])) if known else 0

    _posts = {  # noqa: RUF012
        "/load_model": _load,
        "/unload_model": _unload,
        "/v1/chat/completions": _chat,
        "/v1/completions": _complete,
        "/api/chat": _ollama_chat,
    }


def new_id() -> str:
    """Each chunk has one of its own."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def usage_of(run: Run) -> Json:
    """Usage in tokens."""
    asked, said = len(run.fed.split()), len(run.said)
    times = {"eval_duration": 0.0, "load_duration": 0.1, "prompt_eval_duration": 0.0, "total_duration": 0.3}
    counts = {"completion_tokens": said, "prompt_tokens": asked, "total_tokens": asked + said}
    return {**counts, **times, "tokens_per_second": 5.0}


@asynccontextmanager
async def rkllama(port: int = 0) -> AsyncIterator[Rkllama]:
    """An rkllama that listens on loopback for the life of this block."""
    server = Rkllama()
    async with serving(server.handle, server.npu, port) as server.url:
        yield server
