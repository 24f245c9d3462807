"""A server with slots, files and named caches, in little, and what can be done about prefixes on it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from proxy.upstream.adapter import Probe, Reply, hitch, trouble
from proxy.upstream.client import Upstream, client_session
from proxy.upstream.lane import Lane
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Ready, Seeded, Style, lead_of_prompt
from proxy.upstream.prefix_cache import PrefixCache, running_prefixes
from proxy.upstream.prefix_files import PrefixFiles
from proxy.upstream.prefix_record import ServerNames
from proxy.upstream.prefix_shelf import Keeping
from proxy.upstream.prefix_terms import Configured, PrefixTerms, Running, Surroundings
from proxy.upstream.prefix_view import Row

NAMES = ServerNames(b"an installation's secret")


def lead(topic: str, words: int = 100) -> Lead:
    """A system prompt of so many words."""
    return lead_of_prompt(" ".join(f"{topic}-{number}" for number in range(words)))


def words_of(prompt: Lead) -> list[str]:
    return str(prompt.body["messages"][0]["content"]).split()


@dataclass
class Slot:
    words: list[str] = field(default_factory=list)
    used: int = 0


@dataclass
class Server:
    """One token is one word. `files`: where it saves, None: it cannot."""

    files: Path | None
    url: str = ""
    weights: str = "first"
    instance: str = ""
    """What it calls its run."""
    poisoned: int = 0
    """Restores of what other weights had computed."""
    slots: list[Slot] = field(default_factory=lambda: [Slot(), Slot()])
    prefilled: list[str] = field(default_factory=list)
    """The first words of what was computed for its own sake."""
    restored: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    useless_files: bool = False
    """A restore succeeds, and nothing is found."""
    refuses_files: bool = False
    forgetful: bool = False
    """Nothing is ever found."""
    silent: bool = False
    """Replies do not tell what was found."""
    caches_help: bool | None = True
    prefill_status: int = 200
    save_status: int = 200
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is clear, computing takes for ever."""
    prefilling: int = 0
    measured: int = 0
    tasks: int = 0

    def __post_init__(self) -> None:
        self.open.set()

    def restart(self) -> None:
        for slot in self.slots:
            slot.words, slot.used = [], 0

    def oldest(self) -> int:
        return min(range(len(self.slots)), key=lambda index: self.slots[index].used)

    def fill(self, index: int, words: list[str]) -> None:
        self.tasks += 1
        self.slots[index].words, self.slots[index].used = words, self.tasks

    async def prefill(self, request: web.Request) -> web.Response:
        words = (await request.json())["text"].split()
        self.prefilling += 1
        try:
            await self.open.wait()
        finally:
            self.prefilling -= 1
        if self.prefill_status != 200:
            return web.json_response({}, status=self.prefill_status)
        self.prefilled.append(words[0])
        index = self.oldest()
        self.fill(index, words)
        return web.json_response({"slot": index, "tokens": len(words), "instance": self.instance})

    async def save(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if self.files is None or self.save_status != 200:
            return web.json_response({}, status=501 if self.files is None else self.save_status)
        content = json.dumps([self.weights, self.slots[asked["slot"]].words]).encode()
        await asyncio.to_thread((self.files / asked["file"]).write_bytes, content)
        return web.json_response({"bytes": len(content)})

    async def restore(self, request: web.Request) -> web.Response:
        asked = await request.json()
        assert self.files is not None
        path = self.files / asked["file"]
        if self.refuses_files or not await asyncio.to_thread(path.exists):
            return web.json_response({}, status=400)
        weights, words = json.loads(await asyncio.to_thread(path.read_bytes))
        self.poisoned += weights != self.weights
        index = self.oldest()
        self.fill(index, [] if self.useless_files else words)
        self.restored.append(words[0])
        return web.json_response({"slot": index})

    async def chat(self, request: web.Request) -> web.Response:
        asked = await request.json()
        words = " ".join(message["content"] for message in asked["messages"]).split()
        found = [0 if self.forgetful else _shared(slot.words, words) for slot in self.slots]
        index = max(range(len(found)), key=lambda index: found[index]) if max(found) > 5 else self.oldest()
        cached = found[index]
        self.fill(index, [*words, "answer"])
        told = {} if self.silent else {"cached": cached, "computed": len(words) - cached}
        return web.json_response({**told, "use_cache": asked.get("use_cache")})

    async def measure(self, request: web.Request) -> web.Response:
        self.measured += 1
        return web.json_response({"helps": self.caches_help})

    async def delete(self, request: web.Request) -> web.Response:
        self.deleted.append(request.match_info["file"])
        return web.json_response({})


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@asynccontextmanager
async def imitation_server(files: Path | None) -> AsyncIterator[Server]:
    server = Server(files)
    app = web.Application()
    app.router.add_post("/prefill", server.prefill)
    app.router.add_post("/save", server.save)
    app.router.add_post("/restore", server.restore)
    app.router.add_post("/chat", server.chat)
    app.router.add_get("/measure", server.measure)
    app.router.add_delete("/files/{file}", server.delete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        server.open.set()
        await runner.cleanup()


class Imitation:
    """What can be done about prefixes on such a server."""

    def __init__(self, style: Style = Style.FILE, *, cancels: bool = True, least: int = 10) -> None:
        self.style = style
        self.cancels = cancels
        self.resets = 0
        self._least = least
        self._resident: dict[bytes, int] = {}

    async def seed(self, probe: Probe, lead: Lead, file: str) -> Seeded | Hitch:
        words = words_of(lead)
        if len(words) < self._least:
            return Hitch.TOO_SHORT
        started = time.monotonic()
        reply = await probe.post("/prefill", {"text": " ".join(words)})
        if (sighting := trouble(reply)) is not None or reply is None:
            return Hitch.REFUSED if reply is not None and reply.status == 500 else hitch(sighting or _never())
        slot, size = reply.json["slot"], 0
        self._believe(lead, slot)
        if self.style in (Style.FILE, Style.NAMED) and file:
            saved = await probe.post("/save", {"slot": slot, "file": file})
            if saved is not None and saved.status == 501:
                self.style = Style.WARM
            size = saved.json["bytes"] if saved is not None and saved.status == 200 else 0
        seconds = time.monotonic() - started
        return Seeded(len(words), lead.id, file if size else "", size, seconds, slot, reply.json["instance"])

    async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
        if lead is None or kept is None:
            return Ready(Readied.NOTHING)
        if self.style is Style.NAMED:
            return Ready(Readied.NAMED, edits={"use_cache": kept.file})
        if lead.id in self._resident:
            return Ready(Readied.RESIDENT)
        reply = await probe.post("/restore", {"file": kept.file})
        if reply is not None and reply.status == 400:
            return Ready(Readied.REFUSED)
        if trouble(reply) is not None or reply is None:
            return Ready(Readied.SKIPPED)
        self._believe(lead, reply.json["slot"])
        return Ready(Readied.RESTORED, 0.01, reply.json["slot"])

    async def landed(self, probe: Probe, lead: Lead | None, ready: Ready, evidence: Evidence) -> None:
        # Whoever was called last may be anywhere: each call is restored anew, as with more leads than slots.
        self._resident.clear()

    async def forget(self, probe: Probe, kept: Kept) -> bool:
        return trouble(await probe.delete(f"/files/{kept.file}")) is None

    async def prove(self, probe: Probe, lead: Lead, kept: Kept) -> bool | None:
        if self.style is Style.FILE:
            return None
        reply = await probe.get("/measure")
        return reply.json["helps"] if reply is not None and reply.status == 200 else None

    def reset(self) -> None:
        self.resets += 1
        self._resident.clear()

    def _believe(self, lead: Lead, slot: int) -> None:
        self._resident = {known: at for known, at in self._resident.items() if at != slot}
        self._resident[lead.id] = slot


def _never() -> Any:
    raise AssertionError("a success is no trouble")


@dataclass
class Counts:
    """Counts as metrics would."""

    restores: list[Readied] = field(default_factory=list)
    loads: int = 0
    tokens: int = 0
    seeds: int = 0
    preemptions: int = 0
    hitches: list[Hitch] = field(default_factory=list)

    def restored(self, result: Readied) -> None:
        self.restores.append(result)

    def load_seconds(self, seconds: float) -> None:
        self.loads += 1

    def reused(self, tokens: int) -> None:
        self.tokens += tokens

    def seeded(self, seconds: float) -> None:
        self.seeds += 1

    def preempted(self) -> None:
        self.preemptions += 1

    def seed_failed(self, hitch: Hitch) -> None:
        self.hitches.append(hitch)


@dataclass
class Stage:
    """A server, and nearhit's prefix cache for it; `running` is what the server runs."""

    server: Server
    prefixing: Imitation
    cache: PrefixCache
    lane: Lane
    probe: Probe
    counts: Counts
    scene: Scene

    async def call(self, prompt: Lead | None, question: str = "what?") -> Reply:
        """A call as it goes through nearhit; what the server said."""
        fingerprint = self.scene.running.fingerprint if self.scene.running is not None else None
        async with self.lane.place(b"somebody"):
            ready = await self.cache.before(self.probe, prompt, fingerprint, self.scene.instance)
            messages = [*(prompt.body["messages"] if prompt else []), {"role": "user", "content": question}]
            reply = await self.probe.post("/chat", {"messages": messages, **ready.edits})
        assert reply is not None
        told = reply.json if isinstance(reply.json, dict) else {}
        evidence = Evidence(told.get("cached"), told.get("computed"))
        await self.cache.after(self.probe, prompt, ready, evidence, fingerprint)
        return reply

    async def cached(self, prompt: Lead, question: str = "what?") -> int:
        """The words that the server did not compute for a call."""
        return int((await self.call(prompt, question)).json["cached"])

    def row(self, name: str) -> Row:
        return next(row for row in self.cache.listing() if row.name == name)

    def states(self) -> dict[str, str]:
        return {row.name: row.state for row in self.cache.listing()}


@dataclass
class Scene:
    """Where things are, and what the upstream runs; `begin` starts nearhit, again and again."""

    folder: Path
    server: Server
    running: Running | None = field(default_factory=lambda: Running(b"\1" * 32, "small"))
    terms: PrefixTerms = field(
        default_factory=lambda: PrefixTerms(soon_s=0.0, seed_idle_s=0.0, retry_s=0.01, learn_after=3)
    )
    max_bytes: int = 10_000_000
    ring: int = 0
    sees_files: bool = True
    slot_dir: Path | None = None
    """Another folder than the server's."""
    upstream: str | None = None
    """Whose records alone are dealt with."""
    instance: str = ""

    @asynccontextmanager
    async def begin(self, *configured: Configured, prefixing: Imitation | None = None) -> AsyncIterator[Stage]:
        prefixing = prefixing or Imitation()
        slot_dir = (self.slot_dir or self.server.files) if self.sees_files else None
        files = PrefixFiles(self.folder / "prefixes", slot_dir, self.max_bytes, names=NAMES, upstream=self.upstream)
        lane, counts = Lane(), Counts()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(client_session(connect_timeout_s=5, read_timeout_s=0))
            probe = Probe(Upstream(self.server.url, session, lambda: None), {}, self.terms.seed_timeout_s)
            keeping = Keeping(files, NAMES, self.server.url, self.sees_files, self.max_bytes, self.ring)
            surroundings = Surroundings(lambda: prefixing, lambda: self.running, lane, probe, keeping, counts)
            cache = PrefixCache(surroundings, self.terms, configured)
            await stack.enter_async_context(running_prefixes(cache))
            yield Stage(self.server, prefixing, cache, lane, probe, counts, self)
