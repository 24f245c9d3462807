"""RockchipLlama's prompt caches: kept by the server under a name that calls mention, once it was measured to help.

Whether the NPU reuses anything is unproven: the server tells `cache_hit: true` as soon as a file of that name exists.
Calls are sent whole in any case, so that a cache which is ignored costs nothing but the trouble.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeGuard
from urllib.parse import quote

from proxy.upstream.adapter import Json, Probe, Sighting, Unidentified, hitch, trouble
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Ready, Seeded, Style

MIN_CHARS = 256
"""Shorter leads are not worth it: a third of a second by the project's own figure, 1326 characters in 1775 ms."""

RUNS = 3
"""How often a prompt is timed with its cache and without."""

GAIN = 0.3
"""The part of the time to the first token that a cache must save to be used."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model in the server's memory; `name` is empty where there is none."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class ServerCache:
    """A cache as the server lists it: `chars` of its prompt, `created_at` in seconds since 1970, 0 where unknown."""

    name: str
    model: str
    bytes: int
    created_at: float
    chars: int
    source: str


async def loaded_model(probe: Probe) -> Loaded | Sighting:
    """What is loaded now, or why that cannot be told."""
    reply = await probe.get("/v1/models/loaded")
    sighting = trouble(reply)
    if sighting is not None:
        return sighting
    shown = reply.json if reply is not None else None
    if not isinstance(shown, dict):
        return Unidentified()
    if shown.get("loaded") is False:
        return Loaded("", "")
    name, path = shown.get("model_name"), shown.get("model_path")
    return Loaded(name, path) if is_text(name) and is_text(path) else Unidentified()


def is_text(value: Json) -> TypeGuard[str]:
    """Whether it is a text that can be written down: JSON may hold halves of surrogate pairs."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


class NamedCaches:
    """Caches by `POST /v1/cache/{model}`, mentioned as `use_cache`.

    The file names of `Prefixing` are the names of caches. What a cache was proved for is forgotten with the process
    and on a restart of the server: it is measured again then.
    """

    style = Style.NAMED
    cancels = False

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds."""
        self._clock = clock
        self._proved: dict[tuple[bytes, str], str] = {}

    async def seed(self, probe: Probe, lead: Lead, file: str) -> Seeded | Hitch:
        """Have the lead computed and kept: one prefill and one token, during which the server does nothing else.

        Leads with tools and the like, with parts that are not plain text, and with roles that the server refuses are
        unsupported: what it would render of them is unknown. Give `probe` the time that a prefill takes.
        """
        prompt = chatml(lead)
        if prompt is None or not _is_name(file):
            return Hitch.UNSUPPORTED
        if lead.chars < MIN_CHARS:
            return Hitch.TOO_SHORT
        loaded = await loaded_model(probe)
        if not isinstance(loaded, Loaded):
            return hitch(loaded)
        if not loaded.name:
            return Hitch.UNREACHABLE
        if "/" in loaded.name:
            # `use_cache` fails with 500 for these.
            return Hitch.UNSUPPORTED
        self._drop(file)
        started = self._clock()
        reply = await probe.post(_caches_of(loaded.name), {"cache_name": file, "prompt": prompt})
        seconds = self._clock() - started
        sighting = trouble(reply)
        if sighting is not None:
            return hitch(sighting)
        made = reply.json if reply is not None else None
        if not isinstance(made, dict) or made.get("object") != "cache.created":
            return Hitch.REFUSED
        return Seeded(0, b"", file, _bytes(made.get("size_mb")), seconds)

    async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
        """Mention the cache where it was proved to help, is still there, and its model is loaded.

        The model is named too: the server looks for the cache under the name that a call gives, and would feed what it
        finds there to whatever model is loaded.
        """
        model = self._proved.get((lead.id, kept.file)) if lead is not None and kept is not None else None
        if model is None or kept is None:
            return Ready(Readied.NOTHING)
        started = self._clock()
        loaded, cache = await asyncio.gather(loaded_model(probe), probe.get(_cache(model, kept.file)))
        seconds = self._clock() - started
        if not isinstance(loaded, Loaded) or loaded.name != model:
            return Ready(Readied.SKIPPED, seconds)
        if cache is not None and cache.status == 404:
            self._drop(kept.file)
            return Ready(Readied.REFUSED, seconds)
        if trouble(cache) is not None:
            return Ready(Readied.SKIPPED, seconds)
        return Ready(Readied.NAMED, seconds, edits={"model": model, "use_cache": kept.file})

    async def landed(self, probe: Probe, lead: Lead | None, ready: Ready, evidence: Evidence) -> None:
        """Nothing can be learned from a reply of this server."""
        del probe, lead, ready, evidence

    async def forget(self, probe: Probe, kept: Kept) -> bool:
        """Delete the cache of that name, whichever model it belongs to."""
        self._drop(kept.file)
        held = await self.listing(probe)
        models = {cache.model for cache in held or () if cache.name == kept.file}
        replies = [await probe.delete(_cache(model, kept.file)) for model in sorted(models)]
        return any(trouble(reply) is None for reply in replies)

    async def prove(self, probe: Probe, lead: Lead, kept: Kept) -> bool | None:
        """Time whole prompts to their first token with the cache and without, in turn; six short calls.

        None where a call failed or the model changed meanwhile, so that nothing was measured.
        """
        if chatml(lead) is None or not _is_name(kept.file):
            return False
        self._proved.pop((lead.id, kept.file), None)
        loaded = await loaded_model(probe)
        if not isinstance(loaded, Loaded) or not loaded.name:
            return None
        without: list[float] = []
        mentioned: list[float] = []
        for run in range(1, 2 * RUNS + 1):
            # Texts of one length, all different: the server and its runtime may know the last prompt again.
            body = {**lead.with_user(f"Say {run}."), "model": loaded.name, "max_tokens": 1, "stream": True}
            edits = {} if run % 2 else {"use_cache": kept.file}
            seconds = await self._to_first_token(probe, {**body, **edits})
            if seconds is None:
                return None
            (mentioned if edits else without).append(seconds)
        if await loaded_model(probe) != loaded:
            return None
        helps = median(mentioned) <= (1 - GAIN) * median(without)
        if helps:
            self._proved[lead.id, kept.file] = loaded.name
        return helps

    def reset(self) -> None:
        """Caches outlive the server, but another version of it may make nothing of them."""
        self._proved.clear()

    async def listing(self, probe: Probe) -> tuple[ServerCache, ...] | None:
        """All caches that the server has, of every model; None where it does not tell."""
        reply = await probe.get("/v1/cache")
        shown = reply.json if reply is not None and trouble(reply) is None else None
        models = shown.get("data") if isinstance(shown, dict) else None
        if not isinstance(models, dict):
            return None
        listed = [(model, one) for model, held in models.items() if isinstance(held, list) for one in held]
        return tuple(cache for model, one in listed if (cache := _listed(model, one)) is not None)

    async def _to_first_token(self, probe: Probe, body: Mapping[str, Json]) -> float | None:
        """Seconds until the answer began; None where it was no answer."""
        heard = bytearray()
        began = started = self._clock()

        def hear(chunk: bytes) -> None:
            nonlocal began
            if not heard:
                began = self._clock()
            heard.extend(chunk)

        status = await probe.streamed("/v1/chat/completions", body, hear)
        return began - started if status == 200 and _spoke(bytes(heard)) else None

    def _drop(self, file: str) -> None:
        self._proved = {known: model for known, model in self._proved.items() if known[1] != file}


def chatml(lead: Lead) -> str | None:
    """What the server renders of a lead; None where that is not known.

    A cache made of `messages` would end with the opening of the assistant's turn, which no call continues.
    """
    if set(lead.body) - {"messages", "model"}:
        return None
    parts = [_rendered(message) for message in lead.body["messages"]]
    return None if None in parts else "".join(part for part in parts if part is not None)


def _rendered(message: Mapping[str, Json]) -> str | None:
    role, content = message.get("role"), message.get("content")
    if role != "system" or not isinstance(content, str) or not is_text(content):
        return None
    return f"<|im_start|>system\n{content}<|im_end|>\n"


def _is_name(file: str) -> bool:
    # The server keeps "system" for itself and does not let go of it.
    return _NAME.fullmatch(file) is not None and file != "system"


def _caches_of(model: str) -> str:
    return f"/v1/cache/{quote(model, safe='')}"


def _cache(model: str, name: str) -> str:
    return f"{_caches_of(model)}/{quote(name, safe='')}"


def _listed(model: str, shown: Json) -> ServerCache | None:
    if not isinstance(shown, dict) or not is_text(model) or not is_text(shown.get("cache_name")):
        return None
    source = shown.get("source")
    return ServerCache(
        name=shown["cache_name"],
        model=model,
        bytes=_bytes(shown.get("size_mb")),
        created_at=_number(shown.get("created_at")),
        chars=int(_number(shown.get("prompt_length"))),
        source=source if is_text(source) else "",
    )


def _bytes(mebibytes: Json) -> int:
    return int(_number(mebibytes) * _MIB)


def _number(value: Json) -> float:
    """A number that can be true of a file; 0 for all else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _spoke(stream: bytes) -> bool:
    """Whether an event stream is an answer: it says something, and ends as it should."""
    lines = [line[5:].strip() for line in stream.splitlines() if line.startswith(b"data:")]
    return b"[DONE]" in lines and any(_content(line) for line in lines)


def _content(event: bytes) -> str:
    try:
        choices: Sequence[Json] = json.loads(event)["choices"]
        said = choices[0]["delta"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return said if isinstance(said, str) else ""
