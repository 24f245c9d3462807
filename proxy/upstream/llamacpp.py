"""llama.cpp's `llama-server`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import PureWindowsPath

from proxy.upstream.adapter import (
    Capabilities,
    Json,
    Kind,
    Probe,
    Room,
    Seen,
    Sighting,
    Silent,
    Unidentified,
    Unreachable,
    model_ids,
    trouble,
)
from proxy.upstream.canary import ask_llamacpp
from proxy.upstream.llamacpp_prefixes import LlamaCppPrefixes
from proxy.upstream.prefix import Prefixing

SETTINGS = "default_generation_settings"
"""The part of `/props` that only llama.cpp has."""

_PROPS = (
    "model_path",
    "model_alias",
    "model_ftype",
    "build_info",
    "chat_template",
    "chat_template_tool_use",
    "bos_token",
    "eos_token",
    "modalities",
)
_META = ("vocab_type", "n_vocab", "n_ctx_train", "n_embd", "n_params", "size", "ftype")

_NO_SUCH_PATH = frozenset({400, 403, 404, 405, 501})


@dataclass(frozen=True, slots=True)
class _Adapters:
    """What `/lora-adapters` listed in a run; None where there is no such path."""

    instance: str
    listed: Json


class LlamaCpp:
    """Identified by model, template, default sampling and the canary; a run by its random media marker."""

    kind = Kind.LLAMACPP
    capabilities = Capabilities(drains=False, usage_from_timings=True, key_before_body=True, tells_instances=True)

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text of the operator's that is part of the fingerprint."""
        self._epoch = epoch
        self._known_adapters: _Adapters | None = None
        self._slots = LlamaCppPrefixes()

    @property
    def prefixing(self) -> Prefixing:
        """Its slots, which can be saved to files and restored."""
        return self._slots

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Nothing need be done."""
        del probe, path, body

    async def look(self, probe: Probe) -> Sighting:
        """Read `/props`, `/v1/models` and, once for each run at least, `/lora-adapters`."""
        props = await probe.get("/props")
        listing = await probe.get("/v1/models") if trouble(props) is None else props
        sighting = trouble(props) or trouble(listing)
        if sighting is not None:
            return sighting
        if props is None or listing is None or not isinstance(props.json, dict) or SETTINGS not in props.json:
            return Unidentified()
        asleep = props.json.get("is_sleeping") is True
        instance = str(props.json.get("media_marker") or "")
        adapters = await self._adapters(probe, instance, asleep=asleep)
        if not isinstance(adapters, _Adapters):
            return adapters
        identity = {
            "props": {name: props.json.get(name) for name in _PROPS},
            "sampling": _params(props.json),
            "meta": _meta(listing.json),
            "lora": adapters.listed,
            "epoch": self._epoch,
        }
        fingerprint = hashlib.sha256(json.dumps(["llamacpp", 1, identity], sort_keys=True).encode()).digest()
        models = model_ids(listing.json)
        loaded = models[0] if len(models) == 1 else ""
        files = {loaded: _file_name(props.json.get("model_path"))} if loaded else {}
        room = _room(props.json)
        return Seen(fingerprint, instance, models, loaded, files, canary=ask_llamacpp, asleep=asleep, room=room)

    async def _adapters(self, probe: Probe, instance: str, *, asleep: bool) -> _Adapters | Sighting:
        """What `/lora-adapters` lists.

        Asking wakes a server that sleeps, and keeps it from falling asleep. So it is asked as seldom as can be: in one
        run no adapter comes or goes, only their scales change.
        """
        known = self._known_adapters
        if known is not None and instance and known.instance == instance and (asleep or not known.listed):
            return known
        reply = await probe.get("/lora-adapters")
        refused = reply is not None and reply.status in _NO_SUCH_PATH
        sighting = None if refused else trouble(reply)
        if reply is None or sighting is not None:
            # For a moment without an answer is not for a run without adapters.
            return sighting or Unreachable()
        self._known_adapters = _Adapters(instance, None if refused else reply.json)
        return self._known_adapters

    async def same_instance(self, probe: Probe, instance: str) -> bool | None:
        """Compare the media marker, which is random for every start of the server."""
        props = await probe.get("/props")
        if isinstance(trouble(props), Silent):
            return None
        marker = props.json.get("media_marker") if props is not None and isinstance(props.json, dict) else None
        return isinstance(marker, str) and marker == instance


def _params(props: dict[str, Json]) -> Json:
    settings = props.get(SETTINGS)
    return settings.get("params") if isinstance(settings, dict) else None


def _room(props: dict[str, Json]) -> Room:
    """Its context, of each slot, and its own limit (`-n`)."""
    settings, params = props.get(SETTINGS), _params(props)
    context = settings.get("n_ctx") if isinstance(settings, dict) else None
    limit = params.get("max_tokens") if isinstance(params, dict) else None
    return Room(*(n if isinstance(n, int) and n > 0 else 0 for n in (context, limit)))


def _meta(listing: Json) -> Json:
    data = listing.get("data") if isinstance(listing, dict) else None
    first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
    meta = first.get("meta")
    return {name: meta.get(name) for name in _META} if isinstance(meta, dict) else None


def _file_name(path: Json) -> str:
    # The server may be a Windows one, whatever we run on.
    return PureWindowsPath(path).name if isinstance(path, str) else ""
