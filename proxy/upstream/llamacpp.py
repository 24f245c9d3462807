"""llama.cpp's `llama-server`."""

from __future__ import annotations

import hashlib
import json

from proxy.upstream.adapter import (
    Capabilities,
    Json,
    Kind,
    Probe,
    Seen,
    Sighting,
    Silent,
    Unidentified,
    model_ids,
    trouble,
)
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


class LlamaCpp:
    """Identified by model, template and default sampling; a run by its random media marker."""

    kind = Kind.LLAMACPP
    capabilities = Capabilities(drains=False, usage_from_timings=True, key_before_body=True, tells_instances=True)

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text of the operator's that is part of the fingerprint."""
        self._epoch = epoch

    prefixing: Prefixing | None = None

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Nothing need be done."""
        del probe, path, body

    async def look(self, probe: Probe) -> Sighting:
        """Read `/props`, `/v1/models` and `/lora-adapters`."""
        props = await probe.get("/props")
        listing = await probe.get("/v1/models") if trouble(props) is None else props
        sighting = trouble(props) or trouble(listing)
        if sighting is not None:
            return sighting
        if props is None or listing is None or not isinstance(props.json, dict) or SETTINGS not in props.json:
            return Unidentified()
        adapters = await probe.get("/lora-adapters")
        identity = {
            "props": {name: props.json.get(name) for name in _PROPS},
            "sampling": _params(props.json),
            "meta": _meta(listing.json),
            "lora": adapters.json if adapters is not None and adapters.status == 200 else None,
            "epoch": self._epoch,
        }
        text = json.dumps(["llamacpp", 1, identity], sort_keys=True)
        instance = str(props.json.get("media_marker") or "")
        return Seen(hashlib.sha256(text.encode()).digest(), instance, model_ids(listing.json))

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


def _meta(listing: Json) -> Json:
    data = listing.get("data") if isinstance(listing, dict) else None
    first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
    meta = first.get("meta") or {}
    return {name: meta.get(name) for name in _META}
