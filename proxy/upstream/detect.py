"""Which adapter serves an upstream: as configured, or as its own answers tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import assert_never

from proxy.upstream.adapter import (
    Adapter,
    Capabilities,
    Kind,
    Loading,
    Locked,
    Probe,
    Seen,
    Sighting,
    Silent,
    Unidentified,
    Unreachable,
    trouble,
)
from proxy.upstream.llamacpp import SETTINGS, LlamaCpp
from proxy.upstream.openai import OpenAI
from proxy.upstream.prefix import Prefixing

ADAPTERS: Mapping[Kind, Callable[[str], Adapter]] = MappingProxyType({Kind.OPENAI: OpenAI, Kind.LLAMACPP: LlamaCpp})
"""Every adapter by its kind; each takes the operator's epoch."""

_NO_SUCH_PATH = frozenset({400, 404, 405, 422, 501})


class Detected:
    """The adapter of the kind that was found, or the generic one as long as none was."""

    def __init__(self, epoch: str, known: Kind | None) -> None:
        """`known` is the kind found in an earlier run."""
        self._epoch = epoch
        self._adapter = ADAPTERS[known or Kind.OPENAI](epoch)
        self._sure = False

    @property
    def kind(self) -> Kind:
        """The kind found."""
        return self._adapter.kind

    @property
    def capabilities(self) -> Capabilities:
        """Of the kind found."""
        return self._adapter.capabilities

    async def look(self, probe: Probe) -> Sighting:
        """Look; find out the kind first where another server may have taken the place of the one known."""
        if not self._sure:
            found = await detect(probe)
            if not isinstance(found, Kind):
                return found
            if found is not self.kind:
                self._adapter = ADAPTERS[found](self._epoch)
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


async def detect(probe: Probe) -> Kind | Sighting:
    """The kind of server that answers, or why that cannot be told now.

    llama.cpp shows `/props` with its sampling defaults; behind a key, it refuses `/props` and answers `/health` openly.
    """
    props = await probe.get("/props")
    match trouble(props):
        case None:
            shown = props.json if props is not None else None
            return Kind.LLAMACPP if isinstance(shown, dict) and SETTINGS in shown else Kind.OPENAI
        case Locked():
            health = await probe.get("/health")
            is_llama = health is not None and health.status == 200 and health.json == {"status": "ok"}
            return Kind.LLAMACPP if is_llama else Kind.OPENAI
        case Unidentified() if props is not None and props.status in _NO_SUCH_PATH:
            return Kind.OPENAI
        case Seen() | Unreachable() | Silent() | Loading() | Unidentified() as sighting:
            return sighting
        case other:
            assert_never(other)
