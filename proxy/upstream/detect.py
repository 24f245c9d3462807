"""Which adapter serves an upstream: as configured, or as its own answers tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import assert_never

from proxy.upstream.adapter import (
    Adapter,
    Capabilities,
    Json,
    Kind,
    Loading,
    Locked,
    Probe,
    Reply,
    Seen,
    Sighting,
    Silent,
    Unidentified,
    Unreachable,
    model_ids,
    trouble,
)
from proxy.upstream.llamacpp import SETTINGS, LlamaCpp
from proxy.upstream.openai import OpenAI
from proxy.upstream.prefix import Prefixing
from proxy.upstream.rkllama import Rkllama
from proxy.upstream.rkllm_flask import RkllmFlask
from proxy.upstream.rockchipllama import RockchipLlama

log = logging.getLogger("nearhit.upstream")

ADAPTERS: Mapping[Kind, Callable[[str], Adapter]] = MappingProxyType(
    {
        Kind.OPENAI: OpenAI,
        Kind.LLAMACPP: LlamaCpp,
        Kind.ROCKCHIPLLAMA: RockchipLlama,
        Kind.RKLLAMA: Rkllama,
        Kind.RKLLM_FLASK: RkllmFlask,
    }
)
"""Every adapter by its kind; each takes the operator's epoch."""

_NO_SUCH_PATH = frozenset({400, 404, 405, 422, 501})

_RKLLM_OWNERS = frozenset({"rkllm", "rkllm_server", "rockchip"})
"""What servers for Rockchip NPUs of several kinds call the owner of their models."""


@dataclass(frozen=True, slots=True)
class Found:
    """The kind that answers; `doubt` says why it may be another, and what to do then. Empty where there is none."""

    kind: Kind
    doubt: str = ""


class Detected:
    """The adapter of the kind that was found, or the generic one as long as none was."""

    def __init__(self, epoch: str, known: Kind | None) -> None:
        """`known` is the kind found in an earlier run."""
        self._epoch = epoch
        self._adapter = ADAPTERS[known or Kind.OPENAI](epoch)
        self._sure = False
        self.doubt = ""
        """Why the kind found may not be the right one, and what to do then; empty where there is no doubt."""

    @property
    def kind(self) -> Kind:
        """The kind found."""
        return self._adapter.kind

    @property
    def capabilities(self) -> Capabilities:
        """Of the kind found."""
        return self._adapter.capabilities

    @property
    def adapter(self) -> Adapter:
        """Of the kind found: for what only one kind can do."""
        return self._adapter

    async def look(self, probe: Probe) -> Sighting:
        """Look; find out the kind first where another server may have taken the place of the one known."""
        if not self._sure:
            found = await detect(probe)
            if not isinstance(found, Found):
                return found
            self._take(found)
        sighting = await self._adapter.look(probe)
        self._sure = isinstance(sighting, Seen | Silent | Locked)
        return sighting

    @property
    def prefixing(self) -> Prefixing | None:
        """Of the kind found."""
        return self._adapter.prefixing

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """As the kind found needs."""
        await self._adapter.make_way(probe, path, body)

    async def same_instance(self, probe: Probe, instance: str) -> bool | None:
        """As the kind found tells."""
        return await self._adapter.same_instance(probe, instance)

    def _take(self, found: Found) -> None:
        if found.kind is not self.kind:
            self._adapter = ADAPTERS[found.kind](self._epoch)
        if found.doubt != self.doubt:
            self.doubt = found.doubt
            if found.doubt:
                log.warning("the kind of the upstream is a guess, %s: %s", found.kind.value, found.doubt)


async def detect(probe: Probe) -> Found | Sighting:
    """The kind of server that answers, or why that cannot be told now; two requests where nothing is special.

    llama.cpp shows `/props` with its sampling defaults; behind a key, it refuses `/props` and answers `/health` openly.
    The others have no such path; their lists of models tell whom to ask further.
    """
    props = await probe.get("/props")
    match trouble(props):
        case None:
            shown = props.json if props is not None else None
            if isinstance(shown, dict) and SETTINGS in shown:
                return Found(Kind.LLAMACPP)
            return await _by_models(probe)
        case Locked():
            health = await probe.get("/health")
            is_llama = health is not None and health.status == 200 and health.json == {"status": "ok"}
            return Found(Kind.LLAMACPP) if is_llama else Found(Kind.OPENAI, _WANTS_A_KEY)
        case Unidentified() if props is not None and props.status in _NO_SUCH_PATH:
            return await _by_models(probe)
        case Seen() | Unreachable() | Silent() | Loading() | Unidentified() as sighting:
            return sighting
        case other:
            assert_never(other)


async def _by_models(probe: Probe) -> Found | Sighting:
    listing = await probe.get("/v1/models")
    match trouble(listing):
        case None:
            return await _by_owner(probe, listing.json if listing is not None else None)
        case Locked():
            return Found(Kind.OPENAI, _WANTS_A_KEY)
        case Unidentified() if listing is not None and listing.status < 500:
            return Found(Kind.OPENAI)
        case Unidentified() if listing is not None and listing.status == 501:
            return Found(Kind.OPENAI)
        case Seen() | Unreachable() | Silent() | Loading() | Unidentified() as sighting:
            return sighting
        case other:
            assert_never(other)


async def _by_owner(probe: Probe, listing: Json) -> Found | Sighting:
    """By whom the listed models are owned; a name that several kinds use is not enough."""
    owners = _owners(listing)
    if "rkllama" in owners:
        return Found(Kind.RKLLAMA)
    if not model_ids(listing):
        return await _without_models(probe)
    if "rockchip" in owners:
        health = await probe.get("/v1/health")
        return Found(Kind.ROCKCHIPLLAMA) if _is_rockchipllama(health) else _settled(health) or _UNKNOWN_RKLLM
    if "rkllm" in owners and len(model_ids(listing)) == 1:
        # The vendor's demo has two paths; Flask answers 404 with a page for all others.
        health = await probe.get("/health")
        is_demo = health is not None and health.status == 404 and health.json is None
        return Found(Kind.RKLLM_FLASK) if is_demo else _settled(health) or _UNKNOWN_RKLLM
    if owners & _RKLLM_OWNERS:
        return _UNKNOWN_RKLLM
    return Found(Kind.OPENAI, _HIDES_PROPS if "llamacpp" in owners else "")


async def _without_models(probe: Probe) -> Found | Sighting:
    """By what is said beside an empty list."""
    health = await probe.get("/v1/health")
    if _is_rockchipllama(health):
        return Found(Kind.ROCKCHIPLLAMA)
    welcome = await probe.get("/")
    said = welcome.json.get("message") if welcome is not None and isinstance(welcome.json, dict) else None
    if isinstance(said, str) and "rkllama" in said.lower():
        return Found(Kind.RKLLAMA)
    return _settled(health) or _settled(welcome) or Found(Kind.OPENAI, _NO_MODELS)


def _settled(reply: Reply | None) -> Sighting | None:
    """What keeps an answer from telling the kind now, where that will pass."""
    sighting = trouble(reply)
    return sighting if isinstance(sighting, Unreachable | Silent | Loading) else None


def _is_rockchipllama(health: Reply | None) -> bool:
    shown = health.json if health is not None and trouble(health) is None else None
    return isinstance(shown, dict) and isinstance(shown.get("model_loaded"), bool) and "loaded_model" in shown


def _owners(listing: Json) -> frozenset[str]:
    data = listing.get("data") if isinstance(listing, dict) else None
    owners = [item.get("owned_by") for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    return frozenset(owner for owner in owners if isinstance(owner, str))


_WANTS_A_KEY = (
    "it wants a key to show what it is: set upstream.api_key, or upstream.kind if it is no OpenAI-like server"
)
_HIDES_PROPS = "it looks like llama.cpp and does not show /props: set upstream.kind to llamacpp and let nearhit read it"
_NO_MODELS = "it lists no models: set upstream.kind if it is no OpenAI-like server"
_UNKNOWN_RKLLM = Found(
    Kind.OPENAI,
    "it looks like a server for a Rockchip NPU, of a kind that nearhit does not know: "
    "if it is one of rockchipllama, rkllama and rkllm_flask, set upstream.kind",
)
