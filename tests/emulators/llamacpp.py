"""llama.cpp's server in little: slots, slot files and what it shows of its model. One token is one word."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.emulators import Asked, Json, parsed, serving

SLOT_ACTION = re.compile(r"/slots/(\d+)")
SIMILAR = 0.1
"""The part of a prompt that a slot must hold to be chosen for it."""


@dataclass
class Slot:
    """`words` it holds, as numbers, computed by `weights`; `task` launched last in it, None: none ever was."""

    words: list[int] = field(default_factory=list)
    weights: str = ""
    task: int | None = None
    busy: bool = False


@dataclass
class LlamaCpp:
    """What the server does and has been asked.

    `weights` are what it loads from the one path that it shows; `files` is its folder for slots, None: it saves
    nothing. While `go` is clear, prompts that are computed for their own sake take for ever. `poisoned` counts calls
    that went on with what other weights had computed. `swaps_at` names the action on a slot that is met, once, by
    another run with other weights.
    """

    files: Path | None
    url: str = ""
    weights: str = "first"
    go: asyncio.Event = field(default_factory=asyncio.Event)
    refuses_files: bool = False
    fails: bool = False
    swaps_at: str = ""
    computing: int = 0
    cancelled: int = 0
    poisoned: int = 0
    asked: list[Asked] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=lambda: [Slot(), Slot()])
    _marker: str = field(default_factory=lambda: uuid.uuid4().hex)
    _tasks: int = 0
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def bodies(self, path: str) -> list[Json]:
        """The bodies of the POSTs to a path, query included."""
        return [asked.json for asked in self.asked if asked.method == "POST" and asked.path == path]

    def count(self, action: str) -> int:
        """How often a slot was saved, or restored."""
        return sum(asked.path.endswith(f"?action={action}") for asked in self.asked)

    async def start(self, port: int = 0) -> None:
        """Listen."""
        self.url = await self._stack.enter_async_context(serving(self.handle, port=port))

    async def stop(self) -> None:
        """End, with all that is in memory."""
        await self._stack.aclose()
        self._lose_all()

    def _lose_all(self) -> None:
        self.slots, self._marker, self._tasks = [Slot(), Slot()], uuid.uuid4().hex, 0

    async def restart(self, weights: str = "") -> None:
        """End and start again at the same address, perhaps with what is in the model's file now."""
        await self.stop()
        self.weights = weights or self.weights
        await self.start(int(self.url.rpartition(":")[2]))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(Asked(request.method, request.raw_path, body))
        match request.method, request.path:
            case "GET", path:
                return self._get(path)
            case "POST", "/apply-template":
                return web.json_response({"prompt": rendered(parsed(body)["messages"])})
            case "POST", "/tokenize":
                return web.json_response({"tokens": tokens_of(parsed(body)["content"])})
            case "POST", "/completion":
                return await self._complete(parsed(body))
            case "POST", "/v1/chat/completions":
                return self._chat(parsed(body))
            case "POST", path if slot := SLOT_ACTION.fullmatch(path):
                return await self._act(int(slot[1]), request.query.get("action", ""), parsed(body).get("filename", ""))
            case _:
                return error(404, "File Not Found")

    def _get(self, path: str) -> web.Response:
        settings = {"n_ctx": 4096, "params": {"temperature": 0.8}}
        match path:
            case "/health":
                return web.json_response({"status": "ok"})
            case "/props":
                shown = {"model_path": "/models/small.gguf", "media_marker": self._marker, "total_slots": 2}
                return web.json_response({"default_generation_settings": settings, **shown})
            case "/v1/models":
                one = {"id": "small", "object": "model", "owned_by": "llamacpp", "meta": {"n_params": 1}}
                return web.json_response({"object": "list", "data": [one]})
            case "/lora-adapters":
                return web.json_response([])
            case "/slots":
                return web.json_response([self._listed(number) for number in range(len(self.slots))])
            case _:
                return error(404, "File Not Found")

    def _listed(self, number: int) -> Json:
        slot = self.slots[number]
        task = {} if slot.task is None else {"id_task": slot.task}
        return {"id": number, "is_processing": slot.busy, "n_prompt_tokens": len(slot.words), **task}

    async def _complete(self, asked: Mapping[str, Json]) -> web.Response:
        if self.fails:
            return error(500, "out of memory")
        if asked.get("n_probs"):
            digest = zlib.crc32(self.weights.encode())
            top = [{"id": token, "logprob": -1 - (digest >> token) % 16 / 4 - token} for token in range(8)]
            return web.json_response({"content": "t", "completion_probabilities": [{"top_logprobs": top}]})
        prompt = asked["prompt"]
        tokens = tokens_of(prompt) if isinstance(prompt, str) else list(prompt)
        slot = self.slots[asked["id_slot"]]
        slot.busy, self.computing = True, self.computing + 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            slot.busy, self.computing = False, self.computing - 1
        timings = self._run(slot, tokens)
        return web.json_response({"tokens_evaluated": len(tokens), "id_slot": asked["id_slot"], "timings": timings})

    def _chat(self, asked: Mapping[str, Json]) -> web.Response:
        if "messages" not in asked:
            return error(400, "'messages' is required")
        tokens = tokens_of(rendered(asked["messages"]))
        idle = [slot for slot in self.slots if not slot.busy]
        slot = max(idle, key=lambda slot: shared(slot.words, tokens))
        if shared(slot.words, tokens) <= SIMILAR * len(tokens):
            slot = min(reversed(idle), key=lambda slot: -1 if slot.task is None else slot.task)
        timings = self._run(slot, tokens)
        message = {"role": "assistant", "content": f"Said by {self.weights}."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 3, "total_tokens": len(tokens) + 3}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "small"}
        return web.json_response({**head, "choices": [choice], "usage": usage, "timings": timings})

    def _run(self, slot: Slot, tokens: list[int]) -> Json:
        reused = min(shared(slot.words, tokens), len(tokens) - 1)
        if reused and slot.weights != self.weights:
            self.poisoned += 1
        else:
            slot.weights = self.weights
        self._tasks += 1
        slot.words, slot.task = tokens, self._tasks
        return {"cache_n": reused, "prompt_n": len(tokens) - reused}

    async def _act(self, number: int, action: str, name: str) -> web.Response:
        if self.files is None:
            return error(501, "This server does not support slots action.")
        if action == self.swaps_at:
            held = self.slots[number].words
            self._lose_all()
            self.swaps_at, self.weights = "", "second"
            # Somebody has asked the new run the same.
            self.slots[number].words = held
        slot, file = self.slots[number], self.files / name
        if action == "erase":
            erased, slot.words = len(slot.words), []
            return web.json_response({"id_slot": number, "n_erased": erased})
        if action == "save":
            text = json.dumps([slot.weights, slot.words])
            await asyncio.to_thread(file.write_text, text)
            told = {"n_saved": len(slot.words), "n_written": len(text)}
            return web.json_response({"id_slot": number, "filename": name, **told})
        slot.words = []
        if self.refuses_files or not await asyncio.to_thread(file.exists):
            return error(400, "Unable to restore slot: No available space in KV cache or invalid slot save file")
        # Of whichever weights: the server does not look.
        slot.weights, slot.words = json.loads(await asyncio.to_thread(file.read_text))
        return web.json_response({"id_slot": number, "filename": name, "n_restored": len(slot.words)})


def tokens_of(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) for word in text.split()]


def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(f"<{message['role']}> {message['content']}" for message in messages) + " <assistant>"


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))


def error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message, "type": "server_error"}}, status=status)


@asynccontextmanager
async def llamacpp(files: Path | None) -> AsyncIterator[LlamaCpp]:
    """A server that listens on loopback for the life of this block."""
    server = LlamaCpp(files)
    server.go.set()
    await server.start()
    try:
        yield server
    finally:
        server.go.set()
        await server.stop()
