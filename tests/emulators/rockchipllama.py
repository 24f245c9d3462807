"""RockchipLlama (bf4ba73): what it answers, and what is wrong with it."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import ClassVar
from urllib.parse import unquote

from aiohttp import web

from tests.emulators import Asked, Json, Npu, Run, event_stream, never, parsed, send, serving, tokens_of
from tests.emulators.fastapi import detail, fast, invalid, invalid_chat

Post = Callable[["RockchipLlama", web.Request, bytes], Awaitable[web.StreamResponse]]

DEFAULT_LIMIT = 512
RUN_FAILED = "rkllm_run(_async) failed with code: -1"
FAILURE = {"error": {"message": RUN_FAILED, "type": "internal_error"}}


@dataclass(frozen=True)
class File:
    """A model on its disk."""

    name: str
    filename: str
    size_mb: float

    @property
    def path(self) -> str:
        return f"/home/rock/models/{self.name}/{self.filename}"

    @property
    def names(self) -> tuple[str, str]:
        """What it can be loaded as, and is called then."""
        return self.name, self.filename.removesuffix(".rkllm")


@dataclass(frozen=True)
class Cache:
    """A prompt cache on its disk."""

    prompt: str
    size_mb: float
    created_at: float


QWEN = File("qwen3-0.6b", "Qwen3-0.6B-w8a8-opt0-hybrid0-npu3-ctx16384-rk3588.rkllm", 900.25)
TINY = File("tiny-b", "Tiny-B-w8a8-opt0-hybrid0-npu3-ctx4096-rk3588.rkllm", 400.5)


@dataclass
class RockchipLlama:
    """What the server does and has been asked.

    `reuses`: a cache really saves computing. `fails`: the runtime refuses to run. `run_error`: it breaks off with
    nothing said. `breaks`: streams end with an error after their first token. `deadlocked` for ever once another model
    was loaded over one. `poisoned` counts runs that were given the cache of another model. `answer` makes the tokens
    that follow a prompt.
    """

    url: str = ""
    models: list[File] = field(default_factory=lambda: [QWEN, TINY])
    loaded: str | None = QWEN.name
    caches: dict[str, dict[str, Cache]] = field(default_factory=dict)
    npu: Npu = field(default_factory=Npu)
    answer: Callable[[str], Sequence[str]] | None = None
    reuses: bool = False
    fails: bool = False
    breaks: bool = False
    run_error: bool = False
    deadlocked: bool = False
    poisoned: int = 0
    asked: list[Asked] = field(default_factory=list)
    _ttft_ms: float = 0.0
    _last: str = ""
    _count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def bodies(self, path: str) -> list[Json]:
        """The bodies of the POSTs to a path."""
        return [asked.json for asked in self.asked if asked.method == "POST" and asked.path == path]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(Asked(request.method, request.path, body))
        if self.deadlocked:
            await never()
        cache = re.fullmatch(r"/v1/cache/([^/]+)(?:/([^/]+))?", request.raw_path)
        if cache is not None:
            return self._cache(request.method, *(unquote(part) if part else "" for part in cache.groups()), body=body)
        if request.method == "GET":
            return self._get(request.path)
        if request.method != "POST":
            return detail(405, "Method Not Allowed")
        post = self._posts.get(request.path)
        return await post(self, request, body) if post is not None else detail(404, "Not Found")

    def _get(self, path: str) -> web.Response:
        now = int(time.time())
        match path:
            case "/v1/health":
                shown = {"model_loaded": self.loaded is not None, "loaded_model": self.loaded}
                return fast({"status": "healthy", **shown, "timestamp": now})
            case "/v1/models":
                ids = [{"id": m.name, "object": "model", "created": now, "owned_by": "rockchip"} for m in self.models]
                return fast({"object": "list", "data": ids})
            case "/v1/models/available":
                return fast(
                    {
                        "models": [self._shown(m) for m in self.models],
                        "total": len(self.models),
                        "loaded_model": self.loaded,
                    }
                )
            case "/v1/models/loaded":
                path_ = next((model.path for model in self.models if self.loaded in model.names), None)
                return fast({"loaded": self.loaded is not None, "model_name": self.loaded, "model_path": path_})
            case "/v1/cache" if self.loaded is None:
                return detail(503, "No model loaded with cache support")
            case "/v1/cache":
                return fast({"object": "list", "data": {m: self._listed(m) for m in self.caches}, "timestamp": now})
            case _:
                return detail(404, "Not Found")

    def _shown(self, model: File) -> Json:
        loaded = model.name == self.loaded
        return {
            "name": model.name,
            "filename": model.filename,
            "path": model.path,
            "size_mb": model.size_mb,
            "loaded": loaded,
        }

    async def _load(self, request: web.Request, body: bytes) -> web.Response:
        name = str(parsed(body)["model"])
        if not any(name in model.names for model in self.models):
            return detail(500, f"Failed to load model: Model not found: {name}")
        if self.loaded not in (None, name):
            self.deadlocked = True
            await never()
        self.loaded = name
        said = f"Model {name} loaded successfully"
        return fast({"success": True, "message": said, "model_name": name, "loaded": True})

    async def _unload(self, request: web.Request, body: bytes) -> web.Response:
        if self.loaded is None:
            return fast({"success": False, "message": "No model is currently loaded"})
        name, self.loaded = self.loaded, None
        return fast({"success": True, "message": f"Model {name} unloaded successfully"})

    def _auto_load(self, wanted: Json) -> bool:
        """Nothing loaded: the model that is named, or else the smallest."""
        if self.loaded is None and self.models:
            named = [model for model in self.models if model.name == wanted]
            self.loaded = (named or sorted(self.models, key=lambda model: model.size_mb))[0].name
        return self.loaded is not None

    # Caches

    def _cache(self, method: str, model: str, name: str, *, body: bytes) -> web.Response:
        if self.loaded is None:
            return detail(503, "No model loaded" if method == "POST" else "No model loaded with cache support")
        now = int(time.time())
        held = self.caches.setdefault(model, {})
        if not name:
            if method == "POST":
                return self._create(model, parsed(body))
            listed = self._listed(model)
            return fast({"object": "list", "model": model, "data": listed, "count": len(listed), "timestamp": now})
        if method == "DELETE" and name == "system":
            return detail(403, "Cannot delete system cache. It will be auto-regenerated on model load.")
        if name not in held:
            return detail(404, f"Cache '{name}' not found for model '{model}'")
        if method == "DELETE":
            del held[name]
            deleted = {"model": model, "cache_name": name, "deleted": True, "timestamp": now}
            return fast({"object": "cache.deleted", **deleted})
        shown = {key: value for key, value in self._one(model, name).items() if key not in ("model_name", "path")}
        return fast({"object": "cache", "model": model, **shown, "timestamp": now})

    def _create(self, model: str, asked: Json) -> web.Response:
        if not isinstance(asked, dict):
            return detail(500, "Expecting value: line 1 column 1 (char 0)")
        name, prompt, messages = asked.get("cache_name"), asked.get("prompt"), asked.get("messages")
        if not name:
            return detail(400, "cache_name is required")
        if not prompt and not messages:
            return detail(400, "Either 'prompt' or 'messages' is required")
        if not name.replace("-", "").replace("_", "").isalnum():
            return detail(400, "cache_name must be alphanumeric (hyphens and underscores allowed)")
        if model != self.loaded:
            return detail(400, f"Model '{model}' not loaded. Currently loaded: '{self.loaded}'")
        if self.fails:
            return detail(500, RUN_FAILED)
        text = prompt or chatml(messages or [])
        size = len(text) / 1024 / 1024
        self.caches[model][name] = Cache(text, size, time.time())
        self.npu.now += self.npu.prefill_s * len(text) + self.npu.token_s
        made = {"size_mb": size, "ttft_ms": self._ttft_ms, "prompt_length": len(text), "timestamp": int(time.time())}
        said = f"Binary cache generated successfully ({size:.2f} MB)"
        return fast({"object": "cache.created", "model": model, "cache_name": name, **made, "message": said})

    def _listed(self, model: str) -> list[Json]:
        return [self._one(model, name) for name in self.caches.get(model, {})]

    def _one(self, model: str, name: str) -> dict[str, Json]:
        cache = self.caches[model][name]
        return {
            "cache_name": name,
            "model_name": model,
            "path": f"/home/rock/cache/{model}/{name}.rkllm_cache",
            "size_mb": cache.size_mb,
            "created_at": cache.created_at,
            "modified_at": cache.created_at,
            "prompt_length": len(cache.prompt),
            "source": "api",
        }

    # Answers

    async def _chat(self, request: web.Request, body: bytes) -> web.StreamResponse:
        asked = parsed(body)
        problem = invalid_chat(asked)
        if problem is not None:
            return problem
        if not self._auto_load(asked.get("model")):
            return detail(500, "")
        if asked.get("use_cache") and "/" in str(asked.get("model")):
            return detail(500, "[Errno 2] No such file or directory")
        await self.npu.lane.acquire()
        if self.fails or self.npu.active:
            self.npu.lane.release()
            return await self._stream_error(request) if asked.get("stream") else detail(500, RUN_FAILED)
        run, usage = self._run(chatml(asked["messages"]), asked)
        # The lane is given back when the run ends, not when the client leaves.
        tokens = tokens_of(run, self.npu, self.npu.lane.release)
        head = {"created": int(time.time()), "model": asked.get("model", "")}
        if asked.get("stream"):
            return await self._stream_chat(request, tokens, head, run, usage)
        text = "".join([token async for token in tokens])
        choice = {"index": 0, "message": {"role": "assistant", "content": text, "name": None}, "finish_reason": "stop"}
        whole = {"id": f"chatcmpl-{next(self._count):012x}", "object": "chat.completion", **head}
        return fast({**whole, "choices": [choice], "usage": counted(usage, text)})

    async def _stream_chat(
        self, request: web.Request, tokens: AsyncIterator[str], head: Mapping[str, Json], run: Run, usage: Json
    ) -> web.StreamResponse:
        response = await event_stream(request, "text/event-stream; charset=utf-8")
        base = {"id": f"chatcmpl-{next(self._count):012x}", "object": "chat.completion.chunk", **head}
        async for token in tokens:
            choice = {"index": 0, "delta": {"content": token}, "finish_reason": None}
            await send(response, {**base, "choices": [choice], "usage": None}, compact=True)
            if self.breaks:
                await send(response, FAILURE)
                return response
        choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await send(response, {**base, "choices": [choice], "usage": counted(usage, "".join(run.said))}, compact=True)
        await send(response, "[DONE]")
        return response

    async def _complete(self, request: web.Request, body: bytes) -> web.StreamResponse:
        asked = parsed(body)
        if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
            return invalid("prompt", "missing")
        if not self._auto_load(asked.get("model")):
            return detail(503, "No models available. Please place .rkllm files in the models directory.")
        # The lane is given back when the client leaves, whether or not the run has ended.
        async with self.npu.lane:
            if self.fails or self.npu.active:
                return await self._stream_error(request) if asked.get("stream") else detail(500, RUN_FAILED)
            run, usage = self._run(asked["prompt"], asked)
            tokens = tokens_of(run, self.npu)
            base = {"id": f"cmpl-{next(self._count):012x}", "object": "text_completion", "created": int(time.time())}
            base["model"] = asked.get("model", "")
            if not asked.get("stream"):
                text = "".join([token async for token in tokens])
                choice = {"text": text, "index": 0, "finish_reason": "stop"}
                return fast({**base, "choices": [choice], "usage": counted(usage, text)})
            response = await event_stream(request, "text/event-stream; charset=utf-8")
            async for token in tokens:
                choice = {"index": 0, "text": token, "logprobs": None, "finish_reason": None}
                await send(response, {**base, "choices": [choice], "usage": None}, compact=True)
            cut = "length" if len(run.tokens) >= limit_of(asked) else "stop"
            choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": cut}
            said = counted(usage, "".join(run.said))
            await send(response, {**base, "choices": [choice], "usage": said}, compact=True)
            await send(response, "[DONE]")
            return response

    async def _ollama_chat(self, request: web.Request, body: bytes) -> web.Response:
        asked = parsed(body)
        self._auto_load(asked.get("model"))
        lines = [f"{message['role'].capitalize()}: {message['content']}" for message in asked["messages"]]
        run, usage = self._run("\n".join([*lines, "Assistant:"]), {})
        async with self.npu.lane:
            text = "".join([token async for token in tokens_of(run, self.npu)])
        told = {"total_duration": 254000000, "load_duration": 0, "prompt_eval_count": usage["prompt_tokens"]}
        more = {"prompt_eval_duration": 14000000, "eval_count": len(text.split()), "eval_duration": 240000000}
        message = {"role": "assistant", "content": text, "name": None}
        head = {"model": asked.get("model", ""), "created_at": "2026-01-01T00:00:00.500143", "message": message}
        return fast({**head, "done": True, **told, **more})

    async def _stream_error(self, request: web.Request) -> web.StreamResponse:
        response = await event_stream(request, "text/event-stream; charset=utf-8")
        await send(response, FAILURE)
        return response

    async def _embed(self, request: web.Request, body: bytes) -> web.Response:
        return detail(500, "Failed to extract hidden states")

    def _run(self, prompt: str, asked: Mapping[str, Json]) -> tuple[Run, dict[str, Json]]:
        """The run for a prompt: what continues the last one is fed in part, with nothing of the history kept."""
        name = asked.get("use_cache")
        named = str(asked.get("model"))
        cache = self.caches.get(named, {}).get(name) if name else None
        self.poisoned += cache is not None and named != self.loaded
        fed = prompt[len(self._last) :] if self._last and prompt.startswith(self._last) else prompt
        reused = len(cache.prompt) if cache is not None and self.reuses and fed.startswith(cache.prompt) else 0
        made = (
            self.answer(prompt) if self.answer is not None else ("Stub", " answer", f" {next(self._count)}", " here.")
        )
        tokens = [] if self.run_error else list(made)[: limit_of(asked)]
        self._last = prompt + "".join(tokens)
        self._ttft_ms = self.npu.prefill_s * (len(fed) - reused) * 1000
        hit = {"cached_prompts": [name] if cache is not None else None, "cache_hit": cache is not None}
        return Run(fed, tokens, len(fed) - reused), {"prompt_tokens": len(prompt.split()), **hit}

    _posts: ClassVar[Mapping[str, Post]] = {
        "/v1/models/load": _load,
        "/v1/models/unload": _unload,
        "/v1/chat/completions": _chat,
        "/v1/completions": _complete,
        "/v1/embeddings": _embed,
        "/api/chat": _ollama_chat,
    }


def limit_of(asked: Mapping[str, Json]) -> int:
    limit = asked.get("max_tokens")
    return limit if isinstance(limit, int) and limit > 0 else DEFAULT_LIMIT


def counted(usage: Mapping[str, Json], text: str) -> dict[str, Json]:
    """Usage in words."""
    said = len(text.split())
    counts = {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": said}
    return {
        **counts,
        "total_tokens": usage["prompt_tokens"] + said,
        **{k: usage[k] for k in ("cached_prompts", "cache_hit")},
    }


def chatml(messages: Sequence[Mapping[str, Json]]) -> str:
    """Its rendering of a chat, in which messages of tools are left out."""
    parts = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages if m["role"] != "tool"]
    return "".join([*parts, "<|im_start|>assistant\n"])


@asynccontextmanager
async def rockchipllama(port: int = 0) -> AsyncIterator[RockchipLlama]:
    """A RockchipLlama that listens on loopback for the life of this block."""
    server = RockchipLlama()
    async with serving(server.handle, server.npu, port) as server.url:
        yield server
