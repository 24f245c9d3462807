"""RockchipLlama, an OpenAI-compatible server for the NPU of Rockchip boards (FastAPI, port 8021, no authentication)."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from urllib.parse import unquote

from proxy.upstream.adapter import Capabilities, Json, Kind, Probe, Seen, Sighting, Silent, Unidentified, trouble
from proxy.upstream.prefix import Prefixing
from proxy.upstream.rockchipllama_prefixes import Loaded, NamedCaches, is_text, loaded_model

LOAD = "/v1/models/load"
_UNLOAD = "/v1/models/unload"
_AVAILABLE = "/v1/models/available"
_NOTHING_LOADED = "the upstream has no model loaded: the first call loads one"


class RockchipLlama:
    """Identified by the model that is loaded: its name, and its file's path, name and size.

    Why it behaves as `capabilities` say:

    - `drains`: an abandoned chat goes on to its end and the next call waits; an abandoned completion makes the next
      call fail.
    - `max_concurrency`: one inference at a time. It queues without bound and in no order of ours.
    - `honours_sampling`: the runtime's own settings rule (temperature 0.6); calls cannot change them.
    - `multi_turn`: a prompt that continues the last one is sent in part, with the history discarded, so that answers to
      later turns may know nothing of the earlier ones.
    - `tells_length`: an answer that was cut says `stop`. Usage counts words; no limit, 0 and -1 mean 512 tokens.
    - `sends_loaded`: it answers with what is loaded, whichever model a call names, and looks for caches under the name
      that the call gives.
    - `tells_instances`: what is loaded can be asked for in one request, so that an answer is kept only if the model
      that gave it is still there. A restart that loads the same model is not noticed, and need not be.

    Nothing shows a file that was changed in its place and kept its size to 10 KB, nor the sampling settings: `epoch` is
    there for these.
    """

    kind = Kind.ROCKCHIPLLAMA
    capabilities = Capabilities(
        drains=True,
        usage_from_timings=False,
        key_before_body=False,
        tells_instances=True,
        max_concurrency=1,
        honours_sampling=False,
        multi_turn=False,
        tells_length=False,
        usage_unit="words",
        default_limit=512,
        sends_loaded=True,
        open_to_all=True,
    )

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text of the operator's that is part of the fingerprint."""
        self._epoch = epoch
        self.caches = NamedCaches()

    @property
    def prefixing(self) -> Prefixing:
        """Named caches; experimental, because none is mentioned until it was measured to help."""
        return self.caches

    async def look(self, probe: Probe) -> Sighting:
        """Ask what is loaded, and for its file.

        With nothing loaded there is no identity: the next call loads a model of its own choice, and one that comes
        between names another in vain.
        """
        loaded = await loaded_model(probe)
        if not isinstance(loaded, Loaded):
            return loaded
        available = await probe.get(_AVAILABLE)
        sighting = trouble(available)
        if sighting is not None:
            return sighting
        shown = available.json if available is not None else None
        files = _files(shown)
        if not loaded.name:
            return Unidentified(_NOTHING_LOADED if isinstance(shown, dict) else "")
        mine = [file for file in files if file["path"] == loaded.path]
        # What was loaded between the two requests is seen whole the next time.
        if not mine or shown is None or shown.get("loaded_model") != loaded.name:
            return Unidentified()
        identity = [loaded.name, loaded.path, mine[0]["filename"], mine[0]["size"], self._epoch]
        digest = hashlib.sha256(json.dumps(["rockchipllama", 1, identity]).encode()).digest()
        # Of several files under one name the first counts, as it does for the server.
        names = {file["name"]: file["filename"] for file in reversed(files)}
        return Seen(digest, _instance(loaded), tuple(sorted({*names, loaded.name})), loaded.name, names)

    async def same_instance(self, probe: Probe, instance: str) -> bool | None:
        """Whether the same model is loaded."""
        loaded = await loaded_model(probe)
        if isinstance(loaded, Silent):
            return None
        return isinstance(loaded, Loaded) and loaded.name != "" and _instance(loaded) == instance

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Unload before another model is loaded: the server would wait for itself for ever.

        What it does not list it refuses to load without harm; that is no reason to unload.
        """
        wanted = _wanted(body) if unquote(path.partition("?")[0]).rstrip("/") == LOAD else ""
        if not wanted:
            return
        loaded = await loaded_model(probe)
        if isinstance(loaded, Loaded) and loaded.name not in ("", wanted) and await _may_load(probe, wanted):
            await probe.post(_UNLOAD, {})


def _instance(loaded: Loaded) -> str:
    return json.dumps([loaded.name, loaded.path])


def _files(available: Json) -> list[dict[str, str]]:
    """The listed models of which all is told that identifies them; `size` is what the list says of their files."""
    listed = available.get("models") if isinstance(available, dict) else None
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    told = ("name", "filename", "path")
    return [
        {**{part: entry[part] for part in told}, "size": json.dumps(entry["size_mb"])}
        for entry in entries
        if all(is_text(entry.get(part)) for part in told) and isinstance(entry.get("size_mb"), int | float)
    ]


def _wanted(body: bytes) -> str:
    """The model that a request to load names, in the form that the server compares."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    model = asked.get("model") if isinstance(asked, dict) else None
    return model.removesuffix(".rkllm") if isinstance(model, str) else ""


async def _may_load(probe: Probe, wanted: str) -> bool:
    """Whether the server has such a model, or does not tell."""
    reply = await probe.get(_AVAILABLE)
    if reply is None or trouble(reply) is not None or not isinstance(reply.json, dict):
        return True
    names = {file["name"] for file in _files(reply.json)}
    stems = {PurePosixPath(file["filename"]).stem for file in _files(reply.json)}
    return wanted.casefold() in {name.casefold() for name in names | stems}
