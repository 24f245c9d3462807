"""Which adapter serves an upstream: as configured, or as its own answers tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from proxy.upstream.adapter import (
    Adapter,
    Capabilities,
    Kind,
    Loading,
    Probe,
    Sighting,
    Silent,
    Unidentified,
    Unreachable,
    trouble,
)
from proxy.upstream.llamacpp import LlamaCpp
from proxy.upstream.openai import OpenAI

ADAPTERS: Mapping[Kind, Callable[[str], Adapter]] = MappingProxyType({Kind.OPENAI: OpenAI, Kind.LLAMACPP: LlamaCpp})
"""Every adapter by its kind; each takes the operator's epoch."""


class Detected:
    """The adapter of the kind that was found, or the generic one as long as none was."""

    def __init__(self, epoch: str, known: Kind | None) -> None:
        """`known` is the kind found in an earlier run."""
        self._epoch = epoch
        self._found = known
        self._adapter = ADAPTERS[known or Kind.OPENAI](epoch)

    @property
    def kind(self) -> Kind:
        """The kind found."""
        return self._adapter.kind

    @property
    def capabilities(self) -> Capabilities:
        """Of the kind found."""
        return self._adapter.capabilities

    async def look(self, probe: Probe) -> Sighting:
        """Find out the kind where it is not known or no longer fits, then look."""
        if self._found is not None:
            sighting = await self._adapter.look(probe)
            if not isinstance(sighting, Unidentified):
                return sighting
        found = await detect(probe)
        if not isinstance(found, Kind):
            return found
        self._found = found
        self._adapter = ADAPTERS[found](self._epoch)
        return await self._adapter.look(probe)

    async def same_instance(self, probe: Probe, instance: str) -> bool:
        """As the kind found tells."""
        return await self._adapter.same_instance(probe, instance)


async def detect(probe: Probe) -> Kind | Unreachable | Silent | Loading:
    """The kind of server that answers, or why that cannot be told now.

    llama.cpp shows `/props` with its sampling defaults; behind a key, it refuses `/props` and answers `/health` openly.
    """
    props = await probe.get("/props")
    sighting = trouble(props)
    if isinstance(sighting, Unreachable | Silent | Loading) or props is None:
        return sighting if isinstance(sighting, Silent | Loading) else Unreachable()
    if sighting is None:
        ours = isinstance(props.json, dict) and "default_generation_settings" in props.json
        return Kind.LLAMACPP if ours else Kind.OPENAI
    if props.status in (401, 403):
        health = await probe.get("/health")
        if health is not None and health.status == 200 and health.json == {"status": "ok"}:
            return Kind.LLAMACPP
    return Kind.OPENAI
